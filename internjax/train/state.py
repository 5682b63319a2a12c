"""Everything that training changes, in one record."""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from internjax.train.scale import ScaleConfig, init_scale
from internjax.tree import Leaf, Params


@struct.dataclass
class TrainState:
    """State of a run after `step` updates.

    Fields:
      step: updates done, int32 scalar.
      params: what is trained: the whole model, or the adapter alone.
      opt_state: optax's state for `params`.
      scale: the `LossScale` of a float16 run, else None.
    """

    step: Leaf
    params: Params
    opt_state: Leaf
    scale: Leaf = None


def init_state(
    params: Params, tx: optax.GradientTransformation, scaling: ScaleConfig | None = None
) -> TrainState:
    """Starts a run at step 0; on a mesh the optimizer state lies where its parameters lie."""
    start = jax.jit(lambda params: (jnp.zeros((), jnp.int32), tx.init(params)))
    step, opt_state = start(params)
    return TrainState(step, params, opt_state, scaling and init_scale(scaling))
