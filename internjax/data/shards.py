"""Token shards: what training reads. `tokens-NNNNN.bin` little-endian ids, `.idx` int64 offsets.

A folder of shards has a `header.json` that names the tokenizer by hash and counts everything; the
folder appears under its name only when it is whole. `documents.jsonl` tells which document each row
came from.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Integer

from internjax.data.files import folder_whole, write_json, write_jsonl
from internjax.errors import Corrupt, Missing, UserError

FORMAT, VERSION = "internjax-tokens", 1
HEADER = "header.json"
Row = tuple[str, Integer[np.ndarray, "_"], int]  # document id, token ids, UTF-8 bytes of its text


def write_shards(
    path: Path,
    rows: Iterable[Row],
    *,
    tokenizer_hash: str,
    vocab_size: int,
    shard_tokens: int = 2**26,
) -> dict:
    """Writes documents as a folder of shards, whole or not at all; returns its header.

    Args:
      rows: (document id, token ids, bytes of the text); ids must lie in 0..vocab_size-1.
      shard_tokens: a shard ends with the document that fills it.
    """
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    shards, documents = [], []
    with folder_whole(path) as folder:
        for number, part in enumerate(_parts(rows, shard_tokens)):
            documents += [
                {"id": name, "shard": number, "tokens": len(ids), "bytes": size}
                for name, ids, size in part
            ]
            shards.append(_write_shard(folder, number, part, dtype, vocab_size))
        write_jsonl(folder / "documents.jsonl", documents)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtype.str,
            "tokenizer": tokenizer_hash,
            "vocab_size": vocab_size,
            "documents": sum(shard["documents"] for shard in shards),
            "tokens": sum(shard["tokens"] for shard in shards),
            "bytes": sum(document["bytes"] for document in documents),
            "shards": shards,
        }
        write_json(folder / HEADER, header)
    return header


def _parts(rows: Iterable[Row], shard_tokens: int) -> Iterator[list[Row]]:
    part: list[Row] = []
    for row in rows:
        part.append(row)
        if sum(len(ids) for _, ids, _ in part) >= shard_tokens:
            yield part
            part = []
    if part:
        yield part


def _write_shard(
    folder: Path, number: int, part: list[Row], dtype: np.dtype, vocab_size: int
) -> dict:
    for name, ids, _ in part:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise UserError(f"document {name}: a token id lies outside 0..{vocab_size - 1}.")
    tokens = np.concatenate([ids for _, ids, _ in part]).astype(dtype)
    offsets = np.cumsum([0, *(len(ids) for _, ids, _ in part)], dtype="<i8")
    stem = f"tokens-{number:05d}"
    (folder / f"{stem}.bin").write_bytes(tokens.tobytes())
    (folder / f"{stem}.idx").write_bytes(offsets.tobytes())
    sha256 = hashlib.sha256(tokens.tobytes() + offsets.tobytes()).hexdigest()
    return {"name": stem, "documents": len(part), "tokens": len(tokens), "sha256": sha256}


class TokenShards:
    """Reads a folder of token shards: `len(shards)` documents, `shards[i]` the ids of one.

    Files are mapped, not read. Sizes and offsets are checked on opening.

    Args:
      path: the folder.
      tokenizer_hash: hash of the tokenizer that is going to decode; None takes any.
      verify: also compares the checksum of every file.

    Raises:
      Missing: no shards there. Corrupt: truncated or altered files.
      UserError: made with another tokenizer.
    """

    def __init__(self, path: Path, *, tokenizer_hash: str | None = None, verify: bool = False):
        self.path = Path(path)
        self.header = _read_header(self.path)
        if tokenizer_hash is not None and tokenizer_hash != self.header["tokenizer"]:
            raise UserError(
                f"{self.path} was made with tokenizer {self.header['tokenizer'][:12]}, the model's "
                f"is {tokenizer_hash[:12]}: make the shards again with this model's tokenizer."
            )
        self._opened = [
            _open_shard(self.path, s, self.header, verify) for s in self.header["shards"]
        ]
        counts = [len(offsets) - 1 for _, offsets in self._opened]
        self._starts = [0, *itertools.accumulate(counts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Integer[np.ndarray, "T"]:
        """Returns the ids of document `index`, a read-only view."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        shard = bisect.bisect_right(self._starts, index) - 1
        tokens, offsets = self._opened[shard]
        at = index - self._starts[shard]
        return tokens[offsets[at] : offsets[at + 1]]

    def __iter__(self) -> Iterator[Integer[np.ndarray, "T"]]:
        return (self[i] for i in range(len(self)))

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, end-of-text tokens included."""
        return self.header["tokens"]

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text of all documents: the divisor of bits per byte."""
        return self.header["bytes"]

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""
        return self.header["vocab_size"]

    def lengths(self) -> Int64[np.ndarray, "N"]:
        """Returns the number of tokens of every document."""
        return np.concatenate(
            [np.diff(offsets) for _, offsets in self._opened] or [np.zeros(0, np.int64)]
        ).astype(np.int64)

    def documents(self) -> list[dict]:
        """Returns id, shard, tokens and bytes of every document, in order."""
        lines = (self.path / "documents.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def _read_header(path: Path) -> dict:
    file = path / HEADER
    if not file.is_file():
        raise Missing(
            f"{path} holds no token shards (no {HEADER}): make them with `internjax data`."
        )
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Corrupt(f"{file} is damaged ({error}): make the shards again.") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise Corrupt(f"{file} is not a header of token shards.")
    if header["version"] != VERSION:
        raise UserError(f"{file} has version {header['version']}, this program reads {VERSION}.")
    return header


def _open_shard(
    path: Path, shard: dict, header: dict, verify: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Maps one shard: (tokens [T], offsets [N + 1])."""
    dtype = np.dtype(header["dtype"])
    files = (path / f"{shard['name']}.bin", path / f"{shard['name']}.idx")
    for file, size in zip(files, (shard["tokens"] * dtype.itemsize, (shard["documents"] + 1) * 8)):
        if not file.is_file():
            raise Corrupt(f"{file} is missing: make the shards again.")
        if (found := file.stat().st_size) != size:
            raise Corrupt(f"{file} has {found:,} bytes, its header says {size:,}: make it again.")
    # A memory map of nothing is an error of the system, so an empty shard is an empty array.
    tokens = np.memmap(files[0], dtype=dtype, mode="r") if shard["tokens"] else np.zeros(0, dtype)
    offsets = np.fromfile(files[1], dtype="<i8")
    if offsets[0] != 0 or offsets[-1] != shard["tokens"] or (np.diff(offsets) < 0).any():
        raise Corrupt(f"{files[1]} is damaged: its offsets do not rise from 0 to the token count.")
    if verify:
        found = hashlib.sha256(tokens.tobytes() + offsets.tobytes()).hexdigest()
        if found != shard["sha256"]:
            raise Corrupt(f"{files[0]} or its .idx was altered: SHA-256 differs from {HEADER}.")
    return tokens, offsets
