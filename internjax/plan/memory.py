"""Bytes of a device in closed form, by kind: what `search` prunes with before it compiles.

The compiler's own figure decides; this one says where bytes go and what would make them fewer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from internjax.mesh import MeshConfig
from internjax.models.config import ModelConfig
from internjax.models.decoder import param_table
from internjax.models.params import ParamSpec

# Bytes of optimizer state for each parameter; adam8bit keeps a float32 scale every 256 numbers.
OPTIMIZER_BYTES = {
    "adamw": 8.0,
    "adam8bit": 2 + 8 / 256,
    "lion": 4.0,
    "muon": 4.0,
    "adafactor": 0.05,
}
TENSOR_AXES = {"heads", "kv_heads", "ffn", "vocab"}


@dataclass(frozen=True)
class Work:
    """What a step does, as far as its memory and time depend on it.

    Fields:
      batch_size: rows of the global batch; length: tokens of a row.
      micro_batches: parts of the batch that follow each other.
      remat: share of the layers that are recomputed in the backward pass, 0..1.
      optimizer: a key of `OPTIMIZER_BYTES`; compute_bytes: of a number in the computation.
      reduce_dtype: in which gradients travel between devices.
      cross_entropy_chunk: positions of a row whose logits exist at one time.
    """

    batch_size: int
    length: int
    micro_batches: int = 1
    remat: float = 1.0
    optimizer: str = "adamw"
    compute_bytes: int = 2
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    cross_entropy_chunk: int = 128


def micro_rows(work: Work, mesh: MeshConfig) -> float:
    """Rows of one micro-batch on one device."""
    return work.batch_size / work.micro_batches / mesh.row_ways


def memory_bytes(cfg: ModelConfig, mesh: MeshConfig, work: Work) -> dict[str, float]:
    """Returns bytes by kind; their sum is the closed form of a device's peak.

    Kinds: master (float32 parameters at rest), optimizer, weights (in the compute dtype, as
    gathered for use), gradients, activations (kept for the backward pass), workspace (the layer
    and the logits at work).
    """
    table = _table(cfg)
    whole = sum(_local(spec, mesh) for spec in table.values())
    at_rest = sum(_local(spec, mesh) / _shards(spec, mesh) for spec in table.values())
    layers = sum(_local(s, mesh) for path, s in table.items() if path.startswith("layers/"))
    layer = layers * mesh.pipe / cfg.num_layers
    outside = whole - layers
    c = work.compute_bytes
    used = {
        "master": 4 * at_rest,
        "optimizer": OPTIMIZER_BYTES[work.optimizer] * at_rest,
        # ZeRO 3 holds its own shards and two gathered layers (one at work, one on its way).
        "weights": c * (at_rest + 2 * layer + outside if mesh.zero == 3 else whole),
        "gradients": _gradient_bytes(mesh, work, whole, at_rest, layer + outside),
    }
    return used | activation_bytes(cfg, mesh, work)


_table = lru_cache(maxsize=8)(param_table)  # search asks thousands of times


def _gradient_bytes(
    mesh: MeshConfig, work: Work, whole: float, at_rest: float, piece: float
) -> float:
    """Those of a micro-batch in the compute dtype, and the float32 sum of several.

    ZeRO 2 sums shards; ZeRO 3 has no more than a layer's (and the head's) whole at a time.
    """
    if mesh.zero == 3:
        return 4 * (at_rest + piece)
    summed = at_rest if mesh.zero == 2 else whole * (work.micro_batches > 1)
    return work.compute_bytes * whole + 4 * summed


def _local(spec: ParamSpec, mesh: MeshConfig) -> float:
    """Numbers of a weight on a device before any ZeRO: tensor, pipe and expert shards."""
    size = 1.0
    for dim, axis in zip(spec.shape, spec.axes, strict=True):
        ways = mesh.tensor if axis in TENSOR_AXES else 1
        ways = {"layers": mesh.pipe, "experts": mesh.expert}.get(axis, ways)
        size *= dim / ways
    return size


def _shards(spec: ParamSpec, mesh: MeshConfig) -> int:
    """Devices that share out a weight at rest: the ZeRO group; stages of a pipeline, too, for
    embedding and head."""
    group = mesh.sizes["fsdp"]
    return {"embed": group, "edge_embed": group * (mesh.pipe if mesh.zero else 1)}.get(
        next((axis for axis in spec.axes if axis in ("embed", "edge_embed")), ""), 1
    )


def activation_bytes(cfg: ModelConfig, mesh: MeshConfig, work: Work) -> dict[str, float]:
    """Bytes kept for the backward pass, and of the one layer and logits at work.

    A recomputed layer keeps its input only, `[tokens, D]`, cut over tensor (sequence-parallel
    regions); a kept layer all that its backward pass reads (arXiv:2205.05198, section 4, with
    grouped queries, SwiGLU). Attention goes by blocks and holds no T x T scores.
    """
    tokens = micro_rows(work, mesh) * work.length / mesh.context
    layers, c, t = cfg.num_layers / mesh.pipe, work.compute_bytes, mesh.tensor
    boundary = c * tokens * cfg.d_model / t
    kept = layer_bytes(cfg, tokens, t, c)
    a_layer = work.remat * boundary + (1 - work.remat) * kept
    waiting = 0.0
    if mesh.pipe > 1:  # a stage keeps the inputs of micro-batches on their way, recomputes the rest
        parts = work.micro_batches * mesh.chunks
        on_way = parts if mesh.schedule == "gpipe" else min(2 * mesh.chunks * mesh.pipe - 1, parts)
        waiting = on_way * boundary
    logits_rows = min(work.cross_entropy_chunk, work.length) * micro_rows(work, mesh)
    logits = 3 * 4 * logits_rows * cfg.vocab_size / t
    return {
        "activations": layers * a_layer + waiting,
        "workspace": 2 * kept + logits + 4 * tokens * cfg.d_model,
    }


def layer_bytes(cfg: ModelConfig, tokens: float, tensor: int, compute_bytes: int) -> float:
    """Bytes of all that one layer's backward pass reads."""
    heads = (2 * cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim / tensor  # q, mixed, k, v
    ffn = 3 * cfg.d_ff / tensor  # gate, up, their product
    norms = 2 * cfg.d_model / tensor + 2 * cfg.d_model  # residual inputs; gathered normed inputs
    # What XLA keeps beside, read off two compiled plans: norms and rotated q and k in float32, the
    # gate once more.
    rotated = (cfg.num_heads + cfg.num_kv_heads) * cfg.head_dim
    beside = 12 * cfg.d_model + (4 * rotated + 2 * cfg.d_ff) / tensor
    return tokens * (compute_bytes * (heads + ffn + norms) + beside)


def remedies(cfg: ModelConfig, mesh: MeshConfig, work: Work) -> Iterator[tuple[str, float]]:
    """Yields changes of one key that lower the closed form, with the bytes they save."""
    now = sum(memory_bytes(cfg, mesh, work).values())
    for words, other_mesh, other_work in _changes(mesh, work):
        saved = now - sum(memory_bytes(cfg, other_mesh, other_work).values())
        if saved > 0:
            yield words, saved


def _changes(mesh: MeshConfig, work: Work) -> Iterator[tuple[str, MeshConfig, Work]]:
    if work.remat < 1:
        yield "remat=1", mesh, replace(work, remat=1.0)
    if micro_rows(work, mesh) >= 2:
        n = work.micro_batches * 2
        yield f"micro_batches={n}", mesh, replace(work, micro_batches=n)
    for stage in range(mesh.zero + 1, 4):
        if mesh.data > 1:
            yield f"mesh.zero={stage}", replace(mesh, zero=stage), work
    if mesh.zero and 0 < mesh.zero_group < mesh.data:
        yield "mesh.zero_group=0", replace(mesh, zero_group=0), work
    if mesh.data % 2 == 0 and mesh.tensor < 8:
        half = replace(mesh, data=mesh.data // 2, tensor=mesh.tensor * 2, zero_group=0)
        yield f"mesh.data={half.data} mesh.tensor={half.tensor}", half, work
    if mesh.data % 2 == 0:
        half = replace(mesh, data=mesh.data // 2, pipe=mesh.pipe * 2, zero_group=0)
        yield f"mesh.data={half.data} mesh.pipe={half.pipe}", half, work
    if work.optimizer == "adamw":
        yield "optimizer=adam8bit", mesh, replace(work, optimizer="adam8bit")
