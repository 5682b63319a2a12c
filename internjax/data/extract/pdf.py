"""The text layer of a PDF, page by page (pypdfium2), put back into paragraphs."""

import re
from collections import Counter

from internjax.data.extract import Extracted, ExtractError, Limits
from internjax.data.extract.text import tidy

# FPDF_GetLastError's codes that a reader can do something about.
PASSWORD = "password"
HAN = r"\u3000-\u303f\u3400-\u9fff\uff00-\uffef"


def extract(data: bytes, limits: Limits) -> Extracted:
    """Returns the paragraphs of all pages without running heads and page numbers.

    A PDF stores lines, not paragraphs: a line is joined to the one before unless that one ended
    early or with a full stop. Scanned pages have no text layer and give `empty`.
    """
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        reason = "encrypted" if PASSWORD in str(error).lower() else "corrupt"
        raise ExtractError(reason, str(error)) from None
    try:
        pages = [_page(document, index, limits) for index in range(len(document))]
        about = document.get_metadata_dict(skip_empty=True)
    finally:
        document.close()
    if not any(pages):
        raise ExtractError("empty", f"no text layer on {len(pages)} pages (scanned?)")
    pages = _without_running_heads(pages)
    text = "\n\n".join(_paragraphs(lines) for lines in pages if lines)
    text = re.sub(rf"([{HAN}]) *\n\n(?=[{HAN}])(?<![。！？：])", r"\1", text)
    stated = re.match(r"D:(\d{4})(\d\d)(\d\d)", about.get("CreationDate", ""))
    date = "-".join(stated.groups()) if stated else ""
    return Extracted(tidy(text), about.get("Title", ""), date, meta={"pages": len(pages)})


def _page(document, index: int, limits: Limits) -> list[str]:
    """Returns the lines of one page; pdfium marks a hyphen at a line's end as U+FFFE or U+0002."""
    import pypdfium2

    try:
        page = document[index]
        text = page.get_textpage().get_text_bounded()
    except pypdfium2.PdfiumError as error:
        raise ExtractError("corrupt", f"page {index + 1}: {error}") from None
    if len(text) > limits.characters:
        raise ExtractError("large", f"page {index + 1} has {len(text):,} characters")
    text = re.sub(r"[\ufffe\x02]\s*", "", text.replace("\r\n", "\n"))
    return [line.strip() for line in text.split("\n") if line.strip()]


def _without_running_heads(pages: list[list[str]]) -> list[list[str]]:
    """Drops first and last lines that most pages share (digits apart) and bare page numbers."""

    def shape(line: str) -> str:
        return re.sub(r"\d+|\b[ivxlc]+\b", "0", line)

    edges = Counter(s for page in pages for s in {shape(line) for line in page[:2] + page[-2:]})
    running = {s for s, count in edges.items() if count >= max(3, 0.5 * len(pages)) or s == "0"}

    def keep(index: int, page: list[str]) -> bool:
        return 2 <= index < len(page) - 2 or shape(page[index]) not in running

    return [[line for i, line in enumerate(page) if keep(i, page)] for page in pages]


def _paragraphs(lines: list[str]) -> str:
    """Joins the lines of a page into paragraphs."""
    full = sorted(map(len, lines))[int(0.9 * (len(lines) - 1))]  # a full line, in characters
    out = ""
    for before, line in zip(["", *lines], lines):
        if not out:
            out = line
        elif len(before) < 0.75 * full or re.match(r"[•◦▪*\-–]\s|\d+[.)]\s", line):
            ended = re.search(r"[.!?:。！？：]['\"”’)]*$", before) or len(before) < 0.75 * full
            out += ("\n\n" if ended else "\n") + line
        elif re.search(rf"[{HAN}]$", before) and re.match(rf"[{HAN}]", line):
            out += line
        elif re.search(r"[a-z]-$", before) and re.match(r"[a-z]", line):
            out = out[:-1] + line
        else:
            out += " " + line
    return out
