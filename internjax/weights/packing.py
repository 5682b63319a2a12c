"""Weights in the layout of the CPU kernels."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from internjax.kernels.cpu import tiles as cpu_tiles
from internjax.kernels.cpu.matmul import quant_matmuls
from internjax.weights.kinds import PackedWeight, QuantWeight, ScaledWeight
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


def alike(w: PackedWeight) -> tuple:
    """Returns what the packed weights of one call have in common."""
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


def unpacked(w: PackedWeight, dtype) -> Array:
    """Expands `[*lead, *in_shape, *out_shape]`; one layer of a stack where it is one."""
    tiles = w.tiles if w.layer is None else w.tiles[w.layer]
    lead, flat = tiles.shape[:-3], tiles.reshape(-1, *tiles.shape[-3:])
    each = [cpu_tiles.dequantize(x, w.bits, dtype) for x in flat]
    out = jnp.stack(each)[..., : math.prod(w.out_shape)]
    return out.reshape(*lead, *w.in_shape, *w.out_shape)
