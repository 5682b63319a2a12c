"""Adam whose two moments are kept in 8 bits (arXiv:2110.02861): 2 bytes a parameter, not 8.

A moment is cut into blocks of at most 256 neighbours; each block stores its largest magnitude in
float32 and one byte a number, an index into a table of 256 values spaced by orders of magnitude.
Blocks lie inside the trailing dims of a leaf, so leading dims (layers, model dim) may be sharded
and a layer may be cut from a stack. Leaves of fewer than 4096 numbers stay in float32.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, UInt8

from internjax.tree import Leaf

BLOCK = 256
MIN_SIZE = 4096


@struct.dataclass
class Quantized:
    """A tensor in 8 bits.

    Fields:
      codes: uint8, the shape of the tensor: indices into the table.
      scales: float32 `[*lead, blocks]`, the largest magnitude of each block.
    """

    codes: Leaf
    scales: Leaf


class Adam8State(NamedTuple):
    """State of `scale_by_adam8`: updates done, first and second moments."""

    count: Leaf
    mu: Any
    nu: Any


def dynamic_table(*, signed: bool) -> np.ndarray:
    """Makes the dynamic 8-bit code: 256 rising float32 values in [-1, 1] or [0, 1].

    Every decade up to 1, seven of them, holds twice as many values as the one below, each the
    middle of an equal part of [0.1, 1] (the paper's section 1.3; the signed code gives one bit to
    the sign). Unlike the paper's, the unsigned code has no 0: a second moment rounded to 0 under
    a first moment that is not would make a step of first / eps.
    """
    values = [0.0 if signed else 1e-7, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = np.linspace(0.1, 1.0, count + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)
        values += [*middles, *-middles] if signed else [*middles]
    return np.sort(np.array(values)).astype(np.float32)


def nearest(unit: Float[Array, "..."], *, signed: bool) -> Float[Array, "..."]:
    """Returns the index of the nearest value of the table, by arithmetic.

    A search through the table would hold two 32-bit bounds for each number of a leaf.
    """
    table = dynamic_table(signed=signed).astype(np.float64)
    first = 128 if signed else 1  # of the values of the lowest decade
    magnitude = jnp.abs(unit)
    code = jnp.full_like(unit, first - 1)
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        border = (table[first - 1] + table[first]) / 2  # to the decade below
        place = (magnitude * 10.0 ** (6 - decade) - 0.1) * (count / 0.9)
        inside = first + jnp.clip(jnp.floor(place), 0, count - 1)
        code = jnp.where(magnitude >= border, inside, code)
        first += count
    code = jnp.where(magnitude >= (table[254] + 1) / 2, 255.0, code)
    # Negative values mirror the positive ones around 0, which is 127; there is no -1.
    return jnp.where(unit < 0, jnp.maximum(254 - code, 0), code) if signed else code


def block_shape(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """Returns (leading dims, blocks, block size): how a tensor is cut.

    The trailing dims that together hold at least 256 numbers are cut into equal blocks, the last
    filled up: 576 numbers are three blocks of 192.
    """
    trailing, dims = 1, len(shape)
    while dims and trailing < BLOCK:
        dims -= 1
        trailing *= shape[dims]
    blocks = math.ceil(trailing / BLOCK)
    return shape[:dims], blocks, math.ceil(trailing / blocks)


def quantize(x: Float[Array, "..."], table: np.ndarray) -> Quantized:
    """Rounds every number of `x` to the nearest value of the table times its block's scale."""
    lead, blocks, size = block_shape(x.shape)
    rows = x.reshape(*lead, -1).astype(jnp.float32)
    trailing = rows.shape[-1]
    fill = [(0, 0)] * len(lead) + [(0, blocks * size - trailing)]
    rows = jnp.pad(rows, fill).reshape(*lead, blocks, size)
    scales = jnp.max(jnp.abs(rows), axis=-1)
    unit = rows / jnp.where(scales == 0, 1, scales)[..., None]
    codes = nearest(unit, signed=bool(table[0] < 0)).astype(jnp.uint8)
    return Quantized(codes.reshape(*lead, -1)[..., :trailing].reshape(x.shape), scales)


