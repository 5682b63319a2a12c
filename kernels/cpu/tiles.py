"""The layout of weights that the CPU kernels read: tiles of 16 columns x one group of inputs.

A tile is one run of bytes, so that a column block is read as one stream:

* values: 64 bytes for 16 columns x 4 inputs, column by column: what one vpdpbusd multiplies with 4
  broadcast activations. Of 4-bit weights a byte's low half belongs to inputs 8i..8i+3, its high
  half to 8i+4..8i+7;
* 16 float16 scales;
* of 4-bit weights, 16 float16 offsets.

A weight is value * scale + offset, value 0..15 of 4 bits or -128..127 of 8. Letters: O columns,
I inputs, G groups of g inputs, `blocks` of 16 columns (the last one filled up with zeros).

Weights of floats lie in strips of 16 columns, an input after the other, in their own numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float16, Integer, UInt8

LANES = 16


def tile_bytes(bits: int, group: int) -> int:
    """Bytes of one tile."""
    return LANES * group * bits // 8 + (4 if bits == 4 else 2) * LANES


def group_of(tiles: UInt8[Array, "*lead bytes"], bits: int) -> int:
    """Inputs of a group, from the size of a tile."""
    return (tiles.shape[-1] - (4 if bits == 4 else 2) * LANES) * 8 // (LANES * bits)


def check_layout(bits: int, group: int) -> None:
    """Raises ValueError for what the kernels do not serve."""
    if bits not in (4, 8):
        raise ValueError(f"weights of {bits} bits; the CPU kernels serve 4 and 8.")
    if group < LANES or group % LANES:
        raise ValueError(f"groups of {group} inputs; legal are multiples of {LANES}.")


def pack(
    values: Integer[np.ndarray, "O I"],
    scales: Float[np.ndarray, "O G"],
    offsets: Float[np.ndarray, "O G"] | None = None,
) -> UInt8[np.ndarray, "blocks G bytes"]:
    """Packs one weight; with offsets the values are 4-bit, without them int8.

    Scales and offsets are rounded to float16; those of Q4_0, Q4_1 and Q8_0 files are float16.

    Raises:
      ValueError: groups that the kernels do not serve, or a scale beyond float16.
    """
    bits = 8 if offsets is None else 4
    (columns, inputs), groups = values.shape, scales.shape[1]
    group = inputs // groups
    check_layout(bits, group)
    if groups * group != inputs:
        raise ValueError(f"{inputs} inputs in {groups} groups: they must be equal.")
    fill = ((0, -columns % LANES), (0, 0))
    blocks = np.pad(values, fill).reshape(-1, LANES, groups, group // 4, 4).view(np.uint8)
    blocks = blocks.transpose(0, 2, 3, 1, 4)  # [blocks, G, g / 4, 16, 4]
    if bits == 4:
        blocks = blocks[:, :, 0::2] | blocks[:, :, 1::2] << 4
    parts = [np.ascontiguousarray(blocks).reshape(len(blocks), groups, -1)]
    for numbers in (scales,) if offsets is None else (scales, offsets):
        with np.errstate(over="ignore"):
            half = np.pad(numbers, fill).astype(np.float16).reshape(-1, LANES, groups)
        if np.any(np.isinf(half) & np.isfinite(np.pad(numbers, fill).reshape(half.shape))):
            raise ValueError("a scale or offset lies beyond float16 (65,504).")
        parts.append(np.ascontiguousarray(half.transpose(0, 2, 1)).view(np.uint8))
    return np.concatenate(parts, axis=-1)


def unpack(
    tiles: UInt8[Array, "blocks G bytes"], bits: int
) -> tuple[
    Integer[Array, "G g columns"], Float16[Array, "G columns"], Float16[Array, "G columns"] | None
]:
    """Inverse of `pack`, inputs first; the columns that fill up the last block stay."""
    blocks, groups, _ = tiles.shape
    group = group_of(tiles, bits)
    cut = LANES * group * bits // 8
    codes = tiles[..., :cut].reshape(blocks, groups, -1, 1, LANES, 4)
    if bits == 4:
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=3)
    codes = codes.reshape(blocks, groups, group // 4, LANES, 4)
    codes = codes.transpose(1, 2, 4, 0, 3).reshape(groups, group, blocks * LANES)
    halves = lax.bitcast_convert_type(
        tiles[..., cut:].reshape(blocks, groups, -1, LANES, 2), jnp.float16
    )
    halves = halves.transpose(2, 1, 0, 3).reshape(-1, groups, blocks * LANES)
    if bits == 8:
        return lax.bitcast_convert_type(codes, jnp.int8), halves[0], None
    return codes, halves[0], halves[1]


def dequantize(
    tiles: UInt8[Array, "blocks G bytes"], bits: int, dtype
) -> Float[Array, "I columns"]:
    """Expands a packed weight to floats, the columns that fill up the last block too."""
    values, scales, offsets = unpack(tiles, bits)
    floats = values.astype(dtype) * scales.astype(dtype)[:, None]
    if offsets is not None:
        floats = floats + offsets.astype(dtype)[:, None]
    return floats.reshape(-1, floats.shape[-1])


def columns_of(
    tiles: UInt8[Array, "blocks G bytes"], ids: Integer[Array, "*B"], bits: int, dtype
) -> Float[Array, "*B I"]:
    """Looks up single columns: the rows of an embedding that is packed as its head."""
    picked = tiles[ids // LANES].reshape(-1, 1, *tiles.shape[1:])  # [B, 1, G, bytes]
    lanes = (ids % LANES).reshape(-1)
    block = lambda tile, lane: dequantize(tile, bits, dtype)[:, lane]  # noqa: E731
    return jax.vmap(block)(picked, lanes).reshape(*ids.shape, -1)


def strips(rows: Float[np.ndarray, "O I"]) -> Float[np.ndarray, "strips I 16"]:
    """Lays floats out for `float_matmul`, outputs first; zeros fill up the last strip."""
    fill = -len(rows) % LANES
    filled = np.pad(rows, ((0, fill), (0, 0))) if fill else rows
    return np.ascontiguousarray(filled.reshape(-1, LANES, rows.shape[1]).swapaxes(1, 2))


def columns_side_by_side(strips: Float[Array, "strips I 16"]) -> Float[Array, "I columns"]:
    """Inverse of `strips`, inputs first; the columns that fill up the last strip stay."""
    bits = _bits(strips).swapaxes(0, 1).reshape(strips.shape[1], -1)
    return lax.bitcast_convert_type(lax.optimization_barrier(bits), strips.dtype)


def columns_of_strips(
    strips: Float[Array, "strips I 16"], ids: Integer[Array, "*B"]
) -> Float[Array, "*B I"]:
    """Looks up single columns: the rows of an embedding that lies as its head."""
    bits = _bits(strips)[ids // LANES, :, ids % LANES]
    return lax.bitcast_convert_type(lax.optimization_barrier(bits), strips.dtype)


def _bits(x: Float[Array, "*B"]) -> Integer[Array, "*B"]:
    """Floats as integers: XLA moves bfloat16 by way of float32, which loses subnormals."""
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
