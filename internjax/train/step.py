"""One update: gradients, then the optimizer. A pure function to be jitted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from internjax.data.batch import Batch
from internjax.train.gradients import Gradients
from internjax.train.state import TrainState
from internjax.tree import global_norm

type Step = Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, Array]]]


def make_train_step(gradients: Gradients, tx: optax.GradientTransformation) -> Step:
    """Makes `step(state, batch, frozen) -> (state, metrics)`; `frozen` goes to the loss as it is.

    Metrics: loss (nats a counted token), num_tokens, grad_norm (before clipping), finite (whether
    the update was applied: a loss or gradient that is NaN or infinite leaves the state as it was).
    """

    def step(
        state: TrainState, batch: Batch, frozen: Any = None
    ) -> tuple[TrainState, dict[str, Array]]:
        parts, grads = gradients(state.params, batch, frozen)
        count = jnp.maximum(parts["num_tokens"], 1)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        loss, norm = parts["loss_sum"] / count, global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        new = new.replace(step=state.step + 1)
        metrics = {"loss": loss, "num_tokens": parts["num_tokens"], "grad_norm": norm}
        return new, metrics | {"finite": finite}

    return step
