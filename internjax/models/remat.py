"""What the backward pass recomputes instead of keeping: by layer, by a named policy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax import checkpoint_policies as policies

from internjax.errors import UserError
from internjax.kernels.attention import ATTENDED
from internjax.tree import Params
from internjax.weights import GATHERED

type Layer = Callable[[Any, Params], tuple[Any, None]]


@dataclass(frozen=True)
class Remat:
    """How much is recomputed.

    Fields:
      policy: none keeps every activation; dots keeps the results of matrix products and of
        attention and recomputes what lies between; full keeps a layer's input only.
      fraction: share of the layers the policy holds for, the first ones (InternEvo's `checkpoint`);
        the others keep everything.
    """

    policy: Literal["none", "dots", "full"] = "none"
    fraction: float = 1.0

    def __post_init__(self):
        if self.policy not in ("none", "dots", "full"):
            raise UserError(f"remat.policy={self.policy!r}: legal are none, dots, full.")
        if not 0 <= self.fraction <= 1:
            raise UserError(f"remat.fraction={self.fraction}: it is a share of the layers, 0 to 1.")

    def num_layers(self, layers: int) -> int:
        """Layers of `layers` that are recomputed."""
        return 0 if self.policy == "none" else round(self.fraction * layers)


def recomputed(
    layer: Layer, layers: Params, remat: Remat, *, gathered: bool
) -> list[tuple[Layer, Params]]:
    """Cuts stacked layers into the recomputed ones and the others, each with its step for `scan`.

    Args:
      gathered: weights are gathered layer by layer (ZeRO 3): whatever is kept, these are not.
    """
    L = jax.tree.leaves(layers)[0].shape[0]
    first = remat.num_layers(L)
    plain = layer
    if gathered:
        forget = policies.save_anything_except_these_names(GATHERED)
        plain = jax.checkpoint(layer, policy=forget)
    dots = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(ATTENDED)
    )
    policy = dots if remat.policy == "dots" else None
    saved = jax.checkpoint(layer, policy=policy)
    if first in (0, L):
        return [(saved if first else plain, layers)]
    cut = lambda start, end: jax.tree.map(lambda x: x[start:end], layers)  # noqa: E731
    return [(saved, cut(0, first)), (plain, cut(first, L))]
