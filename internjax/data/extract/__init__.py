"""From a file of any kind to text: html, pdf, epub, plain text and Markdown.

`extract_file` runs in the calling process; `child.Extractor` runs it where a poisonous document can
do no harm. Each kind is one module; this one only tells kinds apart and limits what is read.
"""

import gzip
import hashlib
import importlib
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Media type -> module of this package with `extract(data: bytes) -> Extracted`.
LANES = {
    "text/html": "html",
    "application/pdf": "pdf",
    "application/epub+zip": "epub",
    "text/markdown": "text",
    "text/plain": "text",
}
SUFFIXES = {
    ".html": "text/html",
    ".htm": "text/html",
    ".xhtml": "text/html",
    ".pdf": "application/pdf",
    ".epub": "application/epub+zip",
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".txt": "text/plain",
    ".text": "text/plain",
}


@dataclass(frozen=True)
class Limits:
    """What one document may cost.

    Fields:
      seconds: wall time; memory_bytes: address space of the extracting process.
      file_bytes: of the file and of everything unpacked from it; characters: of the text.
    """

    seconds: float = 30.0
    memory_bytes: int = 2**31
    file_bytes: int = 2**28
    characters: int = 20_000_000


@dataclass(frozen=True)
class Extracted:
    """The text of a file and what the file says about itself (`date` ISO 8601)."""

    content: str
    title: str = ""
    date: str = ""
    language: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


class ExtractError(ValueError):
    """A document that gives no text; `reason` is one word for the quarantine.

    Reasons: corrupt, encrypted, empty, bomb, unsafe, large, binary, encoding; and from the child:
    timeout, memory, crash.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def media_type(path: Path) -> str | None:
    """Returns the media type that a file's name promises (`.gz` is looked through), or None."""
    name = path.name.lower().removesuffix(".gz")
    return SUFFIXES.get(Path(name).suffix)


def sniff(data: bytes, promised: str) -> str:
    """Returns the media type that the first bytes show; what cannot be told keeps its promise."""
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"%PDF-"):
        return "application/pdf"
    if data.startswith(b"PK\x03\x04") and b"application/epub+zip" in data[:128]:
        return "application/epub+zip"
    if promised == "text/plain" and head[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "text/html"
    return promised


def read_limited(path: Path, limit_bytes: int) -> bytes:
    """Reads a file, through gzip when its name ends in .gz, but never more than the limit."""
    if path.stat().st_size > limit_bytes:
        raise ExtractError("large", f"{path.stat().st_size:,} bytes, the limit is {limit_bytes:,}")
    if path.suffix.lower() != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            data = file.read(limit_bytes + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ExtractError("corrupt", f"gzip: {error}") from None
    if len(data) > limit_bytes:
        raise ExtractError("bomb", f"gzip unpacks to more than {limit_bytes:,} bytes")
    return data


def extract_file(path: Path, limits: Limits | None = None) -> tuple[Extracted, str, str]:
    """Extracts one file in this process; returns (text, media type, SHA-256 of its bytes).

    Raises:
      ExtractError: the file gives no text; nothing else is meant to escape, but the libraries below
        meet hostile input here: `child.Extractor` is the place where anything may happen.
    """
    limits = limits or Limits()
    data = read_limited(path, limits.file_bytes)
    mime = sniff(data, media_type(path) or "text/plain")
    lane = importlib.import_module(f"internjax.data.extract.{LANES[mime]}")
    extracted = lane.extract(data, limits)
    if not extracted.content.strip():
        raise ExtractError("empty", "no text was found")
    if len(extracted.content) > limits.characters:
        found = f"{len(extracted.content):,} characters"
        raise ExtractError("large", f"{found}, the limit is {limits.characters:,}")
    return extracted, mime, hashlib.sha256(data).hexdigest()
