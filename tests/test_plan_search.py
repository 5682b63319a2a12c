"""Closed-form memory, the sketch of a step, and what search keeps, drops and ranks."""

import json
from dataclasses import replace

import pytest

from internjax.errors import UserError
from internjax.mesh import MeshConfig
from internjax.models.internlm import config
from internjax.plan.estimate import Machine, link_bytes
from internjax.plan.memory import Work, memory_bytes, remedies
from internjax.plan.scaling import at_size, resized, sizes, strong, weak
from internjax.plan.search import HEADROOM, candidates, sketch
from internjax.plan.topology import gpu_named
from tests.plan_goldens import CASES, GOLDENS, arch_of

CFG = replace(config("internlm2-7b"), dtype="bfloat16")
H100 = Machine(gpu_named("h100"))
PARAMETERS = 7_737_708_544  # of InternLM2-7B


def test_state_bytes_by_zero_stage():
    """16 bytes a parameter with Adam (arXiv:1910.02054, figure 1), less what a stage shards."""
    work = Work(128, 2048, micro_batches=2)
    whole = memory_bytes(CFG, MeshConfig(data=64, zero=0), work)
    assert whole["master"] == pytest.approx(4 * PARAMETERS)
    assert whole["optimizer"] == pytest.approx(8 * PARAMETERS)
    one = memory_bytes(CFG, MeshConfig(data=64, zero=1), work)
    assert one["optimizer"] == pytest.approx(8 * PARAMETERS / 64, rel=0.01)
    assert one["gradients"] == whole["gradients"]
    two = memory_bytes(CFG, MeshConfig(data=64, zero=2), work)
    assert one["gradients"] == pytest.approx((2 + 4) * PARAMETERS)  # of one, and the sum of both
    assert (
        two["gradients"] == pytest.approx((2 + 4 / 64) * PARAMETERS, rel=0.01)
        and two["weights"] == one["weights"]
    )
    three = memory_bytes(CFG, MeshConfig(data=64, zero=3), work)
    assert three["weights"] < two["weights"] / 4
    group = memory_bytes(CFG, MeshConfig(data=64, zero=1, zero_group=8), work)
    assert group["optimizer"] == pytest.approx(8 * PARAMETERS / 8, rel=0.01)


def test_tensor_and_pipe_cut_the_weights():
    work = Work(64, 2048, micro_batches=8)
    whole = memory_bytes(CFG, MeshConfig(zero=0), work)["master"]
    tensor = memory_bytes(CFG, MeshConfig(tensor=8, zero=0), work)["master"]
    assert tensor == pytest.approx(whole / 8, rel=0.01)
    pipe = memory_bytes(CFG, MeshConfig(pipe=4, zero=0), work)["master"]
    outside = 4 * 2 * 92544 * 4096  # embedding and head stand outside the layers
    assert pipe == pytest.approx((whole - outside) / 4 + outside, rel=0.01)


def test_activations_follow_remat_and_the_schedule():
    def kept(mesh: MeshConfig, remat: float) -> float:
        return memory_bytes(CFG, mesh, Work(64, 2048, 32, remat=remat))["activations"]

    alone = MeshConfig(zero=0)
    assert kept(alone, 0.0) > 15 * kept(alone, 1.0)
    row = 2 * 2 * 2048 * 4096  # bytes of the states of a micro-batch of two rows
    assert kept(alone, 1.0) == 32 * row
    # A stage keeps 2 P - 1 inputs under 1F1B (train/pipeline.py), all of them under GPipe.
    pipe = MeshConfig(pipe=4, zero=0)
    assert kept(pipe, 1.0) == (32 / 4 + 7) * row
    assert kept(replace(pipe, schedule="gpipe"), 1.0) == (32 / 4 + 32) * row


def test_remedies_save_what_they_say():
    mesh, work = MeshConfig(data=8, zero=0), Work(128, 2048, micro_batches=1, remat=0.0)
    found = dict(remedies(CFG, mesh, work))
    assert {"remat=1", "micro_batches=2", "mesh.zero=1", "optimizer=adam8bit"} <= set(found)
    one = sum(memory_bytes(CFG, replace(mesh, zero=1), work).values())
    whole = sum(memory_bytes(CFG, mesh, work).values())
    assert found["mesh.zero=1"] == pytest.approx(whole - one)
    assert all(saved > 0 for saved in found.values())


