"""Safetensors files and sharded sets of them, tensor by tensor (format: huggingface/safetensors).

Reads and writes with plain file calls, so that one tensor is in memory at a time, every dtype
survives bit for bit (bfloat16, float8), and a file cut short is an error instead of a bus error.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from internjax.errors import Corrupt, Missing
from internjax.models.layouts import Tensor

_MAX_HEADER = 10**8  # the format's own limit
SHARD_BYTES = 5 * 10**9  # what Hugging Face's own exporter uses
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_CODES = {np.dtype(v): k for k, v in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in which file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """Reads the tensor from disk into memory of its own."""
        count = int(np.prod(self.shape, dtype=np.int64))
        raw = np.fromfile(self.path, np.uint8, count * self.dtype.itemsize, offset=self.offset)
        if raw.size != count * self.dtype.itemsize:
            raise Corrupt(f"{self.path}: is cut short; fetch it again.")
        return raw.view(self.dtype).reshape(self.shape)


def open_tensors(folder: Path, stem: str) -> dict[str, Stored]:
    """Lists the tensors of `stem.safetensors`, or of the shards in `stem.safetensors.index.json`.

    Raises: Missing when neither is there or a shard lacks, Corrupt when one is damaged.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise Corrupt(f"{index}: lacks weight_map; fetch it again.")
        tensors: dict[str, Stored] = {}
        for shard in sorted(set(weight_map.values())):
            tensors |= read_header(folder / Path(shard).name)
        lost = sorted(set(weight_map) - set(tensors))
        if lost:
            raise Corrupt(f"{index}: {len(lost)} tensors are in no shard, first {lost[0]}.")
        return tensors
    if single.is_file():
        return read_header(single)
    raise Missing(f"{folder}: has neither {single.name} nor {index.name}.")


def read_header(path: Path) -> dict[str, Stored]:
    """Reads and checks the header of one safetensors file."""
    if not path.is_file():
        raise Missing(f"{path}: no such file; the checkpoint is incomplete, fetch it again.")
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise Corrupt(f"{path}: is no whole safetensors file; fetch it again.")
        raw = f.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _stored(path, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{path}: header is damaged ({error}); fetch it again.") from error
    for name, tensor in tensors.items():
        end = tensor.offset + int(np.prod(tensor.shape, dtype=object)) * tensor.dtype.itemsize
        if end > size:
            raise Corrupt(
                f"{path}: is cut short: tensor {name} ends at byte {end}, the file at {size};"
                " fetch it again."
            )
    return tensors


def write_tensors(folder: Path, stem: str, tensors: list[Tensor], shard_bytes: int) -> None:
    """Writes one file, or shards of at most `shard_bytes` with their index, tensor by tensor.

    A tensor that is larger gets a shard of its own.
    """
    shards = _plan(tensors, shard_bytes)
    if len(shards) == 1:
        _write_file(folder / f"{stem}.safetensors", shards[0])
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard)
        weight_map |= {t.name: name for t in shard}
    total = sum(_bytes(t) for t in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path = folder / f"{stem}.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _plan(tensors: Iterable[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + _bytes(tensor) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += _bytes(tensor)
    return shards


def _write_file(path: Path, tensors: list[Tensor]) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offset = 0
    for t in tensors:
        span = [offset, offset + _bytes(t)]
        header[t.name] = {"dtype": _CODES[t.dtype], "shape": list(t.shape), "data_offsets": span}
        offset = span[1]
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the data start aligned
    with path.open("wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        for t in tensors:
            f.write(np.ascontiguousarray(t.make()).view(np.uint8).data)


def _bytes(t: Tensor) -> int:
    return int(np.prod(t.shape, dtype=np.int64)) * t.dtype.itemsize


def _stored(path: Path, entry: dict, start: int) -> Stored:
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(int(n) for n in entry["shape"])
    begin, end = entry["data_offsets"]
    if (
        min((0, begin, *shape)) < 0
        or end - begin != int(np.prod(shape, dtype=object)) * dtype.itemsize
    ):
        raise ValueError("offsets and shape disagree")
    return Stored(path, dtype, shape, start + begin)


def read_json(path: Path) -> dict:
    """Parses a JSON object that belongs to a checkpoint."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Corrupt(f"{path}: is no JSON ({error}); fetch it again.") from error
    if not isinstance(value, dict):
        raise Corrupt(f"{path}: is no JSON object; fetch it again.")
    return value
