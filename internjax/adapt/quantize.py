"""Int4 of a parameter tree: round-to-nearest by groups, plus what rounding lost at low rank.

Rounding alone forgets small changes: weights that came from a 4-bit file lie on its grid, and an
adapter moves nearly all of them by less than half a step, so a merged model rounds back to it.
The low-rank residual keeps what was learned (LQER, arXiv:2402.02446; LoftQ, arXiv:2310.08659).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from internjax.adapt.lora import NUM_IN, check_targets
from internjax.errors import UserError
from internjax.tree import Params
from internjax.weights import LoraWeight, QuantWeight, dequantize

STEPS = 15


@dataclass(frozen=True)
class QuantConfig:
    """How weights are rounded.

    Fields:
      group: weights that share a scale and a zero, along the contracted dims.
      rank: of the float16 residual beside the integers; 0 leaves it out.
      targets: projections that are rounded; embedding, head and norms stay.
    """

    group: int = 32
    rank: int = 64
    targets: tuple[str, ...] = tuple(NUM_IN)


def quantize_array(w: Float[Array, "*S"], num_in: int, group: int, *, lead: int = 0) -> QuantWeight:
    """Rounds `[*lead, *in, *out]` to 16 steps between the minimum and maximum of every group."""
    dims = w.shape[lead:]
    ins, outs = dims[:num_in], dims[num_in:]
    flat = w.reshape(*w.shape[:lead], math.prod(ins), math.prod(outs)).astype(jnp.float32)
    rows, columns = flat.shape[-2:]
    if rows % group or group % 2:
        raise UserError(
            f"group={group} does not cut the {rows} inputs of a weight {tuple(dims)} evenly (and"
            " must be even): choose a divisor, for example 32 or 64."
        )
    groups = flat.reshape(*flat.shape[:-2], rows // group, group, columns)
    low, high = groups.min(axis=-2), groups.max(axis=-2)
    # The floor keeps a group of equal weights finite: its zero must fit float16.
    floor = jnp.maximum(jnp.abs(low) / 2**14, 1e-7)
    scales = jnp.maximum((high - low) / STEPS, floor).astype(jnp.float16)
    zeros = (-low / scales.astype(jnp.float32)).astype(jnp.float16)
    wide = lambda x: x.astype(jnp.float32)[..., None, :]  # noqa: E731
    steps = jnp.clip(jnp.round(groups / wide(scales) + wide(zeros)), 0, STEPS)
    steps = steps.astype(jnp.uint8).reshape(*flat.shape[:-2], rows // 2, 2, columns)
    values = steps[..., 0, :] | (steps[..., 1, :] << 4)
    return QuantWeight(values, scales, zeros, tuple(ins), tuple(outs))


def quantize(params: Params, cfg: QuantConfig) -> Params:
    """Returns the tree with rounded weights for the target projections of stacked layers."""
    layers = dict(params["layers"])
    check_targets(cfg.targets, layers, "the model")
    for name in cfg.targets:
        if isinstance(layers[name], (LoraWeight, QuantWeight)):
            raise UserError(f"layers/{name} is no plain array: merge adapters before quantizing.")
        rounded = quantize_array(layers[name], NUM_IN[name], cfg.group, lead=1)
        layers[name] = _with_residual(layers[name], rounded, cfg.rank) if cfg.rank else rounded
    return {**params, "layers": layers}


def _with_residual(w: Float[Array, "L *S"], rounded: QuantWeight, rank: int) -> LoraWeight:
    """Returns the rounded weight with the best rank-`rank` part of its error beside it."""
    ins, outs = rounded.in_shape, rounded.out_shape
    error = (w - dequantize(rounded, w.dtype)).reshape(len(w), math.prod(ins), math.prod(outs))
    a, b = jax.jit(_low_rank, static_argnums=1)(error.astype(jnp.float32), rank)
    a, b = a.astype(jnp.float16), b.astype(jnp.float16)
    return LoraWeight(
        rounded, a.reshape(len(w), *ins, -1), b.reshape(len(w), b.shape[1], *outs), scale=1.0
    )


def _low_rank(error: Float[Array, "L I O"], rank: int) -> tuple[Array, Array]:
    """Returns a `[L, I, R]` with orthonormal columns and b `[L, R, O]`, a b close to the error.

    Randomized subspace iteration (arXiv:0909.4061, algorithm 4.4), with a fixed key.
    """
    L, I, O = error.shape
    probe = jax.random.normal(jax.random.key(0), (L, O, min(rank, I, O)), error.dtype)
    a, _ = jnp.linalg.qr(error @ probe)
    for _ in range(1):
        across, _ = jnp.linalg.qr(error.swapaxes(1, 2) @ a)
        a, _ = jnp.linalg.qr(error @ across)
    return a, a.swapaxes(1, 2) @ error
