"""The schedule of pipelines: every pass once, every message in time, memory that does not grow."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from internjax.errors import UserError
from internjax.mesh import MeshConfig
from internjax.train.losses import Stages
from internjax.train.pipeline import make_schedule
from internjax.train.place import placement
from tests.fakes import TINY

SCHEDULES = [
    (MeshConfig(pipe=2), 1),
    (MeshConfig(pipe=4), 3),
    (MeshConfig(pipe=4), 16),
    (MeshConfig(pipe=4, schedule="gpipe"), 8),
    (MeshConfig(pipe=2, chunks=3), 4),
    (MeshConfig(pipe=4, chunks=2), 8),
]


@pytest.mark.parametrize(("cfg", "micro"), SCHEDULES, ids=str)
def test_every_pass_runs_once_and_every_message_arrives_one_step_early(cfg: MeshConfig, micro: int):
    plan = make_schedule(cfg, micro)
    P, C = cfg.pipe, cfg.chunks
    number, forward, backward = {}, {}, {}  # by (part of the whole model, micro-batch)
    for step in range(plan.num_steps):
        for p in range(P):
            k, chunk, m = (int(x) for x in plan.forward(step, p))
            if 0 <= k < plan.num_passes:
                assert (chunk * P + p, m) not in forward
                forward[chunk * P + p, m] = step
                number[chunk * P + p, m] = k
            k, chunk, m = (int(x) for x in plan.backward(jnp.int32(step), p))
            if k >= 0:
                assert number[chunk * P + p, m] == k, "undoes the forward it names"
                backward[chunk * P + p, m] = step
    everything = {(part, m) for part in range(P * C) for m in range(micro)}
    assert set(forward) == set(backward) == everything
    for part, m in everything:
        if part:
            assert forward[part, m] == forward[part - 1, m] + 1
            assert backward[part - 1, m] == backward[part, m] + 1
        assert backward[part, m] >= forward[part, m]
        # Its input lies at k % num_kept until the backward has run: none takes the place.
        later = [
            forward[q, n]
            for (q, n), k in number.items()
            if q % P == part % P and k == number[part, m] + plan.num_kept
        ]
        assert all(step > backward[part, m] for step in later)
    if cfg.schedule == "1f1b":
        assert plan.num_kept <= 2 * C * P - 1


def test_the_bubble_is_that_of_the_formula():
    # Each step costs a forward while any stage has one, and a backward while any stage has one.
    for cfg, micro in SCHEDULES:
        plan = make_schedule(cfg, micro)
        busy = {
            kind: sum(
                any(is_valid(plan, kind, step, p) for p in range(cfg.pipe))
                for step in range(plan.num_steps)
            )
            for kind in ("forward", "backward")
        }
        for count in busy.values():
            assert count / plan.num_passes == pytest.approx(1 + plan.bubble)


def is_valid(plan, kind: str, step: int, stage: int) -> bool:
    k = int(getattr(plan, kind)(jnp.int32(step), stage)[0])
    return 0 <= k < plan.num_passes


def temporary_bytes(cfg: MeshConfig, micro: int) -> int:
    model = replace(TINY, num_layers=4, d_model=256, d_ff=256)
    with placement(cfg) as place:
        gradients = place.gradients(Stages(model, par=place.par), micro_batches=micro)
        state, batch = place.abstract_params(model), place.abstract_batch(2 * micro, 32)
        compiled = jax.jit(gradients).lower(state, batch, None).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_1f1b_does_not_grow_with_micro_batches_and_that_of_gpipe_does():
    few, many = (temporary_bytes(MeshConfig(pipe=4), m) for m in (8, 32))
    assert abs(many - few) <= 0.05 * few
    few, many = (temporary_bytes(MeshConfig(pipe=4, schedule="gpipe"), m) for m in (8, 32))
    assert many > 1.2 * few


def test_micro_batches_that_do_not_come_in_groups_are_refused():
    with pytest.raises(UserError, match=r"micro_batches=6 is not a multiple of mesh.pipe=4"):
        make_schedule(MeshConfig(pipe=4, chunks=2), 6)
    with pytest.raises(UserError, match=r"mesh.chunks=2: parts of a stage exist in a 1f1b"):
        MeshConfig(pipe=2, chunks=2, schedule="gpipe")
