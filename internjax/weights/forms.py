"""A weight of one kind as another one."""

import math

import jax.numpy as jnp
from jax import Array

from internjax.kernels.cpu import tiles as cpu_tiles
from internjax.weights.kinds import (
    PACKED,
    Fp8Weight,
    LoraWeight,
    PackedFloats,
    PackedWeight,
    QuantWeight,
    ScaledWeight,
    StackedLora,
    TurnedWeight,
    WatchedWeight,
    Weight,
)
from internjax.weights.packing import (
    fits_kernels,
    pack,
    pack_floats,
    pack_scaled,
    unpacked,
    unpacked_floats,
)
from internjax.weights.turning import unturned


def dequantize(w: QuantWeight, dtype) -> Array:
    """Expands to a plain array `[..., *in_shape, *out_shape]` of `dtype`."""
    *lead, half, out = w.values.shape
    groups = w.scales.shape[-2]
    nibbles = jnp.stack([w.values & 15, w.values >> 4], axis=-2)  # [..., I/2, 2, O]
    steps = nibbles.reshape(*lead, groups, 2 * half // groups, out).astype(dtype)
    zeros, scales = (z.astype(dtype)[..., None, :] for z in (w.zeros, w.scales))
    return ((steps - zeros) * scales).reshape(*lead, *w.in_shape, *w.out_shape)


def unscaled(w: ScaledWeight, dtype) -> Array:
    """Expands to a plain array `[..., *in_shape, *out_shape]` of `dtype`."""
    *lead, rows, out = w.values.shape
    groups = w.scales.shape[-2]
    values = w.values.reshape(*lead, groups, rows // groups, out).astype(dtype)
    return (values * w.scales.astype(dtype)[..., None, :]).reshape(*lead, *w.in_shape, *w.out_shape)


def plain(w: Weight, dtype) -> Array:
    """Returns any kind of weight as one array of `dtype`: adapters merged, integers expanded."""
    if isinstance(w, QuantWeight):
        return dequantize(w, dtype)
    if isinstance(w, ScaledWeight):
        return unscaled(w, dtype)
    if isinstance(w, WatchedWeight):
        return plain(w.base, dtype)
    if isinstance(w, TurnedWeight):
        return unturned(w, dtype)
    if isinstance(w, PackedWeight):
        return unpacked(w, dtype)
    if isinstance(w, PackedFloats):
        return unpacked_floats(w, dtype)
    if isinstance(w, LoraWeight):
        return plain(w.base, dtype) + lora_delta(w, dtype)
    return (w.base if isinstance(w, Fp8Weight) else w).astype(dtype)


def lora_delta(w: LoraWeight, dtype) -> Array:
    """Returns scale * a b, shaped as the base weight."""
    a, b = plain(w.a, dtype), plain(w.b, dtype)
    lead = a.ndim - 1 - _num_in(w)
    shape = (*a.shape[:-1], *b.shape[lead + 1 :])
    a = a.reshape(*a.shape[:lead], -1, a.shape[-1])
    b = b.reshape(*b.shape[: lead + 1], -1)
    return (a @ b).reshape(shape) * jnp.asarray(w.scale, dtype)


def _num_in(w: LoraWeight) -> int:
    """Returns how many dims are contracted: total dims of base are lead + in + out."""
    if isinstance(w.base, LoraWeight):
        return _num_in(w.base)
    if isinstance(w.base, (QuantWeight, ScaledWeight, TurnedWeight, *PACKED)):
        return len(w.base.in_shape)
    # a has lead + in + 1 dims, b lead + 1 + out, base lead + in + out.
    lead = w.a.ndim + w.b.ndim - 2 - w.base.ndim
    return w.a.ndim - 1 - lead


def packed(w: Weight, activations: str, dtype) -> Weight:
    """Returns a weight as decoding on a CPU wants it: integers packed, and adapters beside them.

    Adapters that the kernels cannot take become arrays of `dtype`.

    Integers in groups that the kernels do not serve, and 8-bit floats, are expanded, as plain
    arrays.
    """
    if isinstance(w, PackedWeight):
        return w.replace(activations=activations)
    if isinstance(w, QuantWeight):
        group = math.prod(w.in_shape) // w.scales.shape[-2]
        return plain(w, dtype) if group % cpu_tiles.LANES else pack(w, activations)
    if isinstance(w, ScaledWeight):
        group = math.prod(w.in_shape) // w.scales.shape[-2]
        fits = w.values.dtype == jnp.int8 and group % cpu_tiles.LANES == 0
        return pack_scaled(w, activations) if fits else plain(w, dtype)
    if isinstance(w, LoraWeight):
        base = packed(w.base, activations, dtype)
        if stands_alone(base) and fits_kernels(w.a) and fits_kernels(w.b):
            lead = w.a.ndim - 1 - _num_in(w)
            a, b = pack_floats(w.a, _num_in(w), lead=lead), pack_floats(w.b, 1, lead=lead)
            return w.replace(base=base, a=a, b=b)
        return w.replace(base=base, a=w.a.astype(dtype), b=w.b.astype(dtype))
    return w


def stands_alone(w: Weight) -> bool:
    """Whether no bit of a row's product with `w` depends on the rows beside it."""
    if isinstance(w, LoraWeight):
        return all(stands_alone(x) for x in (w.base, w.a, w.b))
    return isinstance(w, PACKED)


def num_weights(w: Weight) -> int:
    """Counts the numbers that a weight stands for (adapters apart)."""
    if isinstance(w, (LoraWeight, StackedLora)):
        return num_weights(w.base)
    if isinstance(w, QuantWeight):
        return 2 * math.prod(w.values.shape)
    if isinstance(w, (TurnedWeight, ScaledWeight)):
        return math.prod(w.values.shape)
    if isinstance(w, PACKED):
        stack = w.tiles if isinstance(w, PackedWeight) else w.strips
        layers = stack.shape[0] if stack.ndim == 4 and w.layer is None else 1
        return layers * math.prod(w.in_shape) * math.prod(w.out_shape)
    return math.prod(w.shape)
