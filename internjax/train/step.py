"""One update: gradients over micro-batches, then the optimizer. A pure function to be jitted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from internjax.data.batch import Batch
from internjax.train.state import TrainState
from internjax.tree import Params, global_norm

type LossFn = Callable[[Params, Batch, Any], tuple[Array, dict[str, Array]]]
type Step = Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, micro_batches: int = 1
) -> Step:
    """Makes `step(state, batch, frozen) -> (state, metrics)`; `frozen` goes to the loss as it is.

    With n micro-batches the rows are cut into n parts and their gradients added; every part counts
    by its tokens, so the result is that of the whole batch at once.

    Metrics: loss (nats a counted token), num_tokens, grad_norm (before clipping), finite (whether
    the update was applied: a loss or gradient that is NaN or infinite leaves the state as it was).
    """

    def summed(params: Params, batch: Batch, frozen: Any) -> tuple[Array, dict[str, Array]]:
        _, parts = loss_fn(params, batch, frozen)
        return parts["loss_sum"], parts

    grad_fn = jax.value_and_grad(summed, has_aux=True)

    def gradients(params: Params, batch: Batch, frozen: Any) -> tuple[dict[str, Array], Params]:
        if micro_batches == 1:
            (_, parts), grads = grad_fn(params, batch, frozen)
            return parts, grads
        cut = jax.tree.map(lambda x: _cut(x, micro_batches), batch)

        def add(total: Params, part: Batch):
            (_, parts), grads = grad_fn(params, part, frozen)
            return jax.tree.map(jnp.add, total, grads), parts

        grads, parts = lax.scan(add, jax.tree.map(jnp.zeros_like, params), cut)
        return jax.tree.map(lambda x: x.sum(axis=0), parts), grads

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


def _cut(rows: Array, parts: int) -> Array:
    """Cuts `[B, ...]` to `[parts, B / parts, ...]`; part i takes rows i, i + parts, ...

    So every device of a mesh cuts the rows that it has, and none moves.
    """
    shape = (rows.shape[0] // parts, parts, *rows.shape[1:])
    on_mesh = not jax.sharding.get_abstract_mesh().empty
    spec = jax.typeof(rows).sharding.spec
    out = P(spec[0], None, *spec[1:]) if on_mesh else None
    return jnp.reshape(rows, shape, out_sharding=out).swapaxes(0, 1)
