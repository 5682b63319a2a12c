"""Ranks meshes, ZeRO stages, micro-batches and remat for a model, a GPU and a number of them.

First all of them in closed form (memory decides who is out, a sketch of the step ranks), then the
best few by what the compiler says.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from internjax.errors import UserError
from internjax.mesh import MeshConfig
from internjax.models.config import ModelConfig
from internjax.plan.estimate import Machine, timeline
from internjax.plan.hlo import Collective, Compute, Loop, Program, Step
from internjax.plan.memory import Work, layer_bytes, memory_bytes, micro_rows

HEADROOM = 0.92  # of the memory: the rest is for CUDA, NCCL and the allocator's gaps


@dataclass(frozen=True)
class Candidate:
    """A mesh and a way of working on it, with the closed form's verdict.

    Fields:
      seconds: of a step by the sketch; peak_bytes: of a device by the closed form.
    """

    mesh: MeshConfig
    work: Work
    seconds: float
    peak_bytes: float


def candidates(cfg: ModelConfig, gpus: int, machine: Machine, work: Work) -> list[Candidate]:
    """Lists what fits in closed form, the fastest sketch first.

    Raises: UserError when nothing fits, with the smallest peak there is.
    """
    room, seen, smallest = machine.gpu.hbm_bytes * HEADROOM, [], math.inf
    for mesh in meshes(cfg, gpus, machine.gpus_per_node, work):
        for way in ways(mesh, work):
            peak = sum(memory_bytes(cfg, mesh, way).values())
            smallest = min(smallest, peak)
            if peak <= room:
                seconds = sketch_seconds(cfg, mesh, way, machine)
                seen.append(Candidate(mesh, way, seconds, peak))
    if not seen and smallest == math.inf:
        raise UserError(
            f"batch_size={work.batch_size}: no mesh of {gpus} GPUs gives each as many rows; take a"
            f" multiple of {gpus}, or fewer GPUs."
        )
    if not seen:
        raise UserError(
            f"{cfg.name} fits no mesh of {gpus} {machine.gpu.name}: the smallest closed-form peak"
            f" is {smallest / 2**30:.1f} GiB of {room / 2**30:.1f}; take more or larger GPUs, a"
            " shorter length or optimizer=adam8bit."
        )
    return sorted(seen, key=lambda c: (c.seconds, c.peak_bytes))


def meshes(cfg: ModelConfig, gpus: int, per_node: int, work: Work) -> Iterator[MeshConfig]:
    """Yields meshes that divide the model and the batch; tensor stays within a node."""
    for tensor in _powers(min(per_node, gpus)):
        if any(n % tensor for n in (cfg.num_kv_heads, cfg.d_ff, cfg.vocab_size)):
            continue
        for pipe in _powers(min(16, gpus // tensor)):
            if cfg.num_layers % pipe or gpus % (tensor * pipe):
                continue
            data = gpus // (tensor * pipe)
            if work.batch_size % data:
                continue
            mesh = MeshConfig(data=data, tensor=tensor, pipe=pipe, zero=0)
            yield mesh
            for stage in (1, 3) if data > 1 else ():
                node = max(2, per_node // tensor)
                for group in (0, node) if data > node and data % node == 0 else (0,):
                    yield replace(mesh, zero=stage, zero_group=group)


def ways(mesh: MeshConfig, work: Work) -> Iterator[Work]:
    """Yields micro-batches of 1, 2, 4... rows a device and three shares of remat."""
    rows = work.batch_size // mesh.row_ways
    for micro in _powers(min(rows, 8)):
        if rows % micro == 0 and rows // micro >= mesh.pipe:
            for remat in (0.0, 0.5, 1.0):
                yield replace(work, micro_batches=rows // micro, remat=remat)


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(int(math.log2(max(1, limit))) + 1)]


def sketch_seconds(cfg: ModelConfig, mesh: MeshConfig, work: Work, machine: Machine) -> float:
    """Seconds of a step by its sketch, at the constants' overlap."""
    program = sketch(cfg, mesh, work, machine.gpus_per_node)
    return timeline(program, machine).step(machine.constants.overlap)


def sketch(cfg: ModelConfig, mesh: MeshConfig, work: Work, per_node: int) -> Program:
    """Draws the step that training would compile: the same collectives, a kernel a layer."""
    rows = micro_rows(work, mesh)
    tokens = rows * work.length / mesh.context
    layers = cfg.num_layers // mesh.pipe
    # The bubble is ticks on which a stage idles.
    ticks = work.micro_batches + (mesh.pipe - 1) / mesh.chunks
    c = work.compute_bytes
    weights = memory_bytes(cfg, replace(mesh, zero=0), work)["weights"]  # whole, in use
    sizes = mesh.sizes
    travel = 2 if work.reduce_dtype == "float32" else 1  # times the bf16 weights

    def along(kind: str, axis: str, payload: float) -> list[Step]:
        size = sizes[axis]
        stride = {"tensor": 1, "fsdp": mesh.tensor, "data": mesh.tensor * sizes["fsdp"]}[axis]
        inside = max(1, min(size, per_node // stride))
        return [Collective(kind, axis, size, inside, payload)] if size > 1 else []

    # One layer of one micro-batch: forward, backward (twice the work) and its recomputation.
    again = 4 if mesh.pipe > 1 else 3 + work.remat
    block = c * tokens * cfg.d_model
    flops = _layer_flops(cfg, mesh, tokens, work.length) * again
    moved = 2 * again * layer_bytes(cfg, tokens, mesh.tensor, c)
    layer: list[Step] = []
    if mesh.zero == 3:  # gathered when they are needed: compiled schedules hide little of it
        for _ in range(2 + (work.remat > 0)):
            layer += along("all-gather", "fsdp", weights / layers)
        layer += along("reduce-scatter", "fsdp", travel * weights / layers)
    for _ in range(2):
        layer += along("all-gather", "tensor", again * block)
        layer += along("reduce-scatter", "tensor", again * block)
    layer.append(Compute(flops, moved, ((flops, moved),)))

    head = 6 * tokens * cfg.d_model * cfg.vocab_size / mesh.tensor * 4 / 3
    steps: list[Step] = [
        Loop(round(ticks), (Loop(layers, tuple(layer)), Compute(head, 0, ((head, 0),))))
    ]
    state = memory_bytes(cfg, mesh, work)
    if mesh.zero in (1, 2):
        steps = [*along("all-gather", "fsdp", weights), *steps]
        times = work.micro_batches if mesh.zero == 2 else 1
        steps += along("reduce-scatter", "fsdp", times * travel * weights)
    steps += along("all-reduce", "data", travel * weights / sizes["fsdp"])
    update = 2 * (state["master"] + state["optimizer"]) + state["gradients"]
    steps.append(Compute(0, update, ((0.0, update),)))
    return Program(tuple(steps))


def _layer_flops(cfg: ModelConfig, mesh: MeshConfig, tokens: float, length: int) -> float:
    """Forward matmul FLOPs of a layer on a device, attention over whole rows."""
    D, H = cfg.d_model, cfg.head_dim
    weights = D * H * (2 * cfg.num_heads + 2 * cfg.num_kv_heads) + 3 * D * cfg.d_ff
    scores = 2 * length * cfg.num_heads * H
    return 2 * tokens * (weights + scores) / mesh.tensor
