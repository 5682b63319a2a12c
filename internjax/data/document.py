"""The one record of a document, its jsonl form, and the validator that names file, line and field.

Knows nothing about where documents come from or what is done with them.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internjax.data.files import write_jsonl
from internjax.errors import Corrupt, Missing

MEDIA_KINDS = ("image", "video", "audio")
# BCP 47 as far as a corpus needs it: language, script, region. "und" is "not determined".
LANGUAGE = re.compile(r"^[a-z]{2,3}(-[A-Z][a-z]{3})?(-([A-Z]{2}|\d{3}))?$")
DATE = re.compile(
    r"^\d{4}(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?)?(T[\d:.]+(Z|[+-]\d\d:\d\d)?)?$"
)
SHA256 = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class Source:
    """Where a document came from.

    Fields:
      uri: address, or path relative to the input folder (never of this machine).
      mime: media type of the original; sha256: of its bytes, lower-case hex.
      license, collection: free text; fetched: ISO 8601 date. Empty means unknown.
    """

    uri: str
    mime: str = ""
    sha256: str = ""
    license: str = ""
    collection: str = ""
    fetched: str = ""


@dataclass(frozen=True)
class Media:
    """One picture, film or sound of a document.

    Fields:
      kind: image, video or audio; url, sha256, path: where it is; caption: its text.
      width, height: pixels; start, end: seconds; offset: character position in `content`.
    """

    kind: str
    url: str = ""
    sha256: str = ""
    path: str = ""
    caption: str = ""
    width: int = 0
    height: int = 0
    start: float = 0.0
    end: float = 0.0
    offset: int = 0


@dataclass(frozen=True)
class Document:
    """One document; stages make new ones and never change one.

    Fields:
      id: stable hash of source address and span; content: plain text or Markdown.
      title, language (BCP 47), date (ISO 8601): empty when unknown.
      meta: JSON values that stages add (`dup`, `pii`, `rejected`, ...).
    """

    id: str
    content: str
    source: Source
    title: str = ""
    language: str = ""
    date: str = ""
    media: tuple[Media, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def with_meta(self, **values: Any) -> "Document":
        """Returns the document with more (or newer) meta values."""
        return dataclasses.replace(self, meta={**self.meta, **values})

    @property
    def num_bytes(self) -> int:
        """Length of the content in UTF-8 bytes."""
        return len(self.content.encode("utf-8"))


@dataclass(frozen=True)
class Problem:
    """One fault of a jsonl file: `file:line:field: message`."""

    file: str
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.field}: {self.message}"


def document_id(uri: str, span: str = "") -> str:
    """Returns the id of a part (`span`) of the document at `uri`: 32 hex digits of SHA-256."""
    return hashlib.sha256(f"{uri}\n{span}".encode()).hexdigest()[:32]


def to_row(document: Document) -> dict[str, Any]:
    """Returns the JSON object of a document, keys in the order of the schema."""
    row = dataclasses.asdict(document)
    order = ("id", "content", "title", "language", "date", "source", "media", "meta")
    return {key: list(row[key]) if key == "media" else row[key] for key in order}


def from_row(row: Mapping[str, Any]) -> Document:
    """Makes a document of a valid JSON object (see `check_row`)."""
    values = dict(row)
    values["source"] = Source(**values["source"])
    values["media"] = tuple(Media(**media) for media in values.get("media", ()))
    return Document(**values)


def to_wanjuan(document: Document) -> dict[str, str]:
    """Returns the WanJuan 1.0 text row: `id` and `content` (arXiv:2308.10755)."""
    return {"id": document.id, "content": document.content}


def write_documents(path: Path, documents: Iterable[Document]) -> int:
    """Writes documents as jsonl, whole or not at all; returns how many."""
    return write_jsonl(path, map(to_row, documents))


def read_documents(path: Path) -> Iterator[Document]:
    """Reads documents from jsonl.

    Raises:
      Corrupt: at the first line that is not a document, as `file:line:field: message`.
    """
    for line, text in _lines(path):
        row, problems = _parse(text)
        if problems := problems or check_row(row):
            raise Corrupt(str(Problem(Path(path).name, line, *problems[0])))
        yield from_row(row)


def check_file(path: Path) -> list[Problem]:
    """Returns every problem of a jsonl file of documents, in order; an empty list means valid."""
    name, first_line, problems = Path(path).name, {}, []
    count = 0
    for line, text in _lines(path):
        count += 1
        row, faults = _parse(text)
        faults = faults or check_row(row)
        if not faults:
            before = first_line.setdefault(row["id"], line)
            if before != line:
                faults = [("id", f"{row['id']!r} was used before, in line {before}")]
        problems += [Problem(name, line, *fault) for fault in faults]
    if not count:
        problems.append(Problem(name, 1, "-", "the file holds no document"))
    return problems


def check_row(row: Any) -> list[tuple[str, str]]:
    """Returns (field, message) for everything that keeps a JSON value from being a document."""
    if not isinstance(row, dict):
        return [("-", f"is {_kind(row)}, not a JSON object")]
    problems = _check_fields(row, Document, "")
    if problems:
        return problems
    if not row["id"] or row["id"] != row["id"].strip():
        problems.append(("id", f"{row['id']!r} is empty or has spaces around it"))
    if not row["content"].strip():
        problems.append(("content", "is empty"))
    problems += _check_patterns(row)
    problems += _check_fields(row["source"], Source, "source.")
    for index, media in enumerate(row.get("media", ())):
        problems += _check_media(media, f"media[{index}].", len(row["content"]))
    return problems


def _check_patterns(row: dict) -> list[tuple[str, str]]:
    problems = []
    if row.get("language") and not LANGUAGE.match(row["language"]):
        problems.append(("language", f"{row['language']!r} is not like en, zh-Hans or pt-BR"))
    if row.get("date") and not DATE.match(row["date"]):
        problems.append(("date", f"{row['date']!r} is not ISO 8601 like 2024-05-31"))
    sha256 = row["source"].get("sha256")
    if isinstance(sha256, str) and sha256 and not SHA256.match(sha256):
        problems.append(("source.sha256", f"{sha256!r} is not 64 lower-case hex digits"))
    for name, value in row.items():
        if isinstance(value, str) and (bad := re.search(r"[\ud800-\udfff]", value)):
            problems.append((name, f"holds a lone surrogate at character {bad.start()}"))
    return problems


def _check_media(media: Any, path: str, length: int) -> list[tuple[str, str]]:
    if not isinstance(media, dict):
        return [(path[:-1], f"is {_kind(media)}, not an object")]
    if problems := _check_fields(media, Media, path):
        return problems
    if media["kind"] not in MEDIA_KINDS:
        problems.append((f"{path}kind", f"{media['kind']!r} is none of {', '.join(MEDIA_KINDS)}"))
    if not 0 <= media.get("offset", 0) <= length:
        problems.append(
            (f"{path}offset", f"{media['offset']} lies outside the {length} characters")
        )
    return problems


_JSON_TYPES: dict[Any, tuple[type, ...]] = {
    str: (str,),
    int: (int,),
    float: (int, float),
    Source: (dict,),
    Mapping[str, Any]: (dict,),
    tuple[Media, ...]: (list,),
}


def _check_fields(row: dict, cls: type, path: str) -> list[tuple[str, str]]:
    """Checks presence, spelling and JSON type of the fields of a record."""
    problems, fields = [], {f.name: f for f in dataclasses.fields(cls)}
    for name, f in fields.items():
        required = f.default is f.default_factory is dataclasses.MISSING
        if name not in row:
            if required:
                problems.append((path + name, "is missing"))
            continue
        types = _JSON_TYPES[f.type]
        if not isinstance(row[name], types) or isinstance(row[name], bool):
            problems.append((path + name, f"is {_kind(row[name])}, not {_NAMES[types[-1]]}"))
    unknown = [name for name in row if name not in fields]
    legal = ", ".join(fields)
    return problems + [(path + name, f"is no field; fields are {legal}") for name in unknown]


_NAMES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "a boolean",
    dict: "an object",
    list: "a list",
    type(None): "null",
}


def _kind(value: Any) -> str:
    return _NAMES[type(value)]


def _parse(text: bytes) -> tuple[Any, list[tuple[str, str]]]:
    """Returns the JSON value of a line, or what is wrong with the line."""
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_no_constant), []
    except UnicodeDecodeError as error:
        return None, [("-", f"is not UTF-8 at byte {error.start}")]
    except json.JSONDecodeError as error:
        what = "is empty" if not text.strip() else f"is not JSON: {error.msg} at {error.pos}"
        return None, [("-", what)]
    except (ValueError, RecursionError) as error:
        return None, [("-", f"is not JSON: {error}")]


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    path = Path(path)
    if not path.is_file():
        raise Missing(f"{path} is not there: give a .jsonl file of documents.")
    with open(path, "rb") as file:
        yield from ((n, line.rstrip(b"\r\n")) for n, line in enumerate(file, start=1))
