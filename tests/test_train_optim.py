"""Schedules at their corners, clipping, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from internjax.errors import UserError
from internjax.models.decoder import init_params
from internjax.train.optim import OptimConfig, make_optimizer, make_schedule
from internjax.tree import flatten
from tests.fakes import tiny_model


def rates(steps: int, **changes) -> np.ndarray:
    schedule = make_schedule(OptimConfig(lr=1.0, **changes), steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def test_the_rate_rises_to_its_peak_and_falls_to_its_end():
    got = rates(100, warmup_fraction=0.1, final_lr_fraction=0.2)
    np.testing.assert_allclose(got[:10], np.arange(1, 11) / 10, rtol=1e-6)  # never 0, peak reached
    cosine = 0.2 + 0.8 * (1 + np.cos(np.pi * np.arange(91) / 90)) / 2
    np.testing.assert_allclose(got[10:], cosine, rtol=1e-5)


def test_linear_and_constant_schedules():
    got = rates(10, warmup_fraction=0.2, final_lr_fraction=0.0, schedule="linear")
    np.testing.assert_allclose(got, [0.5, 1, *(1 - np.arange(9) / 8)], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(rates(10, schedule="constant"), np.ones(11))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_of_few_steps_has_a_positive_rate_everywhere(steps: int):
    for schedule in ("cosine", "linear", "constant"):
        assert (rates(steps, schedule=schedule, warmup_fraction=1.0)[:steps] > 0).all()


def test_no_steps_are_refused():
    with pytest.raises(UserError, match="at least one step"):
        make_schedule(OptimConfig(), 0)


def test_decay_falls_on_matrices_only():
    cfg, _ = tiny_model(qkv_bias=True, output_bias=True, qk_norm=True, tie_embeddings=False)
    params = jax.tree.map(jnp.ones_like, init_params(cfg, jax.random.key(0)))
    tx = make_optimizer(OptimConfig(lr=1.0, schedule="constant", weight_decay=0.5), 4)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    moved = {path for path, update in flatten(updates).items() if (update != 0).any()}
    matrices = {"embed", "head"}
    matrices |= {f"layers/{n}" for n in ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")}
    assert moved == matrices


def test_clipping_bounds_the_whole_gradient():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    grads = {"a": jnp.full(3, 30.0), "b": jnp.full(4, -40.0)}
    moved = {}
    for clip in (0.0, 1.0):
        cfg = OptimConfig(lr=1.0, schedule="constant", clip_norm=clip, eps=1.0, b1=0.0, b2=0.0)
        tx = make_optimizer(cfg, 4)
        updates, _ = tx.update(grads, tx.init(params), params)
        moved[clip] = float(-updates["a"][0])
    # Adam without memory moves by g / (|g| + eps): the clipped gradient shows in the ratio.
    norm = float(optax.tree.norm(grads))
    np.testing.assert_allclose(moved[0.0], 30 / 31, rtol=1e-5)
    np.testing.assert_allclose(moved[1.0], (30 / norm) / (30 / norm + 1), rtol=1e-5)
