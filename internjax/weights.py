"""Kinds of weights and the one function that tells them apart.

The model calls `einsum(spec, x, w)` and `take(w, ids)`; whether `w` is an array, carries a LoRA
adapter or is quantized is decided here and nowhere else, so the model has no branch for either.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from internjax.collectives import Parallel
from internjax.kernels.fp8 import fp8_matmul
from internjax.tree import Leaf, wide

GATHERED = "gathered"  # name of weights that ZeRO 3 gathered


@struct.dataclass
class LoraWeight:
    """A weight with a low-rank correction: x w + scale * (x a) b (arXiv:2106.09685).

    Fields:
      base: array, QuantWeight or another LoraWeight, `[..., in, out]`.
      a: `[..., in, R]`; b: `[..., R, out]`; with in and out the dims of the einsum it serves.
      scale: alpha / rank.
    """

    base: Leaf
    a: Leaf
    b: Leaf
    scale: float = struct.field(pytree_node=False)


@struct.dataclass
class QuantWeight:
    """Group-wise asymmetric 4-bit integers: w = (values - zeros) * scales.

    The contracted dims are flattened to I, the others to O; groups of g follow each other in I.

    Fields:
      values: uint8 `[..., I/2, O]`; rows 2i and 2i+1 are the low and high nibble of byte row i.
      scales: `[..., I/g, O]`; zeros: `[..., I/g, O]`, real numbers in units of a step.
      in_shape, out_shape: natural shapes of I and O, for example (D,) and (N, H).
    """

    values: Leaf
    scales: Leaf
    zeros: Leaf
    in_shape: tuple[int, ...] = struct.field(pytree_node=False)
    out_shape: tuple[int, ...] = struct.field(pytree_node=False)


@struct.dataclass
class Fp8Weight:
    """A plain weight whose products are made in 8-bit floating point (`kernels/fp8.py`)."""

    base: Leaf


type Weight = Array | LoraWeight | QuantWeight | Fp8Weight


def dequantize(w: QuantWeight, dtype) -> Array:
    """Expands to a plain array `[..., *in_shape, *out_shape]` of `dtype`."""
    *lead, half, out = w.values.shape
    groups = w.scales.shape[-2]
    nibbles = jnp.stack([w.values & 15, w.values >> 4], axis=-2)  # [..., I/2, 2, O]
    steps = nibbles.reshape(*lead, groups, 2 * half // groups, out).astype(dtype)
    zeros, scales = (z.astype(dtype)[..., None, :] for z in (w.zeros, w.scales))
    return ((steps - zeros) * scales).reshape(*lead, *w.in_shape, *w.out_shape)


def plain(w: Weight, dtype) -> Array:
    """Returns any kind of weight as one array of `dtype`: adapters merged, integers expanded."""
    if isinstance(w, QuantWeight):
        return dequantize(w, dtype)
    if isinstance(w, LoraWeight):
        return plain(w.base, dtype) + lora_delta(w, dtype)
    return (w.base if isinstance(w, Fp8Weight) else w).astype(dtype)


def lora_delta(w: LoraWeight, dtype) -> Array:
    """Returns scale * a b, shaped as the base weight."""
    lead = w.a.ndim - 1 - _num_in(w)
    a = w.a.astype(dtype).reshape(*w.a.shape[:lead], -1, w.a.shape[-1])
    b = w.b.astype(dtype).reshape(*w.b.shape[: lead + 1], -1)
    shape = (*w.a.shape[:-1], *w.b.shape[lead + 1 :])
    return (a @ b).reshape(shape) * jnp.asarray(w.scale, dtype)


def _num_in(w: LoraWeight) -> int:
    """Returns how many dims are contracted: total dims of base are lead + in + out."""
    if isinstance(w.base, LoraWeight):
        return _num_in(w.base)
    if isinstance(w.base, QuantWeight):
        return len(w.base.in_shape)
    # a has lead + in + 1 dims, b lead + 1 + out, base lead + in + out.
    lead = w.a.ndim + w.b.ndim - 2 - w.base.ndim
    return w.a.ndim - 1 - lead


def einsum(spec: str, x: Array, w: Weight, *, widened: bool = False) -> Array:
    """Contracts activations with a weight of any kind, in the dtype of the activations.

    Args:
      spec: as in `jnp.einsum`, for example "BTD,DNH->BTNH"; the letters of `w` that the result
        lacks are its input dims and must come first in it.
      widened: the result keeps the float32 of its sums, as in `wide_matmul`.
    """
    if isinstance(w, LoraWeight):
        lhs, rhs, result = _split(spec)
        inner = "".join(c for c in rhs if c not in result)
        outer = "".join(c for c in rhs if c in result)
        kept = "".join(c for c in lhs if c not in inner)
        low = jnp.einsum(f"{lhs},{inner}R->{kept}R", x, w.a.astype(x.dtype))
        delta = jnp.einsum(f"{kept}R,R{outer}->{result}", low, w.b.astype(x.dtype))
        delta = delta * jnp.asarray(w.scale, x.dtype)
        base = einsum(spec, x, w.base, widened=widened)
        return base + delta.astype(base.dtype)
    matmul = fp8_matmul if isinstance(w, Fp8Weight) else wide_matmul if widened else jnp.matmul
    product = lambda x, w: _contract(spec, x, plain(w, x.dtype), matmul)  # noqa: E731
    # Integers are expanded again for the backward pass: a layer's expanded weights, kept from its
    # forward pass, are the largest temporaries of QLoRA.
    return jax.checkpoint(product)(x, w) if isinstance(w, QuantWeight) else product(x, w)


@jax.custom_vjp
def wide_matmul(x: Float[Array, "M D"], w: Float[Array, "D V"]) -> Float[Array, "M V"]:
    """Returns x w in at least float32; its backward products are made in the dtype of `x`.

    Left to itself the transpose of a widening product multiplies in float32, for which XLA holds a
    float32 copy of `w`: 1.4 GiB for InternLM2-7B's head.
    """
    return jnp.matmul(x, w, preferred_element_type=wide(x.dtype))


def _wide_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return wide_matmul(x, w), (x, w)


def _wide_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = kept
    g = g.astype(x.dtype)
    return g @ w.T, (x.T @ g).astype(w.dtype)


wide_matmul.defvjp(_wide_forward, _wide_backward)


def _contract(spec: str, x: Array, w: Array, matmul: Callable[[Array, Array], Array]) -> Array:
    """Multiplies as one plain matrix product.

    XLA's CPU backend takes nearly twice the time for the backward pass of a feed-forward block with
    the rows in two dims (2,048 x 576 x 1,536, float32, 2 cores: 224 ms, flat 126 ms).
    """
    lhs, rhs, result = _split(spec)
    num_in = sum(c not in result for c in rhs)
    if lhs[-num_in:] != rhs[:num_in] or result != lhs[:-num_in] + rhs[num_in:]:
        raise ValueError(f"einsum {spec!r}: the input dims come last in x and first in w.")
    lead, out = x.shape[: x.ndim - num_in], w.shape[num_in:]
    rows = x.reshape(math.prod(lead), -1)
    return matmul(rows, w.reshape(rows.shape[1], -1)).reshape(*lead, *out)


def _split(spec: str) -> tuple[str, str, str]:
    operands, result = spec.split("->")
    lhs, rhs = operands.split(",")
    return lhs, rhs, result


def gather(w: Weight, dim: int, par: Parallel) -> Weight:
    """Gathers a layer's weight whose dim `dim` is cut over `par.fsdp` (ZeRO 3); else returns it.

    The result carries a name, so that a policy can forget it instead of keeping it for the backward
    pass.
    """
    if par.fsdp is None:
        return w
    if isinstance(w, Fp8Weight):
        return Fp8Weight(gather(w.base, dim, par))
    if not isinstance(w, Array):
        raise TypeError(f"ZeRO stage 3 gathers plain arrays, not {type(w).__name__}.")
    return checkpoint_name(lax.all_gather(w, par.fsdp, axis=dim, tiled=True), GATHERED)


def take(w: Float[Array, "V D"], ids: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
    """Looks up rows of an embedding."""
    return w[ids].astype(dtype)


def num_weights(w: Weight) -> int:
    """Counts the numbers that a weight stands for (adapters apart)."""
    if isinstance(w, LoraWeight):
        return num_weights(w.base)
    if isinstance(w, QuantWeight):
        return 2 * math.prod(w.values.shape)
    return math.prod(w.shape)
