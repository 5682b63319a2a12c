"""The key-value head of a GGUF file as a dict, without looking at its tensors.

Format: ggml-org/ggml docs/gguf.md, versions 2 and 3, little endian. The file is untrusted: every
length is checked against what is left of it.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from internjax.errors import Corrupt, Missing

_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"} | {
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Returns every key of the file's head; arrays of numbers are NumPy arrays, of text lists.

    Raises:
        Missing: there is no such file.
        Corrupt: it is not GGUF, is cut short, or holds text that is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise Missing(f"{path} is not a file: give the path of a GGUF model.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise Corrupt(f"{path} is not a GGUF file: it does not begin with the letters GGUF.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read_head(data)
            except (struct.error, UnicodeDecodeError, ValueError) as error:
                raise Corrupt(
                    f"{path} is damaged or cut short ({error}): download it again."
                ) from error


def _read_head(data: mmap.mmap) -> dict[str, Any]:
    version, _, count = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version}; versions 2 and 3 are read")
    metadata, at = {}, 24
    for _ in range(count):
        key, at = _read_string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        metadata[key], at = _read_value(data, at + 4, kind)
    return metadata


def _read_value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _read_string(data, at)
    if kind == _ARRAY:
        item_kind, count = struct.unpack_from("<IQ", data, at)
        return _read_array(data, at + 12, item_kind, count)
    values, at = _read_numbers(data, at, kind, 1)
    return values[0].item(), at


def _read_array(data: mmap.mmap, at: int, kind: int, count: int) -> tuple[Any, int]:
    if kind in _SCALARS:
        return _read_numbers(data, at, kind, count)
    if kind != _STRING:
        raise ValueError(f"an array of kind {kind} at byte {at}")
    strings = []
    for _ in range(count):
        text, at = _read_string(data, at)
        strings.append(text)
    return strings, at


def _read_numbers(data: mmap.mmap, at: int, kind: int, count: int) -> tuple[np.ndarray, int]:
    if kind not in _SCALARS:
        raise ValueError(f"a value of kind {kind} at byte {at}")
    dtype = np.dtype(_SCALARS[kind])
    end = at + count * dtype.itemsize
    if end > len(data):
        raise ValueError(f"{count} numbers at byte {at} end after the file")
    return np.frombuffer(data[at:end], dtype), end


def _read_string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    if end > len(data):
        raise ValueError(f"a text of {length} bytes at byte {at} ends after the file")
    return data[at + 8 : end].decode("utf-8"), end
