"""Products with weights of any kind: the one place that tells them apart."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from internjax.collectives import Parallel
from internjax.kernels.cpu import tiles as cpu_tiles
from internjax.kernels.cpu.matmul import round_rows
from internjax.kernels.fp8 import fp8_matmul
from internjax.tree import wide
from internjax.weights.forms import plain
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
from internjax.weights.packing import alike, packed_einsums, packed_float_einsums
from internjax.weights.spec import rows_of, split_spec
from internjax.weights.turning import on_tensor_cores, turned_einsum

GATHERED = "gathered"  # name of weights that ZeRO 3 gathered


def einsum(spec: str, x: Array, w: Weight, *, widened: bool = False) -> Array:
    """Contracts activations with a weight of any kind, in the dtype of the activations.

    Args:
      spec: as in `jnp.einsum`, for example "BTD,DNH->BTNH"; the letters of `w` that the result
        lacks are its input dims and must come first in it.
      widened: the result keeps the float32 of its sums, as in `wide_matmul`.
    """
    if isinstance(w, (LoraWeight, StackedLora)):
        return _corrected(spec, x, w, einsum(spec, x, w.base, widened=widened))
    if isinstance(w, PACKED):
        (out,) = _packed((spec,), x, (w,), wide(x.dtype) if widened else x.dtype)
        return out
    if isinstance(w, WatchedWeight):
        w.see(x)
        return einsum(spec, x, w.base, widened=widened)
    if isinstance(w, ScaledWeight) and w.values.dtype == jnp.int8:
        return _scaled_einsum(spec, x, w, wide(x.dtype) if widened else x.dtype)
    if isinstance(w, (QuantWeight, TurnedWeight)) and not widened and on_tensor_cores(x, w):
        # Nothing but `w` is kept for the backward pass: it is turned again there.
        return jax.checkpoint(partial(turned_einsum, spec))(x, w)
    matmul = fp8_matmul if isinstance(w, Fp8Weight) else wide_matmul if widened else jnp.matmul
    product = lambda x, w: _contract(spec, x, plain(w, x.dtype), matmul)  # noqa: E731
    # Integers are expanded again for the backward pass: a layer's expanded weights, kept from its
    # forward pass, are the largest temporaries of QLoRA.
    expands = isinstance(w, (QuantWeight, TurnedWeight, ScaledWeight))
    return jax.checkpoint(product)(x, w) if expands else product(x, w)


def einsums(specs: Sequence[str], x: Array, ws: Sequence[Weight]) -> tuple[Array, ...]:
    """Contracts the same activations with several weights; see `einsum`.

    Packed weights that are alike share one call of the CPU kernel: small calls side by side are
    handed from thread to thread, which takes longer than they do.
    """
    corrected = (LoraWeight, StackedLora)
    if any(isinstance(w, corrected) for w in ws):
        bases = einsums(specs, x, [w.base if isinstance(w, corrected) else w for w in ws])
        if all(_by_kernels(w) for w in ws) and len({alike(w.a) for w in ws}) == 1:
            return _adapted_by_kernels(specs, x, ws, bases)
        return tuple(
            _corrected(spec, x, w, base) if isinstance(w, corrected) else base
            for spec, w, base in zip(specs, ws, bases, strict=True)
        )
    for kind in PACKED:
        if all(isinstance(w, kind) for w in ws) and len({alike(w) for w in ws}) == 1:
            return _packed(specs, x, ws, x.dtype)
    return tuple(einsum(spec, x, w) for spec, w in zip(specs, ws, strict=True))


def _packed(specs: Sequence[str], x: Array, ws: Sequence[Weight], dtype) -> tuple[Array, ...]:
    if isinstance(ws[0], PackedFloats):
        return packed_float_einsums(specs, (x,), ws, dtype)
    return packed_einsums(specs, x, ws, dtype)


def _scaled_einsum(spec: str, x: Array, w: ScaledWeight, dtype) -> Array:
    """Rounds activations to int8 by rows and groups; products of integers, sums in float32."""
    lead, rows = rows_of(spec, x)
    groups, columns = w.scales.shape
    q, steps = round_rows(rows.astype(jnp.float32).reshape(len(rows), groups, -1))
    values = w.values.reshape(groups, -1, columns)
    dots = jnp.einsum("MGi,GiO->GMO", q, values, preferred_element_type=jnp.int32)
    factors = steps.T[..., None] * w.scales.astype(jnp.float32)[:, None]
    out = (dots.astype(jnp.float32) * factors).sum(axis=0)
    return out.astype(dtype).reshape(*lead, *w.out_shape)


def _corrected(spec: str, x: Array, w: LoraWeight | StackedLora, base: Array) -> Array:
    if isinstance(w, LoraWeight):
        return _adapted(spec, x, w, base)
    if w.chosen is None:
        return base
    return base + _chosen_delta(spec, x, w).astype(base.dtype).reshape(base.shape)


def _chosen_delta(spec: str, x: Array, w: StackedLora) -> Array:
    """Returns the correction that each sequence chose, `[B, T, O]`; 0 where it chose none.

    With fewer sequences than corrections each takes its own; else all corrections are two plain
    products and what was not chosen is masked between them: copies of a correction for every
    sequence would be more to read than the corrections.
    """
    _, rows = rows_of(spec, x)
    sequences, (count, rank) = x.shape[0], w.b.shape[:2]
    chosen = jnp.broadcast_to(w.chosen, (sequences,))
    rows = rows.reshape(sequences, -1, rows.shape[-1])  # [B, T, I]
    a = w.a.astype(x.dtype).reshape(rows.shape[-1], count, rank)
    b = w.b.astype(x.dtype).reshape(count, rank, -1)
    if sequences < count:
        own = jnp.maximum(chosen, 0)
        low = jnp.einsum("BTI,IBR->BTR", rows, a[:, own])
        delta = jnp.einsum("BTR,BRO->BTO", low, b[own])
        return jnp.where((chosen >= 0)[:, None, None], delta, 0)
    low = jnp.einsum("BTI,IAR->BTAR", rows, a)
    taken = chosen[:, None] == jnp.arange(count, dtype=chosen.dtype)[None, :]
    low = jnp.where(taken[:, None, :, None], low, 0)
    return jnp.einsum("BTAR,ARO->BTO", low, b)


def _adapted(spec: str, x: Array, w: LoraWeight, base: Array) -> Array:
    """Adds the low-rank correction to the product with the base weight."""
    if _by_kernels(w):
        (out,) = _adapted_by_kernels((spec,), x, (w,), (base,))
        return out
    down, up = _low_rank_specs(spec)
    delta = jnp.einsum(up, jnp.einsum(down, x, w.a.astype(x.dtype)), w.b.astype(x.dtype))
    return base + (delta * jnp.asarray(w.scale, x.dtype)).astype(base.dtype)


def _by_kernels(w: Weight) -> bool:
    return isinstance(w, LoraWeight) and isinstance(w.a, PackedFloats)


def _adapted_by_kernels(
    specs: Sequence[str], x: Array, ws: Sequence[LoraWeight], bases: Sequence[Array]
) -> tuple[Array, ...]:
    """Adds the corrections of weights side by side by two calls; float32 between the factors."""
    downs, ups = zip(*(_low_rank_specs(spec) for spec in specs), strict=True)
    lows = packed_float_einsums(downs, (x,), [w.a for w in ws], jnp.float32)
    deltas = packed_float_einsums(ups, lows, [w.b for w in ws], jnp.float32)
    return tuple(
        base + (delta * jnp.float32(w.scale)).astype(base.dtype)
        for base, delta, w in zip(bases, deltas, ws, strict=True)
    )


def _low_rank_specs(spec: str) -> tuple[str, str]:
    """Returns the specs of the products with the two factors of a correction."""
    lhs, rhs, result = split_spec(spec)
    inner = "".join(c for c in rhs if c not in result)
    outer = "".join(c for c in rhs if c in result)
    kept = "".join(c for c in lhs if c not in inner)
    return f"{lhs},{inner}R->{kept}R", f"{kept}R,R{outer}->{result}"


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
    lead, rows = rows_of(spec, x)
    out = w.shape[x.ndim - len(lead) :]
    return matmul(rows, w.reshape(rows.shape[1], -1)).reshape(*lead, *out)


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


def take(w: Weight, ids: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
    """Looks up rows of an embedding `[V, D]`; a packed one lies as its head, D inputs to V."""
    if isinstance(w, PackedWeight):
        return cpu_tiles.columns_of(w.tiles, ids, w.bits, jnp.float32).astype(dtype)
    if isinstance(w, PackedFloats):
        return cpu_tiles.columns_of_strips(w.strips, ids).astype(dtype)
    return w[ids].astype(dtype)


def transposed(w: Weight) -> Weight:
    """Returns an embedding as the head it is where the two are tied."""
    return w if isinstance(w, PACKED) else w.T
