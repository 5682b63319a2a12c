"""The block formats of GGUF, in NumPy: bytes to numbers, and numbers to the formats we write.

A row of a quantized tensor is a sequence of blocks; a block holds 32 or 256 values as small codes
beside their scales. Layouts: ggml's `ggml-common.h`; every sum is taken in float32 in its order, so
the numbers equal llama.cpp's bit for bit. Below, n counts blocks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}


@dataclass(frozen=True)
class Block:
    """A format: its number in file headers, values a block, the block's bytes as named fields."""

    number: int
    values: int
    fields: np.dtype
    decode: Callable[[np.ndarray, np.ndarray], None] | None = None  # fields [n], out [n, values]


def num_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; its rows (the last axis) must be whole blocks."""
    block = BLOCKS[kind]
    return math.prod(shape) // block.values * block.fields.itemsize


def decode(kind: str, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Turns a tensor's uint8 bytes into numbers: as stored for plain formats, else float32."""
    if kind in PLAIN:
        return raw.view(PLAIN[kind]).reshape(shape)
    block = BLOCKS[kind]
    fields = raw.view(block.fields)
    out = np.empty((len(fields), block.values), np.float32)
    step = 2**16 // block.values  # 256 kB of float32: stays in the cache, twice as fast
    for i in range(0, len(fields), step):
        block.decode(fields[i : i + step], out[i : i + step])
    return out.reshape(shape)


INTEGERS = ("Q4_0", "Q4_1", "Q8_0")
"""Formats whose numbers are value * scale + offset, value a whole byte or half of one."""


