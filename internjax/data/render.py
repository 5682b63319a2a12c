"""Markdown pages as html, pdf, epub and txt files: real input for the data stage, made on the spot.

Pages are cut into sections, so that a small manual gives enough documents, and the sections take
turns in the four formats. The same pages give the same bytes.
"""

import html
import io
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from internjax.errors import Missing, UserError

FORMATS = ("html", "pdf", "epub", "txt")
EPOCH = (1980, 1, 1, 0, 0, 0)  # a zip member has a date; all of ours have this one
HAN = re.compile(r"[\u3400-\u9fff]")


def render_pages(
    source: Path, target: Path, *, formats: Sequence[str] = FORMATS, least_words: int = 40
) -> list[Path]:
    """Renders every .md page below `source` into `target`; returns the files in order.

    Args:
      formats: taken in turn, section by section.
      least_words: a shorter section joins the one before it.

    Raises:
      Missing: no page there. UserError: an unknown format.
    """
    if unknown := [name for name in formats if name not in WRITERS]:
        raise UserError(f"no format {unknown[0]!r} to render: legal are {', '.join(WRITERS)}.")
    source, target = Path(source), Path(target)
    pages = sorted(p for p in source.rglob("*.md") if p.is_file())
    if not pages:
        raise Missing(f"{source} holds no .md page to render.")
    parts = [
        (f"{_stem(page, source)}-{number:02d}", *part)
        for page in pages
        for number, part in enumerate(sections(page.read_text(encoding="utf-8"), least_words))
    ]
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for index, (stem, title, text) in enumerate(parts):
        name = formats[index % len(formats)]
        path = target / f"{stem}.{name}"
        path.write_bytes(WRITERS[name](title, text))
        written.append(path)
    return written


def sections(page: str, least_words: int = 40) -> list[tuple[str, str]]:
    """Cuts a Markdown page at its level-two headings; returns (title, text of the section).

    Words are counted as runs of letters, a Han character being one.
    """
    heading = re.search(r"^# +(.+)$", page, re.M)
    title = heading[1].strip() if heading else "Untitled"
    parts: list[str] = []
    for part in _cut(page):
        if parts and len(re.findall(r"[\u3400-\u9fff]|[^\W\d_]+", part)) < least_words:
            parts[-1] += "\n" + part
        else:
            parts.append(part)
    first = re.compile(r"^##? +(.+)$", re.M)
    found = [(first.search(part), part.strip() + "\n") for part in parts if part.strip()]
    return [(f"{title}: {m[1]}" if m and m[1] != title else title, text) for m, text in found]


def _cut(page: str) -> list[str]:
    """Splits at level-two headings that are not inside a fenced block."""
    parts, fenced = [""], False
    for line in page.splitlines(keepends=True):
        fenced ^= line.lstrip().startswith("```")
        if line.startswith("## ") and not fenced:
            parts.append("")
        parts[-1] += line
    return parts


def to_html(title: str, text: str) -> bytes:
    """A page with the usual chrome around the article: what extraction has to take off again."""
    body, language = _body(text), _language(text)
    return f"""<!doctype html>
<html lang="{language}"><head><meta charset="utf-8"><title>{html.escape(title)}</title></head>
<body>
<header><nav><ul><li><a href="/">Home</a></li><li><a href="/docs">Docs</a></li></ul></nav></header>
<main><article>
{body}</article></main>
<footer><p><a href="/about">About</a> <a href="/imprint">Imprint</a></p></footer>
</body></html>
""".encode()


def to_txt(title: str, text: str) -> bytes:
    """The section as plain text: paragraphs and lists without Markdown's marks."""
    plain = re.sub(r"^```.*$\n?", "", text, flags=re.M)
    plain = re.sub(r"^#+ +", "", plain, flags=re.M)
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain)
    return re.sub(r"[*`]{1,3}([^*`\n]+)[*`]{1,3}", r"\1", plain).encode()


