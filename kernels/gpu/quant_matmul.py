"""Matrix products with quantized weights: int4 and int8 under bfloat16, int8 x int8, fp8 x fp8.

A `Matrix` is a quantized weight in the order that Hopper's tensor cores take it, made once from
other layouts (`from_int4`, `to_int8`, `to_fp8`). `reference` says in plain jnp what is computed.
Letters beside the usual: I inputs, O outputs, T groups of inputs that share a scale.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from internjax.kernels.gpu.scaled_matmul import (
    Scaling,
    Tiles,
    choose_tiles,
    group_sums,
    scaled_matmul,
)
from internjax.kernels.gpu.wgmma import bits
from internjax.kernels.platform import choose, not_for_hopper

E4M3 = jnp.float8_e4m3fn
BLOCK = 128  # inputs (and outputs) of a block with a scale of its own, in fp8 (arXiv:2412.19437)
GROUPS = (32, 64, 128)
KINDS = {  # dtype of the weights -> dtypes that activations may be rounded to, the first by default
    "int4": ("bfloat16",),
    "int8": ("bfloat16", "int8"),
    "float8_e4m3fn": ("float8_e4m3fn",),
}


class Matrix(NamedTuple):
    """A quantized matrix: w[i, o] = (values[o, i] - zeros[t, o]) * scales[t, o], i in group t.

    Fields:
      values: `[*E, O, I]`, int4, int8 or float8_e4m3fn. int4 is stored less 8, and where there are
        zeros they are meant for what was stored less 8: 0 to 15.
      scales: `[*E, T, O]`; T is 1 (a scale an output) or I / group.
      zeros: `[*E, T, O]` or None (symmetric).
    """

    values: Any
    scales: Any
    zeros: Any = None


def from_int4(
    values: UInt8[Array, "*E half O"], scales: Float[Array, "*E T O"], zeros: Float[Array, "*E T O"]
) -> Matrix:
    """Turns the arrays of a `weights.QuantWeight` round; every number stays as it was."""
    nibbles = jnp.stack([values & 15, values >> 4], axis=-2)
    q = nibbles.reshape(*values.shape[:-2], -1, values.shape[-1]).swapaxes(-1, -2)
    return Matrix((q.astype(jnp.int8) - 8).astype(jnp.int4), scales, zeros)


def to_int8(w: Float[Array, "*E I O"]) -> Matrix:
    """Rounds to 127 steps on either side of zero, with one scale an output."""
    wide = w.astype(jnp.float32)
    scales = jnp.maximum(jnp.abs(wide).max(axis=-2, keepdims=True) / 127, 1e-12)
    return Matrix(jnp.round(wide / scales).astype(jnp.int8).swapaxes(-1, -2), scales)


def to_fp8(w: Float[Array, "*E I O"], *, block: int | None = None) -> Matrix:
    """Rounds to e4m3 with one scale for all, or one for each `BLOCK` x `BLOCK` weights.

    Args:
      block: None or 128.
    """
    if block not in (None, BLOCK):
        raise ValueError(f"fp8: block={block}; legal are None and {BLOCK}.")
    *lead, I, O = w.shape
    size_i, size_o = (block, block) if block else (I, O)
    if I % size_i or O % size_o:
        raise ValueError(f"fp8: {I} x {O} weights; legal are multiples of block={block}.")
    cut = w.astype(jnp.float32).reshape(*lead, I // size_i, size_i, O // size_o, size_o)
    largest = jnp.abs(cut).max(axis=(-3, -1), keepdims=True)
    scales = jnp.maximum(largest / jnp.finfo(E4M3).max.astype(jnp.float32), 1e-12)
    values = (cut / scales).astype(E4M3).reshape(w.shape).swapaxes(-1, -2)
    scales = jnp.repeat(scales.reshape(*lead, I // size_i, O // size_o), size_o, axis=-1)
    return Matrix(values, scales)


def quant_matmul(
    x: Float[Array, "*B I"],
    w: Matrix,
    *,
    activations: str | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> Float[Array, "*B O"]:
    """Multiplies by a quantized matrix, in the dtype of x; sums are float32 or int32.

    Differentiable in x (the gradient passes the expanded weights, and rounding as if it were not
    there); the weights are constants.

    Args:
      activations: what x is rounded to, as in `KINDS`: int8 with a scale a token, fp8 with a scale
        a token and group of the weights.
      implementation: None, "xla" or "pallas".
      interpret: `plgpu.InterpretGPUParams`, to run the Hopper kernel on a CPU.
    """
    kind = jnp.dtype(w.values.dtype).name
    if kind not in KINDS:
        raise ValueError(f"quant_matmul: weights of {kind}; legal are {', '.join(KINDS)}.")
    activations = activations or KINDS[kind][0]
    if activations not in KINDS[kind]:
        legal = ", ".join(KINDS[kind])
        raise ValueError(f"quant_matmul: activations={activations!r} with {kind}: legal: {legal}.")
    (O, I), T = w.values.shape[-2:], w.scales.shape[-2]
    if w.values.ndim != 2 or x.shape[-1] != I or w.scales.shape != (T, O) or I % T:
        raise ValueError(
            f"quant_matmul: x {x.shape}, values {w.values.shape}, scales {w.scales.shape}; legal"
            " are [..., I], [O, I] and [T, O] with T a divisor of I."
        )
    if activations == "int8" and (T != 1 or w.zeros is not None):
        raise ValueError(
            f"quant_matmul: int8 activations with {T} groups"
            f"{'' if w.zeros is None else ' and zeros'}; legal is one scale an output, symmetric."
        )
    served = {"xla": None, "pallas": why_not(x, w) or not_for_hopper(interpret)}
    best = "xla" if served["pallas"] else "pallas"
    chosen = choose("quant_matmul", implementation, served, best=best)
    if chosen == "xla" or not math.prod(x.shape[:-1]):
        return reference(x, w, activations=activations)
    y = _product(x.reshape(-1, I), w, activations, interpret)
    return y.reshape(*x.shape[:-1], O)


def why_not(x: Array, w: Matrix) -> str | None:
    """Says what the Hopper kernel does not serve in these arrays, or None."""
    (O, I), T = w.values.shape[-2:], w.scales.shape[-2]
    if x.dtype != jnp.bfloat16:
        return f"x is {x.dtype}; legal is bfloat16."
    if O % 64 or I % 128:
        return f"{I} inputs and {O} outputs; legal are multiples of 128 and of 64."
    if T != 1 and I // T not in GROUPS:
        return f"groups of {I // T} inputs; legal are {GROUPS} and one group of all {I}."
    if bits(w.values) == 8 and T != 1 and I // T != BLOCK and w.values.dtype == E4M3:
        return f"fp8 groups of {I // T} inputs; legal are {BLOCK} and one group of all {I}."
    return None


def reference(x: Float[Array, "*B I"], w: Matrix, *, activations: str) -> Float[Array, "*B O"]:
    """Says in plain jnp what `quant_matmul` computes."""
    T = w.scales.shape[-2]
    if activations == "int8":
        q, scale = activation_scales(x, 1, jnp.int8)
        y = jnp.einsum("...I,OI->...O", q, w.values, preferred_element_type=jnp.int32)
        # A scale an output comes after the sum, as in the kernel; groups are not served here.
        wide = y.astype(jnp.float32) * _like(w.scales[0], y) * scale
        return wide.astype(x.dtype)
    if activations == "float8_e4m3fn":
        q, scale = activation_scales(x, T, E4M3)
        wide = q.astype(jnp.float32) * jnp.repeat(scale, x.shape[-1] // T, axis=-1)
        return (wide @ expand(w, jnp.float32)).astype(x.dtype)
    y = jnp.matmul(x, expand(w, x.dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def expand(w: Matrix, dtype) -> Float[Array, "*E I O"]:
    """Returns the plain weights, computed in float32."""
    groups = w.scales.shape[-2]
    wide = w.values.astype(jnp.float32).swapaxes(-1, -2)
    cut = wide.reshape(*wide.shape[:-2], groups, -1, wide.shape[-1])
    if w.zeros is not None:
        cut = cut - (w.zeros.astype(jnp.float32)[..., None, :] - _less(w))
    return (cut * w.scales.astype(jnp.float32)[..., None, :]).reshape(wide.shape).astype(dtype)


def _less(w: Matrix) -> float:
    """What was taken off the values when they were stored."""
    return 8.0 if bits(w.values) == 4 else 0.0


def _like(v: Array, y: Array) -> Array:
    return v.reshape((1,) * (y.ndim - v.ndim) + v.shape).astype(jnp.float32)


def activation_scales(x: Float[Array, "*B I"], T: int, dtype) -> tuple[Array, Float[Array, "*B T"]]:
    """Rounds x to 8 bits with one scale a token and group; the scale brings the values back."""
    cut = x.astype(jnp.float32).reshape(*x.shape[:-1], T, -1)
    whole = dtype == jnp.int8
    most = 127.0 if whole else float(jnp.finfo(dtype).max)
    scale = jnp.maximum(jnp.abs(cut).max(axis=-1, keepdims=True) / most, 1e-12)
    values = jnp.round(cut / scale) if whole else cut / scale
    return values.astype(dtype).reshape(x.shape), scale[..., 0]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Array, w: Matrix, activations: str, interpret: Any) -> Array:
    M = len(x)
    T = len(w.scales)
    tiles = tiles_of(M, w, activations)
    padded = jnp.pad(x, ((0, -M % tiles.tokens), (0, 0)))
    col = sums = None
    if activations != "bfloat16":
        padded, scale = activation_scales(
            padded, T if activations != "int8" else 1, jnp.dtype(activations)
        )
        col = scale.T
    elif w.zeros is not None and (tiles.warpgroups == 1 or T == 1):
        sums = group_sums(padded, T, tiles)
    lead = lambda v: None if v is None else v[None]  # noqa: E731
    y = scaled_matmul(
        padded,
        w.values[None],
        Scaling(lead(w.scales), lead(w.zeros), col, sums),
        out_dtype=x.dtype,
        tiles=tiles,
        name=f"quant_matmul_{w.values.dtype}_{activations}",
        interpret=interpret,
    )
    return y[:M]


def tiles_of(tokens: int, w: Matrix, activations: str) -> Tiles:
    """The tiles of a product with so many tokens."""
    O, I = w.values.shape[-2:]
    return choose_tiles(
        tokens,
        O,
        I,
        bits=(jax.dtypes.itemsize_bits(jnp.dtype(activations)), bits(w.values)),
        promotes=w.values.dtype == E4M3,
    )


def _product_forward(x: Array, w: Matrix, activations: str, interpret: Any):
    return _product(x, w, activations, interpret), w


def _product_backward(activations: str, interpret: Any, w: Matrix, g: Array):
    del activations, interpret
    return lax.dot_general(g, expand(w, g.dtype), (((1,), (1,)), ((), ()))), None


_product.defvjp(_product_forward, _product_backward)
