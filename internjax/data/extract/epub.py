"""The chapters of an EPUB in reading order: zip -> container.xml -> OPF spine -> XHTML.

Archives come from strangers: sizes are limited before anything is unpacked, names may not leave the
archive, and XML is parsed without entities, DTDs or network.
"""

import io
import posixpath
import re
import zipfile
import zlib
from urllib.parse import unquote

from internjax.data.extract import Extracted, ExtractError, Limits
from internjax.data.extract.text import tidy

CONTAINER = "META-INF/container.xml"
MAX_MEMBERS = 10_000
MAX_RATIO = 200  # unpacked / packed; text deflates 3-10 times, a bomb a thousand times
RATIO_FROM_BYTES = 2**20  # small members may deflate as well as they like
XHTML = ("application/xhtml+xml", "text/html")


def extract(data: bytes, limits: Limits) -> Extracted:
    """Returns all chapters of the spine as Markdown, with the book's title, date and language."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ExtractError("corrupt", f"zip: {error}") from None
    with archive:
        _check_members(archive, limits)
        opf_name = _opf_name(archive)
        opf = _xml(archive, opf_name)
        chapters = _spine(opf, posixpath.dirname(opf_name))
        if not chapters:
            raise ExtractError("corrupt", "the spine names no chapter")
        texts = [markdown(_read(archive, name)) for name in chapters]
    text = "\n\n".join(t for t in map(str.strip, texts) if t)
    date = re.match(r"\d{4}(-\d\d(-\d\d)?)?", _about(opf, "date"))
    return Extracted(
        tidy(text),
        title=_about(opf, "title"),
        date=date[0] if date else "",
        language=_about(opf, "language"),
        meta={"chapters": len(chapters)},
    )


def markdown(data: bytes) -> str:
    """Returns an XHTML chapter as Markdown: headings, lists and code keep their marks."""
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    from internjax.data.extract.html import decode

    tree = HTMLTree.parse(decode(data)[0])
    for heading in tree.document.query_selector_all("h1, h2, h3, h4, h5, h6"):
        heading.text = f"{'#' * int(heading.tag[1])} {' '.join(heading.text.split())}"
    return extract_plain_text(tree, preserve_formatting=True, alt_texts=False)


def _check_members(archive: zipfile.ZipFile, limits: Limits) -> None:
    """Refuses an archive by its directory, before a byte of it is unpacked."""
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise ExtractError("bomb", f"{len(members):,} members, the limit is {MAX_MEMBERS:,}")
    total_bytes = sum(member.file_size for member in members)
    if total_bytes > limits.file_bytes:
        raise ExtractError("bomb", f"unpacks to {total_bytes:,} bytes")
    for member in members:
        _safe(member.filename)
        ratio = member.file_size / max(1, member.compress_size)
        if ratio > MAX_RATIO and member.file_size > RATIO_FROM_BYTES:
            raise ExtractError("bomb", f"{member.filename} is packed {ratio:.0f} to 1")
        if member.flag_bits & 1:
            raise ExtractError("encrypted", f"{member.filename} needs a password")


def _safe(name: str) -> str:
    """Returns a member's name in normal form; one that leaves the archive is `unsafe`."""
    normal = posixpath.normpath(name.replace("\\", "/"))
    if normal.startswith(("../", "/")) or normal == ".." or re.match(r"[A-Za-z]:", normal):
        raise ExtractError("unsafe", f"{name!r} leaves the archive")
    return normal


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    """Unpacks one member, never more than its directory entry promised."""
    try:
        promised_bytes = archive.getinfo(name).file_size
        with archive.open(name) as file:
            data = file.read(promised_bytes + 1)
    except KeyError:
        raise ExtractError("corrupt", f"{name} is not in the archive") from None
    # A member's own header may name it in bytes that are no UTF-8: zipfile lets that through.
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        UnicodeDecodeError,
    ) as error:
        raise ExtractError("corrupt", f"{name}: {error}") from None
    if len(data) > promised_bytes:
        raise ExtractError("bomb", f"{name} is larger than its directory entry says")
    return data


def _xml(archive: zipfile.ZipFile, name: str):
    """Parses a member as XML; entities are refused, not resolved."""
    from lxml import etree

    data = _read(archive, name)
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False
    )
    if b"<!ENTITY" in data:
        raise ExtractError("unsafe", f"{name} declares XML entities")
    try:
        return etree.fromstring(data, parser)
    except etree.XMLSyntaxError as error:
        raise ExtractError("corrupt", f"{name}: {error}") from None


def _opf_name(archive: zipfile.ZipFile) -> str:
    roots = _xml(archive, CONTAINER).xpath("//*[local-name()='rootfile']/@full-path")
    if not roots:
        raise ExtractError("corrupt", f"{CONTAINER} names no package file")
    return _safe(roots[0])


def _spine(opf, folder: str) -> list[str]:
    """Returns the archive names of the chapters, in reading order."""
    items = {
        item.get("id"): item
        for item in opf.xpath("//*[local-name()='manifest']/*[local-name()='item']")
    }
    references = opf.xpath("//*[local-name()='spine']/*[local-name()='itemref']/@idref")
    chosen = [items[r] for r in references if r in items and items[r].get("media-type") in XHTML]
    hrefs = [unquote(item.get("href", "").partition("#")[0]) for item in chosen]
    return [_safe(posixpath.join(folder, href)) for href in hrefs]


def _about(opf, name: str) -> str:
    found = opf.xpath(f"//*[local-name()='metadata']/*[local-name()='{name}']/text()")
    return " ".join(found[0].split()) if found else ""
