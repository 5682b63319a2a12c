"""InternEvo's tokenized data, in and out: `.bin` of JSON lines with a `.bin.meta` beside it.

A line is {"tokens": [...]}; the meta file is a NumPy array of (byte offset, token count) pairs
(tools/tokenizer.py of InternEvo writes 32-bit numbers, which end at 2 GiB; we write 64-bit ones and
read both). A negative id is token abs(id), which is not learned; id 0 has no negative, and
InternEvo never learns it (labels <= 0 become -100). Sub-folders (cn, en, code, ...) are sources.
"""

import json
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from internjax.data.files import folder_whole, write_whole
from internjax.data.shards import Row, TokenShards, write_shards
from internjax.data.tokenizer import Tokenizer
from internjax.errors import Corrupt, Missing, UserError

# A negative number or a zero: what makes a mask necessary.
_NOT_LEARNED = re.compile(rb"-|[\[ ,]0[\],]")


def from_internevo(
    folder: Path, out: Path, tokenizer: Tokenizer, *, shard_tokens: int = 2**26
) -> dict[str, dict]:
    """Writes token shards of all `.bin` files below a folder; returns the header of each source.

    Args:
      folder: holds .bin files, or a sub-folder a source that does. out: a folder of shards, or with
        sub-folders one a source, of the same names.
      tokenizer: the one that made the files, which do not name it.

    Raises:
      Missing: no .bin file, or one without its .meta. Corrupt: damaged ones, with file and line.
      UserError: an id beyond the tokenizer's vocabulary, as with a wrong tokenizer.
    """
    folder, out = Path(folder), Path(out)
    sources = _find(folder)

    def write(name: str, target: Path) -> dict:
        return write_shards(
            target,
            _rows(sources[name], folder, tokenizer),
            tokenizer_hash=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            shard_tokens=shard_tokens,
            masked=any(map(_has_masks, sources[name])),
        )

    if "" in sources:
        return {out.name: write("", out)}
    with folder_whole(out) as whole:
        return {name: write(name, whole / name) for name in sources}


def to_internevo(
    sources: Mapping[str, TokenShards], out: Path, *, mask_zero: bool = False
) -> dict[str, int]:
    """Writes `out/NAME/train-00000.bin` and .meta of each source; returns documents by source.

    Args:
      out: appears whole or not at all.
      mask_zero: accept that id 0, where it is learned in the shards, is not learned by InternEvo.

    Raises:
      UserError: there is such an id 0, and `mask_zero` is not set.
    """
    counts = {}
    with folder_whole(out) as folder:
        for name, shards in sources.items():
            (folder / name).mkdir()
            rows = _signed(name, shards, mask_zero)
            counts[name] = write_bin(folder / name / "train-00000.bin", rows)
    return counts


def read_bin(path: Path) -> Iterator[Int64[np.ndarray, "T"]]:
    """Yields the signed ids of every document of one .bin file.

    Raises:
      Missing: no file or no .meta. Corrupt: what the two say does not agree.
    """
    path = Path(path)
    meta = _read_meta(path)
    with open(path, "rb") as file:
        for number, (offset, count) in enumerate(meta.tolist(), start=1):
            if file.tell() != offset:
                raise Corrupt(
                    f"{path}:{number}: begins at byte {file.tell()}, its .meta says {offset}."
                )
            ids = _parse(path, number, file.readline())
            if len(ids) != count:
                raise Corrupt(f"{path}:{number}: has {len(ids)} tokens, its .meta says {count}.")
            yield ids
        if rest := file.read(1):
            raise Corrupt(
                f"{path}: goes on after its {len(meta)} documents with {rest!r}: .meta is of "
                "another file."
            )


