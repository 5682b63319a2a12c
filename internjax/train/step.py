"""One update: gradients, then the optimizer. A pure function to be jitted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from internjax.data.batch import Batch
from internjax.train.gradients import Gradients
from internjax.train.scale import ScaleConfig, adjust
from internjax.train.state import TrainState
from internjax.tree import global_norm

type Step = Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    gradients: Gradients, tx: optax.GradientTransformation, *, scaling: ScaleConfig | None = None
) -> Step:
    """Makes `step(state, batch, frozen) -> (state, metrics)`; `frozen` goes to the loss as it is.

    Args:
      scaling: of the loss of float16 training; `state.scale` must hold a `LossScale` then.

    Metrics: loss (nats a counted token), num_tokens, grad_norm (before clipping), finite (whether
    the update was applied: a loss or gradient that is NaN or infinite leaves the state as it was),
    loss_scale where there is one, and what else the loss counts.
    """

    def step(
        state: TrainState, batch: Batch, frozen: Any = None
    ) -> tuple[TrainState, dict[str, Array]]:
        factor = jnp.float32(1)
        if scaling is not None:
            # Tokens that count otherwise than 1 scale the loss, and the mean undoes it: with these
            # the gradients are those of the mean loss times the scale.
            factor = state.scale.value / jnp.maximum(jnp.sum(batch.loss_mask), 1)
            batch = batch.replace(loss_mask=batch.loss_mask * factor)
        parts, grads = gradients(state.params, batch, frozen)
        count = jnp.maximum(parts["num_tokens"], factor.astype(parts["num_tokens"].dtype))
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        loss, norm = parts["loss_sum"] / count, global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new = (optax.apply_updates(state.params, updates), opt_state)
        old = (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics = {k: v / factor.astype(v.dtype) for k, v in parts.items() if k != "loss_sum"}
        metrics |= {"loss": loss, "grad_norm": norm, "finite": finite}
        scale = state.scale
        if scaling is not None:
            metrics["loss_scale"] = scale.value
            scale = adjust(scale, finite, scaling)
        return TrainState(state.step + 1, params, opt_state, scale), metrics

    return step