def to_epub(title: str, text: str) -> bytes:
    """A book (EPUB 3) of one chapter."""
    name = html.escape(title)
    language = _language(text)
    members = {
        "META-INF/container.xml": '<?xml version="1.0"?><container version="1.0" xmlns="urn:oasis:'
        'names:tc:opendocument:xmlns:container"><rootfiles><rootfile full-path="OEBPS/book.opf" '
        'media-type="application/oebps-package+xml"/></rootfiles></container>',
        "OEBPS/book.opf": '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" '
        'version="3.0" unique-identifier="id"><metadata xmlns:dc="http://purl.org/dc/elements/1.1/">'
        f'<dc:identifier id="id">{name}</dc:identifier><dc:title>{name}</dc:title>'
        f"<dc:language>{language}</dc:language></metadata><manifest>"
        '<item id="c" href="text/chapter.xhtml" media-type="application/xhtml+xml"/></manifest>'
        '<spine><itemref idref="c"/></spine></package>',
        "OEBPS/text/chapter.xhtml": '<?xml version="1.0" encoding="utf-8"?><html xmlns="http://www.'
        f'w3.org/1999/xhtml"><head><title>{name}</title></head><body>\n{_body(text)}</body></html>',
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        # The standard wants this member first and stored: readers look for it in the first bytes.
        archive.writestr(zipfile.ZipInfo("mimetype", EPOCH), "application/epub+zip")
        for path, content in members.items():
            info = zipfile.ZipInfo(path, EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return out.getvalue()


def to_pdf(title: str, text: str) -> bytes:
    """Pages set by reportlab; Chinese in its CID font STSong-Light, which needs no font file."""
    from reportlab.lib.pagesizes import A4
    from reportlab.lib.styles import ParagraphStyle
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.cidfonts import UnicodeCIDFont
    from reportlab.platypus import Paragraph, Preformatted, SimpleDocTemplate, Spacer

    han = bool(HAN.search(text))
    if han:
        pdfmetrics.registerFont(UnicodeCIDFont("STSong-Light"))
    font = "STSong-Light" if han else "Helvetica"
    body = ParagraphStyle(
        "body", fontName=font, fontSize=10, leading=14, wordWrap="CJK" if han else None
    )
    code = ParagraphStyle("code", fontName=font if han else "Courier", fontSize=8, leading=10)
    story: list = []
    for kind, content in blocks(text):
        if kind == "code":
            story.append(Preformatted(content, code, maxLineLength=100))
        else:
            size = {"h1": 16, "h2": 13, "h3": 11}.get(kind, 10)
            style = ParagraphStyle(kind, parent=body, fontSize=size, leading=1.4 * size)
            mark = "• " if kind == "li" else ""
            story.append(Paragraph(mark + html.escape(content), style))
        story.append(Spacer(1, 6))
    out = io.BytesIO()
    # invariant: no creation time, no random identifier
    SimpleDocTemplate(out, pagesize=A4, title=title, invariant=1).build(story)
    return out.getvalue()


WRITERS: dict[str, Callable[[str, str], bytes]] = {
    "html": to_html,
    "pdf": to_pdf,
    "epub": to_epub,
    "txt": to_txt,
}


def blocks(text: str) -> list[tuple[str, str]]:
    """Returns (kind, plain text) of blocks: h1 to h6, p, li, row (of a table), code."""
    out: list[tuple[str, str]] = []
    kinds: list[str] = []
    for token in _parser().parse(text):
        if token.nesting == 1:
            kinds.append({"tr": "row"}.get(token.tag, token.tag))
            if token.tag == "tr":
                out.append(("row", ""))
        elif token.nesting == -1:
            kinds.pop()
        elif token.type in ("fence", "code_block"):
            out.append(("code", token.content.rstrip("\n")))
        elif token.type == "inline":
            content = "".join(c.content or " " * c.type.endswith("break") for c in token.children)
            if "row" in kinds:
                before = out.pop()[1]
                out.append(("row", f"{before} | {content}" if before else content))
            else:
                kind = next((k for k in reversed(kinds) if k == "li" or k[1:].isdigit()), "p")
                out.append((kind, content))
    return out


def _body(text: str) -> str:
    return _parser().render(text)


def _parser():
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"xhtmlOut": True, "html": False}).enable("table")


def _stem(page: Path, source: Path) -> str:
    return "-".join(page.relative_to(source).with_suffix("").parts)


def _language(text: str) -> str:
    return "zh" if HAN.search(text) else "en"