def test_search_keeps_what_fits_and_ranks_it():
    ranked = candidates(CFG, 64, H100, Work(1024, 4096))
    assert [c.seconds for c in ranked] == sorted(c.seconds for c in ranked)
    assert all(c.peak_bytes <= H100.gpu.hbm_bytes * HEADROOM for c in ranked)
    assert {c.mesh.zero for c in ranked} == {0, 1, 3} and len(set(ranked)) == len(ranked)
    for c in ranked:
        assert c.mesh.data * c.mesh.tensor * c.mesh.pipe == 64
        assert c.work.batch_size % (c.mesh.data * c.work.micro_batches) == 0
    # 16 bytes a parameter do not fit 80 GB: without ZeRO the model must be cut otherwise.
    assert not any(c.mesh.zero == 0 and c.mesh.tensor * c.mesh.pipe == 1 for c in ranked)


def test_search_says_why_nothing_fits():
    with pytest.raises(UserError, match="fits no mesh of 8 a100-40: the smallest"):
        candidates(config("internlm-104b"), 8, Machine(gpu_named("a100-40")), Work(8, 2048))
    with pytest.raises(UserError, match="no mesh of 48 GPUs gives each as many rows"):
        candidates(CFG, 48, H100, Work(7, 2048))


def test_the_sketch_sends_what_zero_says():
    """Stage 1 moves 2 bytes a parameter out and 4 in; hybrid keeps the most of it in the node."""
    work = Work(64, 2048, micro_batches=1)
    whole = sketch(CFG, MeshConfig(data=64, zero=1), work, 8).collectives()
    gathered = whole["all-gather", "fsdp"]["payload_bytes"]
    assert gathered == pytest.approx(2 * PARAMETERS)
    assert whole["reduce-scatter", "fsdp"]["payload_bytes"] == pytest.approx(4 * PARAMETERS)
    hybrid = sketch(CFG, MeshConfig(data=64, zero=1, zero_group=8), work, 8)
    assert hybrid.collectives()["all-reduce", "data"]["payload_bytes"] == pytest.approx(
        4 * PARAMETERS / 8
    )
    across = link_bytes(hybrid)["network"]
    assert across == pytest.approx(2 * 4 * PARAMETERS / 8 * 7 / 8)


def test_curves_keep_rows_or_the_batch():
    mesh = MeshConfig(data=128, tensor=8, zero=1, zero_group=8)
    work = Work(1024, 4096, micro_batches=8)
    ways = sizes(mesh, 8)
    assert ways == [1, 2, 4, 8, 16, 32, 64, 128]
    assert [w.batch_size for _, w in weak(mesh, work, ways)] == [8 * n for n in ways]
    assert [w.micro_batches for _, w in strong(mesh, work, ways)] == [1024 // n for n in ways]
    assert resized(mesh, 4).zero_group == 0 and resized(mesh, 16).zero_group == 8
    assert resized(mesh, 128) is mesh


def test_a_program_at_another_size_is_the_one_that_is_drawn_there():
    """Weak scaling changes groups only: as many bytes of values, other rings."""
    small, large = (
        MeshConfig(data=16, zero=1, zero_group=8),
        MeshConfig(data=512, zero=1, zero_group=8),
    )
    draw = lambda mesh: sketch(CFG, mesh, Work(2 * mesh.data, 2048, 2), 8)  # noqa: E731
    moved = at_size(draw(small), large.sizes, 8)
    drawn = draw(large)
    assert moved.collectives() == drawn.collectives()
    assert link_bytes(moved) == link_bytes(drawn) != link_bytes(draw(small))


def test_a_tuning_plan_goes_row_by_row_unless_told_otherwise():
    from internjax.experiments.plan import PlanConfig, tune_requests

    cfg = PlanConfig(action="tune", arch=config("internlm2-7b"), length=2048, batch_size=2)
    for given, parts in (
        (cfg, 2),
        (replace(cfg, micro_batches=1), 1),
        (replace(cfg, batch_size=0), 1),
    ):
        (asked,) = tune_requests(given, [(16, "adamw")])
        assert asked["rank"] == 16 and asked["gpus"] == 1
        assert asked["work"]["micro_batches"] == parts


@pytest.mark.parametrize("name", json.loads(GOLDENS.read_text(encoding="utf-8")))
def test_the_closed_form_is_within_a_tenth_of_what_the_compiler_says(name: str):
    arch, _, mesh, work = CASES[name]
    compiled = json.loads(GOLDENS.read_text(encoding="utf-8"))[name]["peak_bytes"]
    closed = sum(memory_bytes(arch_of(arch), mesh, work).values())
    assert closed == pytest.approx(compiled, rel=0.1)
