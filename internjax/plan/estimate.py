"""Times a program that was read from HLO, with a roofline for kernels and alpha-beta for links.

Everything here is an estimate: the constants are stated, none is measured on the machine planned
for. `timeline` walks the schedule on two clocks, compute and communication.
"""

import math
from dataclasses import dataclass

from internjax.errors import UserError
from internjax.models.config import ModelConfig
from internjax.plan.hlo import Collective, Compute, Loop, Program, Step, Wait
from internjax.plan.topology import Gpu
from internjax.telemetry import work_of


@dataclass(frozen=True)
class Constants:
    """What is reached of the data sheet's figures, and what a message costs beyond its bytes.

    Fields:
      gemm_rate: share of the peak that matmuls reach. 0.65: between the 0.61 that InternEvo
        publishes for a whole step on A100 and the 0.73 of XLA's own H100 model.
      hbm_rate: share of the memory bandwidth that streaming kernels reach.
      nvlink_rate, nic_rate: share of the links' bandwidth that large NCCL messages reach
        (370 of 450 GB/s and 45 of 50 GB/s are usual on H100).
      nvlink_hop_seconds, nic_hop_seconds: latency of one step of a ring or tree.
      overlap: share of the schedule's windows that communication really uses, 0..1.
    """

    gemm_rate: float = 0.65
    hbm_rate: float = 0.8
    nvlink_rate: float = 0.82
    nic_rate: float = 0.9
    nvlink_hop_seconds: float = 3e-6
    nic_hop_seconds: float = 15e-6
    overlap: float = 0.8

    def __post_init__(self):
        for name in ("gemm_rate", "hbm_rate", "nvlink_rate", "nic_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"constants.{name}={getattr(self, name)}: a share is in (0, 1].")
        if not 0 <= self.overlap <= 1:
            raise UserError(f"constants.overlap={self.overlap}: a share is in 0..1.")


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind in nodes, and the constants that turn bytes and FLOPs into seconds."""

    gpu: Gpu
    gpus_per_node: int = 8
    constants: Constants = Constants()


@dataclass(frozen=True)
class Times:
    """Seconds of one step, estimated.

    Fields:
      compute: kernels alone; nvlink, network: all collectives of that link class, back to back.
      exposed: communication that the schedule's windows cannot hide.
    """

    compute: float
    nvlink: float
    network: float
    exposed: float

    def step(self, overlap: float) -> float:
        """Seconds of a step: at overlap 0 nothing is hidden, at 1 whatever the windows hold."""
        serial = self.nvlink + self.network
        return self.compute + serial - overlap * (serial - self.exposed)


def kernel_seconds(step: Compute, machine: Machine) -> float:
    """Roofline of every kernel: the longer of its matmuls and its memory traffic."""
    gpu, c = machine.gpu, machine.constants
    rate, bandwidth = gpu.peak_bf16_flops * c.gemm_rate, gpu.hbm_bandwidth * c.hbm_rate
    return sum(max(flops / rate, moved / bandwidth) for flops, moved in step.parts)


def hops(step: Collective) -> tuple[float, float]:
    """Counts the steps within a node and between nodes that must follow each other.

    Rings pass n - 1 times; an all-reduce across nodes goes up and down a tree, as NCCL does.
    """
    if step.kind == "collective-permute":
        return (1.0, 0.0) if step.per_node > 1 else (0.0, 1.0)
    nodes = -(-step.size // step.per_node)
    if step.kind == "all-reduce":
        return 2.0 * (step.per_node - 1), 2.0 * math.ceil(math.log2(nodes)) if nodes > 1 else 0.0
    return float(step.per_node - 1), float(step.size - step.per_node)


def collective_seconds(step: Collective, machine: Machine) -> float:
    """Alpha-beta time of a collective: latency of its hops plus bytes over the slowest link.

    A group with several GPUs in each node uses the adapters of all of them, each for its part.
    """
    if step.size <= 1:
        return 0.0
    gpu, c = machine.gpu, machine.constants
    inside, across = hops(step)
    seconds = inside * c.nvlink_hop_seconds + across * c.nic_hop_seconds
    on_nvlink = step.wire_bytes / (gpu.nvlink_bandwidth * c.nvlink_rate)
    if not crosses(step):
        return seconds + on_nvlink
    on_nic = step.wire_bytes / step.per_node / (gpu.nic_bandwidth * c.nic_rate)
    return seconds + max(on_nic, on_nvlink if step.per_node > 1 else 0.0)


def crosses(step: Collective) -> bool:
    """Whether a collective leaves the node."""
    return step.size > step.per_node


def link_bytes(program: Program) -> dict[str, float]:
    """Bytes that a device sends over NVLink and over its network adapter in a step."""
    total = {"nvlink": 0.0, "network": 0.0}
    for times, step in program.walk():
        if not isinstance(step, Collective) or step.size <= 1:
            continue
        if crosses(step):
            total["network"] += times * step.wire_bytes / step.per_node
        if step.per_node > 1:
            total["nvlink"] += times * step.wire_bytes
    return total


def timeline(program: Program, machine: Machine) -> Times:
    """Walks the schedule; one communication at a time beside one kernel at a time."""
    compute, nvlink, network, end = _walk(program.steps, machine)
    return Times(compute, nvlink, network, max(0.0, end - compute))


def _walk(steps: tuple[Step, ...], machine: Machine) -> tuple[float, float, float, float]:
    """Returns seconds of compute, of NVLink, of network, and the end of both clocks."""
    compute = nvlink = network = now = link_free = 0.0
    ends: dict[str, float] = {}
    for step in steps:
        if isinstance(step, Compute):
            seconds = kernel_seconds(step, machine)
            compute, now = compute + seconds, now + seconds
        elif isinstance(step, Loop):  # its body is timed once: windows do not reach across rounds
            inner = [step.trips * part for part in _walk(step.body, machine)]
            compute, nvlink, network = compute + inner[0], nvlink + inner[1], network + inner[2]
            now += inner[3]
        elif isinstance(step, Collective):
            seconds = collective_seconds(step, machine)
            nvlink, network = (
                (nvlink, network + seconds) if crosses(step) else (nvlink + seconds, network)
            )
            link_free = max(link_free, now) + seconds
            if step.key:
                ends[step.key] = link_free
            else:
                now = link_free
        elif isinstance(step, Wait):
            now = max(now, ends.get(step.key, now))
    return compute, nvlink, network, max(now, link_free)


@dataclass(frozen=True)
class Estimate:
    """What one step of a plan is estimated to take, at one overlap.

    Fields:
      tokens_per_second_gpu: tokens of the global batch, a second and GPU.
      mfu: model FLOPs a second over the peak, counted as the step log does (telemetry.FORMULA:
        every matmul of the model, nothing recomputed); mfu_internevo: by InternEvo's formula.
      hfu: matmul FLOPs of the compiled program, recomputation and padding too, over the peak.
    """

    overlap: float
    step_seconds: float
    tokens_per_second_gpu: float
    mfu: float
    mfu_internevo: float
    hfu: float


def estimate(
    program: Program, times: Times, cfg: ModelConfig, machine: Machine, *, tokens_per_gpu: float,
    length: int, overlap: float,
) -> Estimate:  # fmt: skip
    """Turns the times of a step into rates.

    Args:
      tokens_per_gpu: tokens of the global batch over the number of GPUs.
    """
    seconds = times.step(overlap)
    rate, peak = tokens_per_gpu / seconds, machine.gpu.peak_bf16_flops
    needed = work_of(cfg, length=length, remat=0.0, devices=1, device="")
    return Estimate(
        overlap=overlap,
        step_seconds=seconds,
        tokens_per_second_gpu=rate,
        mfu=needed.model_flops * rate / peak,
        mfu_internevo=needed.internevo_flops * rate / peak,
        hfu=program.flops / seconds / peak,
    )


def bubble(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """Share of a step that a pipeline stage waits: (P - 1) / (v M + P - 1) (arXiv:2104.04473)."""
    return (stages - 1) / (chunks * micro_batches + stages - 1)


def run_cost(
    tokens: float, tokens_per_second_gpu: float, num_gpus: int, dollars_per_gpu_hour: float
) -> dict[str, float]:
    """Days, GPU hours and dollars of a run over `tokens` tokens, without breaks."""
    gpu_hours = tokens / tokens_per_second_gpu / 3600
    return {
        "days": gpu_hours / num_gpus / 24,
        "gpu_hours": gpu_hours,
        "dollars": gpu_hours * dollars_per_gpu_hour,
    }
