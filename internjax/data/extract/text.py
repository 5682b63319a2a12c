"""Plain text and Markdown: which encoding, and is it text at all."""

import re
import unicodedata

from internjax.data.extract import Extracted, ExtractError, Limits

BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.S)
HEADING = re.compile(r"^#\s+(.+?)\s*#*$", re.M)
# Tab, line feed, carriage return, form feed and escape occur in honest text.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")


def extract(data: bytes, limits: Limits) -> Extracted:
    """Decodes text; a Markdown page's first level-one heading is its title."""
    text, encoding = decode(data)
    text = tidy(FRONT_MATTER.sub("", text))
    heading = HEADING.search(text)
    return Extracted(text, title=heading[1] if heading else "", meta={"encoding": encoding})


def decode(data: bytes) -> tuple[str, str]:
    """Returns text and encoding: a byte-order mark, else UTF-8, else the detector's guess.

    Raises:
      ExtractError: `binary` or `encoding`, when no reading of the bytes is text.
    """
    for mark, encoding in BOMS:
        if data.startswith(mark):
            return _strict(data[len(mark) :], encoding), encoding
    try:
        text, encoding = data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        encoding = _detect(data)
        text = _strict(data, encoding)
    controls = len(CONTROL.findall(text))
    if controls > 0.001 * len(text) + 2:
        raise ExtractError("binary", f"{controls:,} control characters in {len(text):,}")
    return text, encoding


def tidy(text: str) -> str:
    """NFC, one kind of newline, no controls, no spaces at line ends, at most one blank line."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = CONTROL.sub("", text.replace("\f", "\n\n").replace("\x1b", "").replace("\ufeff", ""))
    text = re.sub(r"[ \t\u00a0]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _detect(data: bytes) -> str:
    """Guesses the encoding of bytes that are not UTF-8."""
    from resiliparse.parse.encoding import detect_encoding

    if b"\x00" in data:
        raise ExtractError("binary", "holds zero bytes and no byte-order mark")
    return detect_encoding(data) or "windows-1252"


def _strict(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise ExtractError("encoding", f"not readable as {encoding}: {error}") from None
