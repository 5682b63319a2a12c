"""One plan as a record: a step compiled for a mesh of GPUs, read and estimated."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from internjax.mesh import MeshConfig
from internjax.models.config import ModelConfig
from internjax.plan.compile import Compiled
from internjax.plan.estimate import (
    Estimate,
    Machine,
    Times,
    bubble,
    estimate,
    link_bytes,
    timeline,
)
from internjax.plan.hlo import read
from internjax.plan.memory import Work, memory_bytes, remedies
from internjax.plan.search import HEADROOM


@dataclass(frozen=True)
class Plan:
    """What a run would need and about how fast it would be; times are estimates.

    Fields:
      memory: compiled bytes of a device: argument, output, alias, temp, peak.
      arguments: exact bytes of what a device holds between steps, by name.
      closed_form: bytes by kind, in closed form.
      fits: peak within the GPU's memory, `HEADROOM` kept; spare_bytes: negative when it does not.
      remedies: changes of a key that would make it fit, with the bytes they save in closed form.
      flops: matmul FLOPs of a device and step; link_bytes: sent by a device over each link class.
      collectives: a row for each (kind, mesh axes) with bytes a device and step.
      async_share: of the bytes sent, those of collectives that run beside kernels.
      bubble: share of a step that a pipeline stage waits, by the formula.
      estimates: at overlap 0, at the constants' overlap, and at 1.
    """

    arch: str
    parameters: int
    gpu: str
    gpus: int
    mesh: dict[str, int]
    work: dict
    memory: dict[str, int]
    arguments: dict[str, int]
    closed_form: dict[str, float]
    hbm_bytes: int
    fits: bool
    spare_bytes: float
    remedies: tuple[tuple[str, float], ...]
    flops: float
    link_bytes: dict[str, float]
    collectives: tuple[dict, ...]
    async_share: float
    bubble: float
    times: Times
    estimates: tuple[Estimate, ...]
    compile_seconds: float
    warnings: tuple[str, ...]

    @property
    def fitted(self) -> Estimate:
        """The estimate at the constants' overlap."""
        return self.estimates[1]


def make_plan(
    compiled: Compiled,
    arguments: Mapping[str, int],
    parameters: int,
    cfg: ModelConfig,
    mesh: MeshConfig,
    axes: Mapping[str, int],
    work: Work,
    machine: Machine,
) -> Plan:
    """Reads a compiled step.

    Args:
      axes: mesh axis -> size, outermost first, as the step was compiled.
    """
    gpus = 1
    for size in axes.values():
        gpus *= size
    program = read(compiled.text, axes, machine.gpus_per_node)
    times = timeline(program, machine)
    tokens = work.batch_size * work.length / gpus
    peak, hbm = compiled.memory["peak"], machine.gpu.hbm_bytes
    spare = hbm * HEADROOM - peak
    rows = [
        {"kind": kind, "axes": spanned} | row
        for (kind, spanned), row in sorted(program.collectives().items())
    ]
    sent = sum(row["wire_bytes"] for row in rows)
    beside = sum(row["async_bytes"] for row in rows)
    help_ = [(words, saved) for words, saved in remedies(cfg, mesh, work) if saved + spare >= 0]
    return Plan(
        arch=cfg.name,
        parameters=parameters,
        gpu=machine.gpu.name,
        gpus=gpus,
        mesh=asdict(mesh),
        work=asdict(work),
        memory=dict(compiled.memory),
        arguments=dict(arguments),
        closed_form=memory_bytes(cfg, mesh, work),
        hbm_bytes=hbm,
        fits=spare >= 0,
        spare_bytes=spare,
        remedies=() if spare >= 0 else tuple(help_),
        flops=program.flops,
        link_bytes=link_bytes(program),
        collectives=tuple(rows),
        async_share=beside / sent if sent else 0.0,
        bubble=bubble(mesh.pipe, work.micro_batches, mesh.chunks),
        times=times,
        estimates=tuple(
            estimate(
                program,
                times,
                cfg,
                machine,
                tokens_per_gpu=tokens,
                length=work.length,
                overlap=overlap,
            )
            for overlap in (0.0, machine.constants.overlap, 1.0)
        ),
        compile_seconds=compiled.seconds,
        warnings=program.warnings,
    )
