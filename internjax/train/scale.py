"""The loss scale of float16 training: small gradients are lifted into float16's range.

float16 holds nothing below 6e-8; the loss is multiplied by the scale before the backward pass and
the gradients divided by it after. Constants and rules are InternEvo's `DynamicGradScaler`, which
are Megatron-LM's. bfloat16 and float32 need none of this.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool

from internjax.errors import UserError
from internjax.tree import Leaf


@dataclass(frozen=True)
class ScaleConfig:
    """How the scale moves.

    Fields:
      initial, minimum, maximum: of the scale.
      growth, growth_interval: the scale times `growth` after so many finite updates in a row.
      backoff, hysteresis: the scale times `backoff` once `hysteresis` updates were not finite;
        from then on at every such update, until it grows again.
    """

    initial: float = 2.0**16
    minimum: float = 1.0
    maximum: float = 2.0**24
    growth: float = 2.0
    growth_interval: int = 1000
    backoff: float = 0.5
    hysteresis: int = 2

    def __post_init__(self):
        if not 0 < self.minimum <= self.initial <= self.maximum:
            raise UserError(
                f"loss scale: minimum={self.minimum}, initial={self.initial},"
                f" maximum={self.maximum} must be positive and rise in this order."
            )
        if not (self.growth >= 1 and 0 < self.backoff <= 1):
            raise UserError(
                f"loss scale: growth={self.growth} must be at least 1 and backoff={self.backoff}"
                " in (0, 1]."
            )
        if self.growth_interval < 1 or self.hysteresis < 1:
            raise UserError(
                f"loss scale: growth_interval={self.growth_interval} and"
                f" hysteresis={self.hysteresis} count updates: at least 1."
            )


@struct.dataclass
class LossScale:
    """The scale and what its next move depends on.

    Fields:
      value: float32 scalar, the factor on the loss.
      good_steps: int32, finite updates since the last move.
      patience: int32, updates that may still be bad before the scale falls.
    """

    value: Leaf
    good_steps: Leaf
    patience: Leaf


def init_scale(cfg: ScaleConfig) -> LossScale:
    """Starts at `cfg.initial`."""
    return LossScale(jnp.float32(cfg.initial), jnp.int32(0), jnp.int32(cfg.hysteresis))


def adjust(scale: LossScale, finite: Bool[Array, ""], cfg: ScaleConfig) -> LossScale:
    """Returns the scale of the next update, `finite` telling whether this one's gradients were.

    After a bad update: one less patience, and the scale falls when none is left. Patience comes
    back only when the scale grows (as in InternEvo), so a second overflow soon after the first
    counts as the same trouble.
    """
    good = scale.good_steps + 1
    grows = good >= cfg.growth_interval
    after_good = LossScale(
        jnp.where(grows, jnp.minimum(scale.value * cfg.growth, cfg.maximum), scale.value),
        jnp.where(grows, 0, good),
        jnp.where(grows, cfg.hysteresis, scale.patience),
    )
    patience = jnp.maximum(scale.patience - 1, 0)
    lower = jnp.maximum(scale.value * cfg.backoff, cfg.minimum)
    after_bad = LossScale(
        jnp.where(patience <= 0, lower, scale.value), jnp.zeros_like(good), patience
    )
    pick = lambda a, b: jnp.where(finite, a, b)  # noqa: E731
    return LossScale(
        pick(after_good.value, after_bad.value).astype(jnp.float32),
        pick(after_good.good_steps, after_bad.good_steps).astype(jnp.int32),
        pick(after_good.patience, after_bad.patience).astype(jnp.int32),
    )
