"""Reads GGUF files: the header at once, tensors one at a time (format: ggml docs, gguf.md)."""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internjax.errors import Corrupt, Missing, UserError
from internjax.models.gguf_blocks import BLOCKS, PLAIN, decode, num_bytes

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_KINDS = {block.number: kind for kind, block in BLOCKS.items()}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: block format, shape (rows outermost), absolute offset, bytes."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def dtype(self) -> np.dtype:
        """dtype after reading: as stored for plain formats, float32 for quantized ones."""
        return np.dtype(PLAIN.get(self.kind, np.float32))


@dataclass(frozen=True)
class GgufFile:
    """A parsed header: metadata by key, tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor from disk; quantized ones come back as float32."""
        info = self.tensors[name]
        return decode(info.kind, self.read_bytes(name), info.shape)

    def read_bytes(self, name: str) -> np.ndarray:
        """Reads the uint8 bytes of one tensor as they are stored."""
        info = self.tensors[name]
        with self.path.open("rb") as f:
            f.seek(info.offset)
            raw = np.fromfile(f, np.uint8, info.num_bytes)
        if raw.size != info.num_bytes:
            raise Corrupt(f"{self.path}: tensor {name} is cut short; fetch the file again.")
        return raw


def open_gguf(path: str | Path) -> GgufFile:
    """Parses and checks the header of a GGUF file (versions 2 and 3, little-endian).

    Raises: Missing when there is no such file, Corrupt when it is damaged or no GGUF, UserError
      for a block format that we do not read.
    """
    path = Path(path)
    if not path.is_file():
        raise Missing(f"{path}: no such GGUF file.")
    size = path.stat().st_size
    if size < 24:
        raise Corrupt(f"{path}: {size} bytes are too few for a GGUF file; fetch it again.")
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path)
        magic, version = data[:4], cursor.at(4).scalar(4)
        if magic != b"GGUF":
            raise Corrupt(f"{path}: is no GGUF file (it starts with {magic!r}).")
        if version not in (2, 3):
            raise UserError(f"{path}: GGUF version {version}; versions 2 and 3 are read.")
        num_tensors, num_keys = cursor.scalar(10), cursor.scalar(10)
        metadata = {}
        for _ in range(num_keys):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.scalar(4))
        infos = [_tensor_info(cursor) for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise Corrupt(f"{path}: general.alignment is {alignment!r}, not a positive integer.")
        start = -(-cursor.offset // alignment) * alignment
    tensors = {name: _locate(path, name, *info, start, size) for name, *info in infos}
    return GgufFile(path, metadata, tensors)


def _tensor_info(cursor: "_Cursor") -> tuple[str, tuple[int, ...], int, int]:
    name, num_dims = cursor.string(), cursor.scalar(4)
    if num_dims > 4:
        raise Corrupt(f"{cursor.path}: tensor {name!r} claims {num_dims} dims; fetch it again.")
    dims = tuple(cursor.scalar(10) for _ in range(num_dims))
    return name, dims[::-1], cursor.scalar(4), cursor.scalar(10)


def _locate(path, name, shape, kind_id, offset, start, size) -> GgufTensor:
    """Turns a tensor's header entry into absolute bytes and checks that they are in the file."""
    if kind_id not in _KINDS:
        raise UserError(
            f"{path}: tensor {name} has the format of number {kind_id}; formats read:"
            f" {', '.join(BLOCKS)}."
        )
    kind = _KINDS[kind_id]
    block = BLOCKS[kind].values
    if block > 1 and (not shape or shape[-1] % block):
        raise Corrupt(f"{path}: rows of {name} {shape} are no whole {kind} blocks.")
    size_here = num_bytes(kind, shape)
    if start + offset + size_here > size:
        raise Corrupt(
            f"{path}: is cut short: tensor {name} ends at byte {start + offset + size_here},"
            f" the file at {size}; fetch it again."
        )
    return GgufTensor(kind, shape, start + offset, size_here)


class _Cursor:
    """A position in the header; every step is checked against the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.offset = data, path, 0

    def at(self, offset: int) -> "_Cursor":
        self.offset = offset
        return self

    def take(self, size: int) -> bytes:
        end = self.offset + size
        if end > len(self.data):
            raise self.damaged()
        chunk = self.data[self.offset : end]
        self.offset = end
        return chunk

    def scalar(self, kind: int) -> Any:
        code = "<" + _SCALARS[kind]
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.decode([self.take(self.scalar(10))])[0]

    def decode(self, raw: list[bytes]) -> list[str]:
        try:
            return [each.decode("utf-8") for each in raw]
        except UnicodeDecodeError as error:
            raise Corrupt(f"{self.path}: header holds text that is not UTF-8.") from error

    def damaged(self) -> Corrupt:
        return Corrupt(f"{self.path}: header is damaged or cut short; fetch the file again.")

    def strings(self, count: int) -> list[str]:
        """Reads a vocabulary: one loop without calls, for there are 100k strings in it."""
        data, at, size, raw = self.data, self.offset, len(self.data), []
        for _ in range(count):
            start = at + 8
            at = start + int.from_bytes(data[at:start], "little")
            if at > size:
                raise self.damaged()
            raw.append(data[start:at])
        self.offset = at
        return self.decode(raw)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise Corrupt(f"{self.path}: header holds the unknown value type {kind}.")
        return self.scalar(kind)

    def array(self) -> list:
        kind, length = self.scalar(4), self.scalar(10)
        if kind == _STRING:
            return self.strings(length)
        if kind not in _SCALARS:
            raise Corrupt(f"{self.path}: header holds an array of the unknown type {kind}.")
        dtype = np.dtype("<" + _SCALARS[kind])
        return np.frombuffer(self.take(length * dtype.itemsize), dtype).tolist()
