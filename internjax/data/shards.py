"""Token shards: what training reads. `tokens-NNNNN.bin` little-endian ids, `.idx` int64 offsets.

A folder of shards has a `header.json` that names the tokenizer by hash and counts everything; the
folder appears under its name only when it is whole. `documents.jsonl` tells which document each row
came from. Where some tokens must not be learned, `.mask` holds a byte a token, 1 to learn it.
A folder is a local path, or an address such as s3://bucket/folder (see `data.store`).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Integer, UInt8

from internjax.data.files import folder_whole, write_json, write_jsonl
from internjax.data.store import RemoteArray, check_size, is_address, open_array, read_file
from internjax.errors import Corrupt, Missing, UserError

FORMAT = "internjax-tokens"
VERSION, MASKED_VERSION = 1, 2  # a reader of version 1 would train on what a mask excludes
HEADER = "header.json"
Row = tuple[str, Integer[np.ndarray, "_"], int]  # document id, token ids, UTF-8 bytes of its text


def write_shards(
    path: Path,
    rows: Iterable[Row],
    *,
    tokenizer_hash: str,
    vocab_size: int,
    shard_tokens: int = 2**26,
    masked: bool = False,
) -> dict:
    """Writes documents as a folder of shards, whole or not at all; returns its header.

    Args:
      rows: (document id, token ids, bytes of the text); ids must lie in 0..vocab_size-1.
      shard_tokens: a shard ends with the document that fills it.
      masked: rows have negative ids, too: token abs(id), which is not learned (InternEvo's way).
        Id 0 has no negative and is never learned.
    """
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    shards, documents = [], []
    with folder_whole(path) as folder:
        for number, part in enumerate(_parts(rows, shard_tokens)):
            documents += [
                {"id": name, "shard": number, "tokens": len(ids), "bytes": size}
                for name, ids, size in part
            ]
            shards.append(_write_shard(folder, number, part, dtype, vocab_size, masked))
        write_jsonl(folder / "documents.jsonl", documents)
        header = {
            "format": FORMAT,
            "version": MASKED_VERSION if masked else VERSION,
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
    count = 0
    for row in rows:
        part.append(row)
        count += len(row[1])
        if count >= shard_tokens:
            yield part
            part, count = [], 0
    if part:
        yield part


def _write_shard(
    folder: Path, number: int, part: list[Row], dtype: np.dtype, vocab_size: int, masked: bool
) -> dict:
    lowest = 1 - vocab_size if masked else 0
    for name, ids, _ in part:
        if len(ids) and not lowest <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise UserError(f"document {name}: a token id lies outside {lowest}..{vocab_size - 1}.")
    signed = np.concatenate([ids for _, ids, _ in part])
    arrays = {
        "bin": np.abs(signed).astype(dtype) if masked else signed.astype(dtype),
        "idx": np.cumsum([0, *(len(ids) for _, ids, _ in part)], dtype="<i8"),
    }
    if masked:
        arrays["mask"] = (signed > 0).astype(np.uint8)
    stem, digest = f"tokens-{number:05d}", hashlib.sha256()
    for ending, array in arrays.items():
        (folder / f"{stem}.{ending}").write_bytes(array.tobytes())
        digest.update(array.tobytes())
    return {
        "name": stem,
        "documents": len(part),
        "tokens": len(signed),
        "sha256": digest.hexdigest(),
    }


class TokenShards:
    """Reads a folder of token shards: `len(shards)` documents, `shards[i]` the ids of one.

    Local files are mapped, not read; of files behind an address only the bytes asked for are read.
    Sizes and offsets are checked on opening.

    Args:
      path: the folder, a path or an address.
      tokenizer_hash: hash of the tokenizer that is going to decode; None takes any.
      verify: also compares the checksum of every file.

    Raises:
      Missing: no shards there. Corrupt: truncated or altered files.
      UserError: made with another tokenizer.
    """

    def __init__(
        self, path: Path | str, *, tokenizer_hash: str | None = None, verify: bool = False
    ):
        self.path = str(path).rstrip("/") if is_address(path) else Path(path)
        self.header = _read_header(self.path)
        if tokenizer_hash is not None and tokenizer_hash != self.header["tokenizer"]:
            raise UserError(
                f"{self.path} was made with tokenizer {self.header['tokenizer'][:12]}, the model's "
                f"is {tokenizer_hash[:12]}: make the shards again with this model's tokenizer."
            )
        opened = [_open_shard(self.path, s, self.header) for s in self.header["shards"]]
        self._shards = [shard for shard, _ in opened]
        if verify:
            for (shard, offsets), entry in zip(opened, self.header["shards"], strict=True):
                _verify(self.path, shard, offsets, entry)
        # Where every shard, and every document, begins in the stream of all tokens; M = N + 1.
        sizes = [entry["tokens"] for entry in self.header["shards"]]
        self._firsts = np.cumsum([0, *sizes], dtype=np.int64)
        parts = [first + offsets[:-1] for first, (_, offsets) in zip(self._firsts, opened)]
        self.offsets: Int64[np.ndarray, "M"] = np.concatenate([*parts, self._firsts[-1:]])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Integer[np.ndarray, "T"]:
        """Returns the ids of document `index`, a read-only view."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        return self.read(int(self.offsets[index]), int(self.offsets[index + 1]))

    def __iter__(self) -> Iterator[Integer[np.ndarray, "T"]]:
        return (self[i] for i in range(len(self)))

    def read(self, start: int, stop: int) -> Integer[np.ndarray, "T"]:
        """Returns tokens `start`..`stop`-1 of the stream of all documents, a view if it can be."""
        return self._slice(start, stop, lambda shard: shard.tokens, self.header["dtype"])

    def read_mask(self, start: int, stop: int) -> UInt8[np.ndarray, "T"]:
        """Returns whether the tokens of `read` are learned: 1 or 0, all 1 without a mask."""
        if not self.masked:
            return np.ones(stop - start, np.uint8)
        return self._slice(start, stop, lambda shard: shard.mask, "u1")

    def _slice(self, start: int, stop: int, field: Callable, dtype: str) -> np.ndarray:
        at = int(np.searchsorted(self._firsts[1:], start, side="right"))
        parts = []
        while start < stop:
            first, end = int(self._firsts[at]), min(stop, int(self._firsts[at + 1]))
            parts.append(field(self._shards[at])[start - first : end - first])
            start, at = end, at + 1
        if not parts:
            return np.zeros(0, dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @property
    def masked(self) -> bool:
        """Whether some tokens are not learned."""
        return self.header["version"] == MASKED_VERSION

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
        return np.diff(self.offsets)

    def documents(self) -> list[dict]:
        """Returns id, shard, tokens and bytes of every document, in order."""
        text = read_file(self.path, "documents.jsonl").decode("utf-8")
        return [json.loads(line) for line in text.splitlines()]


@dataclass(frozen=True)
class _Shard:
    tokens: np.ndarray | RemoteArray
    mask: np.ndarray | RemoteArray | None


def _read_header(path: Path | str) -> dict:
    try:
        text = read_file(path, HEADER)
    except Missing as error:
        raise Missing(
            f"{path} holds no token shards (no {HEADER}): make them with `internjax data`."
            if not is_address(path)
            else str(error)
        ) from None
    try:
        header = json.loads(text)
    except ValueError as error:
        raise Corrupt(f"{path}/{HEADER} is damaged ({error}): make the shards again.") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise Corrupt(f"{path}/{HEADER} is not a header of token shards.")
    if header["version"] not in (VERSION, MASKED_VERSION):
        raise UserError(
            f"{path}/{HEADER} has version {header['version']}, this program reads "
            f"{VERSION} and {MASKED_VERSION}."
        )
    return header


def _open_shard(path: Path | str, shard: dict, header: dict) -> tuple[_Shard, np.ndarray]:
    """Returns a shard and where its documents begin in it `[N + 1]`."""
    dtype, stem = np.dtype(header["dtype"]), shard["name"]
    check_size(path, f"{stem}.bin", shard["tokens"] * dtype.itemsize)
    check_size(path, f"{stem}.idx", (shard["documents"] + 1) * 8)
    masked = header["version"] == MASKED_VERSION
    if masked:
        check_size(path, f"{stem}.mask", shard["tokens"])
    offsets = np.frombuffer(read_file(path, f"{stem}.idx"), dtype="<i8")
    if offsets[0] != 0 or offsets[-1] != shard["tokens"] or (np.diff(offsets) < 0).any():
        raise Corrupt(
            f"{path}/{stem}.idx is damaged: its offsets do not rise from 0 to the token count."
        )
    if not shard["tokens"]:  # a memory map of nothing is an error of the system
        return _Shard(np.zeros(0, dtype), np.zeros(0, np.uint8)), offsets
    tokens = open_array(path, f"{stem}.bin", dtype)
    mask = open_array(path, f"{stem}.mask", np.dtype("u1")) if masked else None
    return _Shard(tokens, mask), offsets


def _verify(path: Path | str, shard: _Shard, offsets: np.ndarray, entry: dict) -> None:
    digest = hashlib.sha256()
    for array in (shard.tokens, offsets, shard.mask):
        if array is not None:
            digest.update(array[:].tobytes())
    if digest.hexdigest() != entry["sha256"]:
        raise Corrupt(
            f"{path}/{entry['name']}.bin or a file beside it was altered: SHA-256 differs from "
            f"{HEADER}."
        )
