"""Times and bytes in closed form: roofline, links, overlap, FLOPs, memory by kind."""

from dataclasses import replace

import pytest

from internjax.errors import UserError
from internjax.models.internlm import config
from internjax.plan.estimate import (
    Constants,
    Machine,
    Times,
    bubble,
    collective_seconds,
    estimate,
    hops,
    kernel_seconds,
    link_bytes,
    run_cost,
    timeline,
)
from internjax.plan.hlo import Collective, Compute, Loop, Program, Wait
from internjax.plan.topology import GPUS, gpu_named, num_nodes, target_config

# Round figures: 1e12 FLOP/s, 1e9 bytes/s of memory, 1e8 on NVLink, 1e7 on the network.
GPU = replace(
    gpu_named("h100"),
    peak_bf16_flops=1e12,
    hbm_bandwidth=1e9,
    nvlink_bandwidth=1e8,
    nic_bandwidth=1e7,
)
IDEAL = Machine(GPU, 8, Constants(1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0))


def work(seconds: float) -> Compute:
    return Compute(seconds * 1e12, 0.0, ((seconds * 1e12, 0.0),))


def test_a_kernel_takes_the_longer_of_matmul_and_memory():
    step = Compute(3e12, 3e9, ((2e12, 1e9), (1e12, 2e9)))
    assert kernel_seconds(step, IDEAL) == 2 + 2


def test_links_inside_and_across_nodes():
    inside = Collective("all-gather", "tensor", 8, 8, 8e8)
    assert collective_seconds(inside, IDEAL) == pytest.approx(7e8 / 1e8)
    one_a_node = Collective("reduce-scatter", "data", 4, 1, 4e7)
    assert collective_seconds(one_a_node, IDEAL) == pytest.approx(3e7 / 1e7)
    # All eight adapters of a node carry their part: eight times as fast as one.
    whole_nodes = Collective("all-reduce", "data+fsdp", 32, 8, 32e7)
    assert collective_seconds(whole_nodes, IDEAL) == pytest.approx(2 * 31e7 / 8 / 1e7)
    assert collective_seconds(Collective("all-reduce", "", 1, 1, 1e9), IDEAL) == 0


def test_hops_of_rings_and_trees():
    assert hops(Collective("all-gather", "d", 64, 8, 1.0)) == (7, 56)
    assert hops(Collective("all-reduce", "d", 64, 8, 1.0)) == (14, 6)  # up and down 8 nodes
    assert hops(Collective("collective-permute", "pipe", 2, 1, 1.0)) == (0, 1)


def test_bytes_of_each_link_class():
    steps = (
        Loop(3, (Collective("all-gather", "tensor", 8, 8, 8e6),)),
        Collective("all-reduce", "data", 16, 8, 16e6),
    )
    moved = link_bytes(Program(steps))
    assert moved == {"network": 2 * 15e6 / 8, "nvlink": 3 * 7e6 + 2 * 15e6}


@pytest.mark.parametrize(("window", "exposed"), [(0.0, 7.0), (2.0, 5.0), (7.0, 0.0), (9.0, 0.0)])
def test_a_window_hides_what_fits_in_it(window, exposed):
    gather = Collective("all-gather", "tensor", 8, 8, 8e8, key="g")  # 7 seconds
    times = timeline(Program((gather, work(window), Wait("g"), work(1.0))), IDEAL)
    assert times.compute == pytest.approx(window + 1)
    assert times.exposed == pytest.approx(exposed)
    assert times.step(0.0) == pytest.approx(window + 1 + 7)
    assert times.step(1.0) == pytest.approx(window + 1 + exposed)
    assert times.step(0.5) == pytest.approx((times.step(0.0) + times.step(1.0)) / 2)


def test_two_collectives_share_the_link_and_loops_repeat():
    one = Collective("all-gather", "tensor", 8, 8, 8e8, key="a")
    two = replace(one, key="b")
    body = (one, two, work(10.0), Wait("a"), Wait("b"))
    times = timeline(Program((Loop(3, body),)), IDEAL)
    assert times.nvlink == pytest.approx(42) and times.exposed == pytest.approx(3 * 4)
    alone = timeline(Program((replace(one, key=""), work(10.0))), IDEAL)
    assert alone.exposed == pytest.approx(7)  # synchronous: nothing runs beside it


def test_rates_follow_from_seconds():
    cfg = config("internlm-7b")
    times = Times(compute=2.0, nvlink=0.0, network=0.0, exposed=0.0)
    program = Program((work(1.0),))
    made = estimate(
        program, times, cfg, IDEAL, tokens_per_gpu=4096.0, length=2048, overlap=0.5
    )  # fmt: skip
    assert made.tokens_per_second_gpu == 2048
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 103168
    flops = 6 * weights + 12 * 32 * 4096 * 2048
    assert made.mfu == pytest.approx(flops * 2048 / 1e12)
    assert made.mfu_internevo == pytest.approx(made.mfu, rel=0.02)  # nearly the same without GQA
    assert made.hfu == pytest.approx(0.5)


def test_bubble_and_cost():
    assert bubble(4, 12) == pytest.approx(3 / 15)
    assert bubble(4, 12, chunks=3) == pytest.approx(3 / 39)
    cost = run_cost(3.6e9, 1000.0, 8, 2.0)
    assert cost == {"days": pytest.approx(1000 / 8 / 24), "gpu_hours": 1000.0, "dollars": 2000.0}


def test_constants_are_shares():
    with pytest.raises(UserError, match=r"gemm_rate=1\.5"):
        Constants(gemm_rate=1.5)
    with pytest.raises(UserError, match="overlap=2"):
        Constants(overlap=2.0)


def test_the_table_of_gpus():
    assert set(GPUS) == {"a100-40", "a100-80", "h100", "h200", "b200"}
    assert "core_count: 108" in target_config(gpu_named("A100-80"))
    assert "ACCELERATED" in target_config(gpu_named("b200"))
    assert "ACCELERATED" not in target_config(gpu_named("a100-40"))
    assert num_nodes(16384, 8) == 2048 and num_nodes(4, 8) == 1
    for bad, words in ((12, "multiple"), (0, "1 to 16384"), (20000, "1 to 16384")):
        with pytest.raises(UserError, match=words):
            num_nodes(bad, 8)
    with pytest.raises(UserError, match="legal names are a100-40"):
        gpu_named("v100")
