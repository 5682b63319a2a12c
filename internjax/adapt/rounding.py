"""Rounding of weights to 4-bit integers by groups, and to 8 bits by columns or groups.

Knows arrays only: no model, no data. Letters: I inputs, O outputs, g inputs of a group, G groups.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from internjax.errors import UserError
from internjax.weights import QuantWeight, ScaledWeight

STEPS = 15


def quantize_array(w: Float[Array, "*S"], num_in: int, group: int, *, lead: int = 0) -> QuantWeight:
    """Rounds `[*lead, *in, *out]` to 16 steps between the minimum and maximum of every group."""
    groups, ins, outs = grouped(w, num_in, group, lead=lead)
    low, high = groups.min(axis=-2), groups.max(axis=-2)
    # The floor keeps a group of equal weights finite: its zero must fit float16.
    floor = jnp.maximum(jnp.abs(low) / 2**14, 1e-7)
    scales = jnp.maximum((high - low) / STEPS, floor).astype(jnp.float16)
    zeros = (-low / scales.astype(jnp.float32)).astype(jnp.float16)
    return quant_weight(codes_on(groups, scales, zeros), scales, zeros, ins, outs)


def grouped(
    w: Float[Array, "*S"], num_in: int, group: int, *, lead: int = 0
) -> tuple[Float[Array, "*lead G g O"], tuple[int, ...], tuple[int, ...]]:
    """Cuts the inputs of a weight into groups, float32; returns the shapes of in and out, too.

    Raises: UserError: the group does not divide the inputs, or is odd.
    """
    dims = w.shape[lead:]
    ins, outs = tuple(dims[:num_in]), tuple(dims[num_in:])
    rows = math.prod(ins)
    if rows % group or group % 2:
        raise UserError(
            f"group={group} does not cut the {rows} inputs of a weight {tuple(dims)} evenly (and"
            " must be even): choose a divisor, for example 32 or 64."
        )
    shape = (*w.shape[:lead], rows // group, group, math.prod(outs))
    return w.reshape(shape).astype(jnp.float32), ins, outs


def integer_grid(
    low: Float[Array, "*S"], high: Float[Array, "*S"]
) -> tuple[Float[Array, "*S"], Float[Array, "*S"]]:
    """Returns float16 scales and whole zeros of the 16 steps from low to high.

    scale = (high - low) / 15, at least 1e-5, and zero = -round(low / scale), as AWQ and GPTQ
    checkpoints have them. Two deviations: 0 always lies on the grid (without it a group of positive
    weights would saturate), and a zero is 1..15, never 0, which GPTQ's first format (zero - 1)
    cannot say.
    """
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    scales = jnp.maximum((high - low) / STEPS, 1e-5).astype(jnp.float16)
    zeros = jnp.clip(jnp.round(-low / scales.astype(jnp.float32)), 1, STEPS)
    return scales, zeros.astype(jnp.float16)


def codes_on(
    groups: Float[Array, "*lead G g O"],
    scales: Float[Array, "*lead G O"],
    zeros: Float[Array, "*lead G O"],
) -> UInt8[Array, "*lead G g O"]:
    """Rounds to the nearest of the 16 steps of every group."""
    steps = groups / _wide(scales) + _wide(zeros)
    return jnp.clip(jnp.round(steps), 0, STEPS).astype(jnp.uint8)


def values_of(
    codes: UInt8[Array, "*lead G g O"],
    scales: Float[Array, "*lead G O"],
    zeros: Float[Array, "*lead G O"],
) -> Float[Array, "*lead G g O"]:
    """Returns the float32 weights that codes stand for."""
    return (codes.astype(jnp.float32) - _wide(zeros)) * _wide(scales)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)[..., None, :]


def quant_weight(
    codes: UInt8[Array, "*lead G g O"],
    scales: Float[Array, "*lead G O"],
    zeros: Float[Array, "*lead G O"],
    ins: tuple[int, ...],
    outs: tuple[int, ...],
) -> QuantWeight:
    """Packs codes of 0..15, two in a byte."""
    *lead, groups, group, columns = codes.shape
    pairs = codes.reshape(*lead, groups * group // 2, 2, columns)
    values = pairs[..., 0, :] | (pairs[..., 1, :] << 4)
    return QuantWeight(values, scales, zeros, ins, outs)


def round_to_int8(w: Float[Array, "*S"], num_in: int, *, lead: int = 0) -> ScaledWeight:
    """Rounds `[*lead, *in, *out]` to int8, symmetric, a scale for each output.

    Scales are float16, as the CPU kernels want them.
    """
    columns, ins, outs = grouped(w, num_in, math.prod(w.shape[lead : lead + num_in]), lead=lead)
    scales = jnp.maximum(jnp.abs(columns).max(axis=-2) / 127, 1e-7).astype(jnp.float16)
    values = jnp.clip(jnp.round(columns / _wide(scales)), -127, 127).astype(jnp.int8)
    return ScaledWeight(values[..., 0, :, :], scales, ins, outs)


def round_to_fp8(
    w: Float[Array, "*S"], num_in: int, group: int | None, *, lead: int = 0
) -> ScaledWeight:
    """Rounds to e4m3 (arXiv:2209.05433); the largest of an output, or group, becomes 448.

    Args:
      group: inputs that share a scale; None: all of an output.
    """
    whole = math.prod(w.shape[lead : lead + num_in])
    groups, ins, outs = grouped(w, num_in, group or whole, lead=lead)
    largest = float(jnp.finfo(jnp.float8_e4m3fn).max)
    scales = jnp.maximum(jnp.abs(groups).max(axis=-2) / largest, 1e-30)
    # Divided first, so that the division's own rounding cannot pass the largest number.
    values = jnp.clip(groups / _wide(scales), -largest, largest).astype(jnp.float8_e4m3fn)
    *kept, count, size, columns = values.shape
    return ScaledWeight(values.reshape(*kept, count * size, columns), scales, ins, outs)