def write_bin(path: Path, rows: Iterable[np.ndarray]) -> int:
    """Writes one .bin file and its .meta; returns the number of documents."""
    meta, offset = [], 0
    with write_whole(path, "wb") as file:
        for ids in rows:
            line = json.dumps({"tokens": ids.tolist()}).encode() + b"\n"
            file.write(line)
            meta.append((offset, len(ids)))
            offset += len(line)
    with write_whole(Path(f"{path}.meta"), "wb") as file:
        np.save(file, np.array(meta, np.int64).reshape(-1, 2))
    return len(meta)


def _find(folder: Path) -> dict[str, list[Path]]:
    """The .bin files by source; the name is "" where they lie in the folder itself."""
    sources: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*.bin")):
        parts = file.relative_to(folder).parts
        sources.setdefault(parts[0] if len(parts) > 1 else "", []).append(file)
    if not sources:
        raise Missing(f"{folder} holds no .bin file of InternEvo, nor does a folder in it.")
    if "" in sources and len(sources) > 1:
        raise UserError(
            f"{folder} holds .bin files beside folders of such files: move {sources[''][0].name} "
            "into a folder that names its source."
        )
    return sources


def _rows(files: list[Path], folder: Path, tokenizer: Tokenizer) -> Iterator[Row]:
    size = tokenizer.vocab_size
    lengths = np.array(
        [0 if tokenizer.is_special(i) else len(tokenizer.token_bytes(i)) for i in range(size)]
    )
    for file in files:
        name = file.relative_to(folder).as_posix()
        for number, ids in enumerate(read_bin(file), start=1):
            plain = np.abs(ids)
            if len(plain) and plain.max() >= size:
                raise UserError(
                    f"{file}:{number}: token id {plain.max()} is beyond the tokenizer's "
                    f"{size} ids: give the tokenizer that made the file."
                )
            yield f"{name}:{number}", ids, int(lengths[plain].sum())


def _signed(name: str, shards: TokenShards, mask_zero: bool) -> Iterator[Int64[np.ndarray, "T"]]:
    for number, (start, stop) in enumerate(zip(shards.offsets[:-1], shards.offsets[1:])):
        ids = shards.read(int(start), int(stop)).astype(np.int64)
        learned = shards.read_mask(int(start), int(stop)) == 1
        # The first token of a document is no target, so nothing is lost with it.
        if not mask_zero and (learned & (ids == 0))[1:].any():
            raise UserError(
                f"source {name}: document {number} learns the id 0, which a .bin cannot say: "
                "InternEvo never learns it. Set mask_zero=true to accept that."
            )
        yield np.where(learned, ids, -ids)


def _read_meta(path: Path) -> Int64[np.ndarray, "N 2"]:
    file = Path(f"{path}.meta")
    for each in (path, file):
        if not each.is_file():
            raise Missing(f"{each} is missing: InternEvo's data are a .bin and its .bin.meta.")
    try:
        meta = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise Corrupt(f"{file} is no NumPy array: {error}") from error
    if meta.ndim != 2 or meta.shape[1] != 2 or meta.dtype.kind not in "iu":
        raise Corrupt(f"{file} has shape {meta.shape} of {meta.dtype}, not whole numbers [N, 2].")
    if (meta < 0).any():
        raise Corrupt(
            f"{file} has negative numbers: offsets beyond 2 GiB in 32 bits; make it anew."
        )
    return meta.astype(np.int64)


def _parse(path: Path, number: int, line: bytes) -> Int64[np.ndarray, "T"]:
    try:
        tokens = json.loads(line)["tokens"]
        ids = np.array(tokens, np.int64) if tokens else np.zeros(0, np.int64)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise Corrupt(
            f'{path}:{number}: is no line {{"tokens": [numbers]}}, or is cut short ({error!r}).'
        ) from error
    if ids.ndim != 1 or any(type(token) is not int for token in tokens):
        raise Corrupt(f"{path}:{number}: tokens is not a list of whole numbers.")
    return ids


def _has_masks(path: Path) -> bool:
    if not path.stat().st_size:
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return _NOT_LEARNED.search(text) is not None
