"""SmoothQuant: 8-bit weights and activations, outliers moved from the latter into the former.

After arXiv:2211.10438: s = max|x|^alpha / max|w|^(1 - alpha) a channel. Weights get a scale for
each output, activations one for each token, when they are multiplied.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from internjax.adapt.calibrate import Inputs
from internjax.adapt.folding import FOLDS, fold, matrix, shared
from internjax.adapt.lora import NUM_IN
from internjax.adapt.rounding import round_to_int8
from internjax.errors import UserError
from internjax.tree import Params


@dataclass(frozen=True)
class SmoothConfig:
    """How much of the outliers moves.

    Fields:
      alpha: 0 leaves it all to the activations, 1 to the weights.
    """

    alpha: float = 0.5

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise UserError(f"w8a8.alpha={self.alpha}: it must lie between 0 and 1.")


@partial(jax.jit, static_argnames=("targets", "cfg"))
def smooth_layer(
    layer: Params, inputs: dict[str, Inputs], targets: tuple[str, ...], cfg: SmoothConfig
) -> Params:
    """Rounds the target projections of one layer; norms and other projections take the scales."""
    for names, source in FOLDS:
        chosen = [name for name in names if name in targets]
        if not chosen:
            continue
        most_x = shared(inputs[names[0]].largest, source, layer)
        sizes = [jnp.abs(matrix(layer[name], name)).max(axis=1) for name in chosen]
        most_w = shared(jnp.stack(sizes).max(axis=0), source, layer)
        s = jnp.maximum(most_x, 1e-5) ** cfg.alpha / jnp.maximum(most_w, 1e-5) ** (1 - cfg.alpha)
        # A common factor changes nothing; this one keeps the norms near where they were.
        layer = fold(layer, names, source, s / jnp.exp(jnp.log(s).mean()))
    rounded = {name: round_to_int8(layer[name], NUM_IN[name]) for name in targets}
    return {**layer, **rounded}
