"""Weights in the layout of the CPU kernels."""

import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from internjax.kernels.cpu import tiles as cpu_tiles
from internjax.kernels.cpu.float_matmul import DTYPES, float_matmuls
from internjax.kernels.cpu.matmul import quant_matmuls
from internjax.weights.kinds import PackedFloats, PackedWeight, QuantWeight, ScaledWeight
from internjax.weights.spec import rows_of


def pack(w: QuantWeight, activations: str = "int8") -> PackedWeight:
    """Lays a 4-bit weight out for the CPU kernels; scales and offsets become float16.

    Raises:
      ValueError: the kernels do not serve the group size, or an offset is beyond float16.
    """
    lead, shape = w.values.shape[:-2], (-1, *w.values.shape[-2:])
    columns = w.values.shape[-1]
    values, scales, zeros = (np.asarray(x) for x in (w.values, w.scales, w.zeros))
    groups = scales.shape[-2]
    layers = []
    for codes, steps, zero in zip(
        values.reshape(shape),
        scales.reshape(-1, groups, columns).astype(np.float32),
        zeros.reshape(-1, groups, columns).astype(np.float32),
        strict=True,
    ):
        nibbles = np.stack([codes.T & 15, codes.T >> 4], axis=-1).reshape(columns, -1)
        layers.append(cpu_tiles.pack(nibbles, steps.T, (-zero * steps).T))
    tiles = jnp.asarray(np.stack(layers).reshape(*lead, *layers[0].shape))
    return PackedWeight(tiles, 4, w.in_shape, w.out_shape, None, activations)


def pack_scaled(w: ScaledWeight, activations: str = "int8") -> PackedWeight:
    """Lays an int8 weight out for the CPU kernels; scales become float16.

    Raises:
      ValueError: the kernels do not serve the group size, or a scale is beyond float16.
    """
    lead, shape = w.values.shape[:-2], (-1, *w.values.shape[-2:])
    values, scales = np.asarray(w.values), np.asarray(w.scales, np.float32)
    layers = [
        cpu_tiles.pack(np.ascontiguousarray(codes.T), steps.T)
        for codes, steps in zip(
            values.reshape(shape), scales.reshape(-1, *scales.shape[-2:]), strict=True
        )
    ]
    tiles = jnp.asarray(np.stack(layers).reshape(*lead, *layers[0].shape))
    return PackedWeight(tiles, 8, w.in_shape, w.out_shape, None, activations)


def pack_floats(w: Array, num_in: int, *, lead: int = 0) -> PackedFloats:
    """Lays `[L, *in, *out]` out for the CPU kernels, number for number.

    Args:
      num_in: how many dims are contracted; lead: how many dims of layers come before, 0 or 1.

    Raises:
      ValueError: the kernels do not serve the dtype, see `fits_kernels`.
    """
    if not fits_kernels(w):
        raise ValueError(f"a weight of {w.dtype}; the CPU kernels serve {', '.join(DTYPES)}.")
    dims = w.shape[lead:]
    ins, outs = dims[:num_in], dims[num_in:]
    flat = np.asarray(w).reshape(-1, math.prod(ins), math.prod(outs))
    return PackedFloats(_strips((each.T for each in flat), w.shape[:lead]), ins, outs)


def pack_embedding(w: Array) -> PackedFloats:
    """Lays an embedding `[V, D]` out as its head, D inputs to V outputs."""
    return PackedFloats(jnp.asarray(cpu_tiles.strips(np.asarray(w))), w.shape[1:], w.shape[:1])


def fits_kernels(w: object) -> bool:
    """Whether `w` is an array of floats that the CPU kernels can hold."""
    return getattr(w, "dtype", None) is not None and w.dtype.name in DTYPES


def _strips(matrices: Iterable[np.ndarray], lead: tuple[int, ...]) -> Array:
    laid = np.stack([cpu_tiles.strips(each) for each in matrices])
    return jnp.asarray(laid.reshape(*lead, *laid.shape[1:]))


def alike(w: PackedWeight | PackedFloats) -> tuple:
    """Returns what the packed weights of one call have in common."""
    if isinstance(w, PackedFloats):
        return w.layer, w.in_shape
    return w.bits, w.layer, w.activations, w.in_shape, cpu_tiles.group_of(w.tiles, w.bits)


def packed_einsums(
    specs: Sequence[str], x: Array, ws: Sequence[PackedWeight], dtype
) -> tuple[Array, ...]:
    """Contracts the same activations with weights that are `alike`, by one call of the kernel."""
    lead, rows = rows_of(specs[0], x)
    stacks = [w.tiles[None] if w.layer is None else w.tiles for w in ws]
    outs = quant_matmuls(
        rows,
        stacks,
        ws[0].layer or 0,
        bits=ws[0].bits,
        columns=[math.prod(w.out_shape) for w in ws],
        activations=ws[0].activations,
    )
    return tuple(
        out.astype(dtype).reshape(*lead, *w.out_shape) for out, w in zip(outs, ws, strict=True)
    )


def packed_float_einsums(
    specs: Sequence[str], xs: Sequence[Array], ws: Sequence[PackedFloats], dtype
) -> tuple[Array, ...]:
    """Contracts weights with activations of their own, or with the same ones, by one call."""
    own = list(xs) * len(specs) if len(xs) == 1 else xs
    each = [rows_of(spec, x) for spec, x in zip(specs, own, strict=True)]
    outs = float_matmuls(
        [rows for _, rows in each[: len(xs)]],
        [w.strips[None] if w.layer is None else w.strips for w in ws],
        ws[0].layer or 0,
        columns=[math.prod(w.out_shape) for w in ws],
    )
    return tuple(
        out.astype(dtype).reshape(*lead, *w.out_shape)
        for out, (lead, _), w in zip(outs, each, ws, strict=True)
    )


def unpacked_floats(w: PackedFloats, dtype) -> Array:
    """Expands `[*lead, *in_shape, *out_shape]`; one layer of a stack where it is one."""
    strips = w.strips if w.layer is None else w.strips[w.layer]
    lead, flat = strips.shape[:-3], strips.reshape(-1, *strips.shape[-3:])
    out = jax.vmap(cpu_tiles.columns_side_by_side)(flat)[..., : math.prod(w.out_shape)]
    return out.astype(dtype).reshape(*lead, *w.in_shape, *w.out_shape)


def unpacked(w: PackedWeight, dtype) -> Array:
    """Expands `[*lead, *in_shape, *out_shape]`; one layer of a stack where it is one."""
    tiles = w.tiles if w.layer is None else w.tiles[w.layer]
    lead, flat = tiles.shape[:-3], tiles.reshape(-1, *tiles.shape[-3:])
    each = [cpu_tiles.dequantize(x, w.bits, dtype) for x in flat]
    out = jnp.stack(each)[..., : math.prod(w.out_shape)]
    return out.reshape(*lead, *w.in_shape, *w.out_shape)
