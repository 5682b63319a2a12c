"""AWQ: 4-bit integers that spare the channels whose activations are large (arXiv:2306.00978).

Per set of projections with common inputs a scale of the channels is searched, then, if asked for,
per group and output how far the ends of the grid may be pulled in. Both minimise the error of the
projections' outputs, of which the inputs' Gram matrix tells all: |x (w - w')|^2 =
tr((w - w')^T x^T x (w - w')).
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from internjax.adapt.calibrate import Inputs
from internjax.adapt.folding import FOLDS, fold, matrix, shared, spread
from internjax.adapt.lora import NUM_IN
from internjax.adapt.rounding import codes_on, grouped, integer_grid, quant_weight, values_of
from internjax.errors import UserError
from internjax.tree import Params
from internjax.weights import QuantWeight

SAMPLED = 256  # outputs of a projection, at most, on which scales are tried


@dataclass(frozen=True)
class AwqConfig:
    """The search.

    Fields:
      steps: exponents tried for the scales, 0 to 1; 0 leaves the weights unscaled.
      clip: whether the ends of the grids are searched, from 1 to 0.5 of the largest weight. Off,
        against the paper: here it did harm as often as good, see docs/en/quantize.md.
    """

    steps: int = 20
    clip: bool = False

    def __post_init__(self):
        if self.steps < 0:
            raise UserError(f"awq.steps={self.steps}: legal are 0 and more.")


@partial(jax.jit, static_argnames=("targets", "group", "cfg"))
def awq_layer(
    layer: Params,
    inputs: dict[str, Inputs],
    targets: tuple[str, ...],
    group: int,
    cfg: AwqConfig,
) -> Params:
    """Rounds the target projections of one layer; norms and other projections take the scales."""
    grams = {name: x.gram for name, x in inputs.items()}
    for names, source in FOLDS:
        if cfg.steps and any(name in targets for name in names):
            s = _search(layer, names, source, inputs[names[0]], targets, group, cfg.steps)
            layer = fold(layer, names, source, s)
            every = spread(s, source, layer)
            grams |= {name: grams[name] / (every[:, None] * every[None]) for name in names}
    rounded = {name: _rounded(layer[name], name, grams[name], group, cfg.clip) for name in targets}
    return {**layer, **rounded}


def _search(
    layer: Params,
    names: tuple[str, ...],
    source: str,
    seen: Inputs,
    targets: Collection[str],
    group: int,
    steps: int,
) -> Float[Array, " C"]:
    """Returns the scales of the source's channels with the least error of the outputs."""
    chosen = [matrix(layer[name], name) for name in names if name in targets]
    # Every output has grids of its own, so some of them tell what the others would.
    weights = [w[:, :: -(-w.shape[1] // SAMPLED)] for w in chosen]
    mean_x = jnp.maximum(shared(seen.mean, source, layer), 1e-8)
    relative = [_relative(w, group) for w in chosen]
    mean_w = shared(jnp.stack(relative).mean(axis=0), source, layer)

    def candidate(exponent: Array) -> Array:
        s = jnp.maximum(mean_x**exponent / (mean_w ** (1 - exponent) + 1e-4), 1e-4)
        return s / jnp.sqrt(s.max() * s.min())

    def error(s: Array) -> Array:
        every = spread(s, source, layer)[:, None]
        gram = seen.gram
        gaps = [_round_trip(w * every, group) / every - w for w in weights]
        return sum(((gram @ gap) * gap).sum() for gap in gaps)

    tried = jax.vmap(candidate)(jnp.arange(steps) / steps)
    tried = jnp.concatenate([jnp.ones_like(tried[:1]), tried])  # never worse than no scales
    return tried[jnp.argmin(lax.map(error, tried))]


def _relative(w: Float[Array, "I O"], group: int) -> Float[Array, " I"]:
    """Mean size of every input's weights, each beside the largest of its group."""
    groups, _, _ = grouped(jnp.abs(w), 1, group)
    return (groups / (groups.max(axis=1, keepdims=True) + 1e-8)).mean(axis=-1).reshape(-1)


def _round_trip(w: Float[Array, "I O"], group: int) -> Float[Array, "I O"]:
    groups, _, _ = grouped(w, 1, group)
    grid = integer_grid(groups.min(axis=1), groups.max(axis=1))
    return values_of(codes_on(groups, *grid), *grid).reshape(w.shape)


def _rounded(w: Array, name: str, gram: Float[Array, "I I"], group: int, clip: bool) -> QuantWeight:
    """Rounds one projection, the ends of each grid where the group's own error is least."""
    groups, ins, outs = grouped(w, NUM_IN[name], group)
    low, high = groups.min(axis=1), groups.max(axis=1)
    G, g, _ = groups.shape
    own = gram.reshape(G, g, G, g)[jnp.arange(G), :, jnp.arange(G)]  # [G, g, g]

    def error(ratio: Array) -> Array:
        grid = integer_grid(low * ratio, high * ratio)
        gap = values_of(codes_on(groups, *grid), *grid) - groups
        return (jnp.einsum("Gij,GjO->GiO", own, gap) * gap).sum(axis=1)

    ratios = 1 - jnp.arange(11 if clip else 1) / 20
    best = ratios[jnp.argmin(lax.map(error, ratios), axis=0)]  # [G, O]
    grid = integer_grid(low * best, high * best)
    return quant_weight(codes_on(groups, *grid), *grid, ins, outs)