def integers(
    kind: str, raw: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Reads one of `INTEGERS` without expanding it: values, and float16 scales and offsets.

    Returns: values as `shape`, uint8 0..15 or int8; scales and offsets `[rows, groups of 32]`.
      Q8_0 has no offsets.
    """
    fields = raw.view(BLOCKS[kind].fields).reshape(*shape[:-1], -1)
    if kind == "Q8_0":
        return fields["q"].reshape(shape), fields["d"], None
    values = np.concatenate([fields["q"] & 15, fields["q"] >> 4], axis=-1).reshape(shape)
    offsets = fields["m"] if kind == "Q4_1" else fields["d"] * np.float16(-8)
    return values, fields["d"], offsets


def encode(kind: str, x: np.ndarray) -> np.ndarray:
    """Turns [..., rows of whole blocks] into a plain array or uint8 bytes: `PLAIN`, Q8_0, Q4_1."""
    if kind in PLAIN:
        return x.astype(PLAIN[kind])
    x = x.astype(np.float32).reshape(-1, BLOCKS[kind].values)
    fields = np.empty(len(x), BLOCKS[kind].fields)
    {"Q8_0": _encode_q8_0, "Q4_1": _encode_q4_1}[kind](x, fields)
    return fields.view(np.uint8)


def _encode_q8_0(x: np.ndarray, fields: np.ndarray) -> None:
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    fields["d"] = scale[:, 0]
    fields["q"] = np.rint(_ratio(x, scale))


def _encode_q4_1(x: np.ndarray, fields: np.ndarray) -> None:
    least = x.min(1, keepdims=True)
    scale = (x.max(1, keepdims=True) - least) / np.float32(15)
    fields["d"], fields["m"] = scale[:, 0], least[:, 0]
    codes = np.rint(_ratio(x - least, scale)).astype(np.uint8)
    fields["q"] = codes[:, :16] | codes[:, 16:] << 4


def _ratio(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """x / scale, and 0 where a block is constant."""
    return np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)


def _q8_0(b: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_scale(b["d"]), b["q"], out=out)


def _q4_0(b: np.ndarray, out: np.ndarray) -> None:
    _nibbles(b["q"], out)
    out -= 8
    out *= _scale(b["d"])


def _q4_1(b: np.ndarray, out: np.ndarray) -> None:
    _nibbles(b["q"], out)
    out *= _scale(b["d"])
    out += _scale(b["m"])


def _q5_0(b: np.ndarray, out: np.ndarray) -> None:
    _nibbles(b["q"], out)
    out += _fifth_bits(b["h"])
    out -= 16
    out *= _scale(b["d"])


def _q5_1(b: np.ndarray, out: np.ndarray) -> None:
    _nibbles(b["q"], out)
    out += _fifth_bits(b["h"])
    out *= _scale(b["d"])
    out += _scale(b["m"])


def _q4_k(b: np.ndarray, out: np.ndarray) -> None:
    runs = out.reshape(-1, 8, 32)
    _nibbles(b["q"].reshape(-1, 4, 32), out.reshape(-1, 4, 64))
    _scale_runs(b, runs)


def _q5_k(b: np.ndarray, out: np.ndarray) -> None:
    runs = out.reshape(-1, 8, 32)
    _nibbles(b["q"].reshape(-1, 4, 32), out.reshape(-1, 4, 64))
    bit = np.arange(8, dtype=np.uint8)[:, None]
    runs += (b["h"][:, None] >> bit & 1) << 4  # bit r of byte i belongs to value i of run r
    _scale_runs(b, runs)


def _q6_k(b: np.ndarray, out: np.ndarray) -> None:
    runs = out.reshape(-1, 2, 4, 32)  # two halves of four runs
    low = b["l"].reshape(-1, 2, 2, 32)  # two runs in the low nibbles, two in the high ones
    runs[:, :, :2], runs[:, :, 2:] = low & 15, low >> 4
    shift = np.array([0, 2, 4, 6], np.uint8)[:, None]
    runs += (b["h"].reshape(-1, 2, 1, 32) >> shift & 3) << 4
    runs -= 32
    scales = _scale(b["d"]) * b["scales"]  # one for 16 values
    out.reshape(-1, 16, 16)[...] *= scales[..., None]


def _nibbles(codes: np.ndarray, out: np.ndarray) -> None:
    """Spreads [..., m] bytes over [..., 2m] numbers: first all low halves, then all high ones."""
    half = codes.shape[-1]
    np.bitwise_and(codes, 15, out=out[..., :half], casting="unsafe")
    np.right_shift(codes, 4, out=out[..., half:], casting="unsafe")


def _fifth_bits(h: np.ndarray) -> np.ndarray:
    """[n, 4] bytes -> [n, 32]: 16 where a value's fifth bit is set."""
    return np.unpackbits(h, axis=1, bitorder="little") << 4


def _scale(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)[:, None]


def _scale_runs(b: np.ndarray, runs: np.ndarray) -> None:
    """Applies eight 6-bit scales and minima, packed into 12 bytes, to [n, 8, 32] codes."""
    first, second, rest = np.split(b["scales"], 3, axis=1)  # [n, 4] each
    scales = np.concatenate([first & 63, rest & 15 | first >> 6 << 4], 1)
    least = np.concatenate([second & 63, rest >> 4 | second >> 6 << 4], 1)
    runs *= (_scale(b["d"]) * scales)[..., None]
    runs -= (_scale(b["dmin"]) * least)[..., None]


def _fields(*columns: tuple) -> np.dtype:
    return np.dtype(list(columns))


_D, _M, _Q, _H = ("d", "<f2"), ("m", "<f2"), ("q", "u1", 16), ("h", "u1", 4)
_K = (_D, ("dmin", "<f2"), ("scales", "u1", 12))

BLOCKS = {
    "F32": Block(0, 1, np.dtype("<f4")),
    "F16": Block(1, 1, np.dtype("<f2")),
    "BF16": Block(30, 1, np.dtype(ml_dtypes.bfloat16)),
    "F64": Block(28, 1, np.dtype("<f8")),
    "Q8_0": Block(8, 32, _fields(_D, ("q", "i1", 32)), _q8_0),
    "Q4_0": Block(2, 32, _fields(_D, _Q), _q4_0),
    "Q4_1": Block(3, 32, _fields(_D, _M, _Q), _q4_1),
    "Q5_0": Block(6, 32, _fields(_D, _H, _Q), _q5_0),
    "Q5_1": Block(7, 32, _fields(_D, _M, _H, _Q), _q5_1),
    "Q4_K": Block(12, 256, _fields(*_K, ("q", "u1", 128)), _q4_k),
    "Q5_K": Block(13, 256, _fields(*_K, ("h", "u1", 32), ("q", "u1", 128)), _q5_k),
    "Q6_K": Block(
        14, 256, _fields(("l", "u1", 128), ("h", "u1", 64), ("scales", "i1", 16), _D), _q6_k
    ),
}