def dequantize(q: Quantized, table: np.ndarray) -> Float[Array, "..."]:
    """Inverse of `quantize`, in float32."""
    codes: UInt8[Array, "..."] = q.codes
    lead, blocks, size = block_shape(codes.shape)
    unit = jnp.asarray(table)[codes.astype(jnp.int32)].reshape(*lead, -1)
    trailing = unit.shape[-1]
    scales = jnp.broadcast_to(q.scales[..., None], (*lead, blocks, size)).reshape(*lead, -1)
    return (unit * scales[..., :trailing]).reshape(codes.shape)


def scale_by_adam8(b1: float, b2_at: Callable[[Any], Array], eps: float):
    """Makes Adam's scaling with 8-bit moments; `b2_at(updates done)` is the b2 of an update.

    The moments are read, moved on and rounded again in every update; what is done between is
    float32 and the same as `optax.scale_by_adam`.
    """
    signed, unsigned = dynamic_table(signed=True), dynamic_table(signed=False)

    def init(params: Any) -> Adam8State:
        moment = lambda p: _zeros(p, signed)  # noqa: E731
        power = lambda p: _zeros(p, unsigned)  # noqa: E731
        return Adam8State(
            jnp.zeros((), jnp.int32), jax.tree.map(moment, params), jax.tree.map(power, params)
        )

    def moved(grad, mu, nu, count):
        b2 = b2_at(count).astype(jnp.float32)
        wide = grad.astype(jnp.float32)
        first = b1 * _read(mu, signed) + (1 - b1) * wide
        second = b2 * _read(nu, unsigned) + (1 - b2) * wide * wide
        done = (count + 1).astype(jnp.float32)
        first_hat, second_hat = first / (1 - b1**done), second / (1 - b2**done)
        update = (first_hat / (jnp.sqrt(second_hat) + eps)).astype(grad.dtype)
        return update, _write(mu, first, signed), _write(nu, second, unsigned)

    def update(grads: Any, state: Adam8State, params: Any = None):
        leaves, treedef = jax.tree.flatten(grads)
        pairs = zip(leaves, treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu))
        done = [_sharded(moved)(g, mu, nu, state.count) for g, mu, nu in pairs]
        updates, mu, nu = (treedef.unflatten(list(part)) for part in zip(*done))
        return updates, Adam8State(state.count + 1, mu, nu)

    return optax.GradientTransformation(init, update)


def _sharded(moved: Callable) -> Callable:
    """On a mesh of explicit axes lets the compiler cut blocks across shards; outputs as inputs."""

    def call(grad, mu, nu, count):
        if jax.sharding.get_abstract_mesh().empty:
            return moved(grad, mu, nu, count)
        out = jax.tree.map(lambda x: jax.typeof(x).sharding, (grad, mu, nu))
        return jax.sharding.auto_axes(moved, out_sharding=out)(grad, mu, nu, count)

    return call


def _zeros(param: Array, table: np.ndarray) -> Quantized | Array:
    if param.size < MIN_SIZE:
        return jnp.zeros_like(param, dtype=jnp.float32)
    codes = jnp.full_like(param, int(np.argmin(np.abs(table))), dtype=jnp.uint8)
    lead, blocks, _ = block_shape(param.shape)
    sharding = getattr(jax.typeof(param), "sharding", None)
    where = None
    if isinstance(sharding, NamedSharding) and not sharding.mesh.empty:
        where = NamedSharding(sharding.mesh, P(*sharding.spec[: len(lead)], None))
    return Quantized(codes, jnp.zeros((*lead, blocks), jnp.float32, device=where))


def _read(stored: Quantized | Array, table: np.ndarray) -> Array:
    return dequantize(stored, table) if isinstance(stored, Quantized) else stored


def _write(like: Quantized | Array, value: Array, table: np.ndarray) -> Quantized | Array:
    return quantize(value, table) if isinstance(like, Quantized) else value
