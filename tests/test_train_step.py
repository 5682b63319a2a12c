"""One update: micro-batches change nothing, a bad gradient changes nothing either."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from internjax.models.decoder import init_params
from internjax.train.gradients import make_gradients
from internjax.train.losses import next_token_loss
from internjax.train.optim import OptimConfig, make_optimizer
from internjax.train.state import init_state
from internjax.train.step import make_train_step
from internjax.tree import flatten
from tests.fakes import tiny_model
from tests.training import one_batch

CFG = tiny_model(dtype="float64")[0]


def loss_fn(params, batch, frozen):
    return next_token_loss(params, batch, CFG)


def stepped(micro_batches: int, batch):
    tx = make_optimizer(OptimConfig(lr=1e-2), 10)
    state = init_state(init_params(CFG, jax.random.key(0), jnp.float64), tx)
    step = jax.jit(make_train_step(make_gradients(loss_fn, micro_batches=micro_batches), tx))
    state, _ = step(state, batch, None)
    return step(state, batch, None)


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_accumulated_gradients_are_those_of_the_large_batch(micro_batches: int):
    with jax.enable_x64(True):
        batch = one_batch(8)  # rows count differently many tokens: means of means would differ
        whole, metrics = stepped(1, batch)
        parts, got = stepped(micro_batches, batch)
        for name in ("loss", "grad_norm", "num_tokens"):
            np.testing.assert_allclose(got[name], metrics[name], rtol=1e-12)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), parts, whole
        )


def test_the_metrics_are_those_of_the_plain_gradient():
    with jax.enable_x64(True):
        batch = one_batch(4)
        params = init_params(CFG, jax.random.key(0), jnp.float64)
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, None)
        tx = optax.sgd(0.0)
        state, metrics = jax.jit(make_train_step(make_gradients(loss_fn), tx))(
            init_state(params, tx), batch
        )
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-12)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-12)
        assert float(metrics["num_tokens"]) == float(np.sum(batch.loss_mask))
        assert int(state.step) == 1 and bool(metrics["finite"])


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_bad_update_leaves_parameters_and_optimizer_as_they_were(bad: str):
    def poisoned(params, batch, frozen):
        total = jnp.sum(params["w"] ** 2)
        if bad == "loss":
            total = total + jnp.nan * batch.loss_mask[0, 0]
        else:  # a finite loss whose gradient is not: sqrt at 0
            total = total + jnp.sqrt(batch.loss_mask[0, 0] * params["w"][0] * 0)
        return total, {"loss_sum": total, "num_tokens": jnp.float32(1)}

    tx = make_optimizer(OptimConfig(lr=0.1), 10)
    state = init_state({"w": jnp.arange(1.0, 4.0)}, tx)
    batch = one_batch(2)
    batch = batch.replace(loss_mask=jnp.ones_like(batch.loss_mask))
    after, metrics = make_train_step(make_gradients(poisoned), tx)(state, batch)
    assert not bool(metrics["finite"])
    assert int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)


def test_a_batch_without_a_counted_token_changes_nothing_but_the_schedule():
    with jax.enable_x64(True):
        batch = one_batch(2)
        batch = batch.replace(loss_mask=jnp.zeros_like(batch.loss_mask))
        after, metrics = stepped(1, batch)
        start = init_params(CFG, jax.random.key(0), jnp.float64)
        jax.tree.map(np.testing.assert_array_equal, after.params, start)
        assert float(metrics["loss"]) == 0 and bool(metrics["finite"])


def test_a_bfloat16_working_copy_keeps_master_weights_and_norms_wide():
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    params = init_params(cfg, jax.random.key(0))
    seen = {}

    def loss(work, batch, frozen):
        seen.update({path: leaf.dtype for path, leaf in flatten(work).items()})
        return next_token_loss(work, batch, cfg)

    parts, grads = jax.jit(make_gradients(loss, micro_batches=2, dtype="bfloat16"))(
        params, one_batch(4), None
    )
    assert seen["layers/wq"] == jnp.bfloat16 and seen["layers/attn_norm"] == jnp.float32
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        whole, exact = make_gradients(loss_fn)(wide, one_batch(4), None)
    assert float(parts["loss_sum"]) == pytest.approx(float(whole["loss_sum"]), rel=1e-2)
    for path, g in flatten(grads).items():
        want = np.asarray(flatten(exact)[path])
        assert np.linalg.norm(np.asarray(g) - want) < 0.1 * np.linalg.norm(want), (
            path
        )  # bfloat16 keeps 8 bits; a wrong scale would be off by a factor
