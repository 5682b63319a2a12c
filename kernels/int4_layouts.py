"""Other programs' 4-bit weights, brought into the layout of `weights.QuantWeight`.

All of them mean w = (q - zero) * scale with 16 steps and one scale for a group of inputs; they
differ in which nibble of which word holds which weight. NumPy: done once, when weights are loaded.
Letters beside the usual: I inputs, O outputs, g inputs of a group.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

# Output that nibble k of an AWQ word holds (llm-awq, awq/quantize/qmodule.py: order_map).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Q4_1_BLOCK, Q4_1_BYTES = 32, 20  # weights and bytes of a block (ggml-common.h, block_q4_1)


class Int4(NamedTuple):
    """The arrays of a QuantWeight.

    Fields:
      values: uint8 `[I/2, O]`; rows 2i and 2i+1 are the low and high nibble of byte row i.
      scales, zeros: `[I/g, O]`; zeros are real numbers in units of a step.
    """

    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray


def from_awq(
    qweight: Int[np.ndarray, "I O8"],
    qzeros: Int[np.ndarray, "groups O8"],
    scales: Float[np.ndarray, "groups O"],
) -> Int4:
    """Converts AWQ's GEMM layout: int32 words of 8 outputs each, nibbles in `AWQ_ORDER`."""
    _check_groups("AWQ", len(qweight), scales)
    q, zeros = (_nibbles(words)[..., np.argsort(AWQ_ORDER)] for words in (qweight, qzeros))
    flat = lambda x: x.reshape(len(x), -1)  # noqa: E731
    return Int4(pack_rows(flat(q)), scales, flat(zeros).astype(scales.dtype))


def from_gptq(
    qweight: Int[np.ndarray, "I8 O"],
    qzeros: Int[np.ndarray, "groups O8"],
    scales: Float[np.ndarray, "groups O"],
    g_idx: Int[np.ndarray, " I"] | None = None,
    *,
    zeros_less_one: bool = True,
) -> Int4:
    """Converts GPTQ's layout: int32 words of 8 inputs, zeros in words of 8 outputs, both in order.

    Args:
      g_idx: group of every input; only ascending equal groups are served ("act order" is not).
      zeros_less_one: zeros are stored less one ("gptq", AutoGPTQ's format; "gptq_v2" does not).
    """
    I = 8 * len(qweight)
    _check_groups("GPTQ", I, scales)
    group = I // len(scales)
    if g_idx is not None and not np.array_equal(g_idx, np.arange(I) // group):
        raise ValueError(
            f"GPTQ: g_idx sorts inputs by activation; only groups of {group} inputs in ascending"
            " order are served: quantize with desc_act=False."
        )
    q = _nibbles(qweight).transpose(0, 2, 1).reshape(I, -1)
    zeros = _nibbles(qzeros).reshape(len(qzeros), -1).astype(np.int32)
    zeros = (zeros + 1) & 15 if zeros_less_one else zeros
    return Int4(pack_rows(q), scales, zeros.astype(scales.dtype))


def from_q4_1(blocks: UInt8[np.ndarray, "O bytes"]) -> Int4:
    """Converts rows of GGUF's Q4_1 blocks: float16 d and m, then 16 bytes; w = d q + m.

    The low nibbles are weights 0..15 of a block, the high ones 16..31. A block of equal weights
    has d = 0: it becomes scale |m| and zero -sign(m).
    """
    rows, length = blocks.shape
    if length % Q4_1_BYTES:
        raise ValueError(
            f"Q4_1: a row has {length} bytes; legal are multiples of {Q4_1_BYTES} (one block of"
            f" {Q4_1_BLOCK} weights)."
        )
    parts = blocks.reshape(rows, -1, Q4_1_BYTES)
    d, m = np.ascontiguousarray(parts[..., :4]).view(np.float16).astype(np.float32).T[:2]
    data = parts[..., 4:]
    q = np.concatenate([data & 15, data >> 4], axis=-1).reshape(rows, -1)
    flat = d == 0
    scales = np.where(flat, np.abs(m), d)
    zeros = np.divide(-m, d, out=-np.sign(m), where=~flat)
    q = np.where(np.repeat(flat.T, Q4_1_BLOCK, axis=1), 0, q)
    return Int4(pack_rows(q.T.astype(np.uint8)), scales, zeros)


def pack_rows(q: UInt8[np.ndarray, "I O"]) -> UInt8[np.ndarray, "half O"]:
    """Packs two inputs a byte, the even one into the low nibble."""
    return q[0::2] | q[1::2] << 4


def _nibbles(words: np.ndarray) -> np.ndarray:
    """Returns the 8 nibbles of every word in a last dim, the lowest first."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return (words.astype(np.uint32)[..., None] >> shifts & 15).astype(np.uint8)


def _check_groups(name: str, inputs: int, scales: np.ndarray) -> None:
    if inputs % len(scales):
        raise ValueError(
            f"{name}: {inputs} inputs in {len(scales)} groups; legal are equal groups: scales have"
            " the shape [inputs / group, outputs]."
        )
