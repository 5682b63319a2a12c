"""Device meshes and the one table that says which logical axis of an array lies on which mesh axis.

Mesh axes are explicit (JAX's sharding in types). What code does on one device of a mesh, and what
it says to the others, is in `collectives.py`.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from internjax.errors import UserError

# Outermost first: neighbours on the last axes are neighbours in a machine, on its fastest links.
AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")
WAYS = ("data", "tensor", "pipe", "context", "expert")
type MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class MeshConfig:
    """How many ways the work is cut; the product of the ways is the number of devices.

    Fields:
      data: parts of the batch, each with a copy of the model; 0 takes the devices that are left.
      tensor: shards of heads, feed-forward columns, vocabulary, and of the length between blocks.
      pipe: stages, each with a share of the layers.
      context: shards of the length of every row.
      expert: shards of a mixture's experts; they have rows of their own, too.
      zero: what the data-parallel devices share out instead of copying (ZeRO, arXiv:1910.02054):
        0 nothing, 1 master weights and optimizer state, 2 also the gradients of every micro-batch,
        3 also the weights in use, which are gathered layer by layer.
      zero_group: devices that share one copy of the state; 0 all of `data`. Smaller groups
        communicate in a node only and hold more (Hybrid ZeRO, InternEvo's zero1.size).
      schedule: order of a pipeline's forwards and backwards. gpipe: all forwards first; 1f1b: one
        backward after each forward, so that a stage holds at most `pipe` micro-batches.
      chunks: parts of a stage, visited in turn (interleaved 1F1B, arXiv:2104.04473); a bubble
        `chunks` times smaller.
      context_mode: ring passes keys and values round; ulysses exchanges heads for length.
    """

    data: int = 1
    tensor: int = 1
    pipe: int = 1
    context: int = 1
    expert: int = 1
    zero: Literal[0, 1, 2, 3] = 1
    zero_group: int = 0
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    chunks: int = 1
    context_mode: Literal["ring", "ulysses"] = "ring"

    def __post_init__(self):
        for way in WAYS:
            least = 0 if way == "data" else 1
            if getattr(self, way) < least:
                raise UserError(f"mesh.{way}={getattr(self, way)}: a way has at least one device.")
        if self.zero not in (0, 1, 2, 3):
            raise UserError(f"mesh.zero={self.zero}: the stages of ZeRO are 0, 1, 2 and 3.")
        if self.zero_group < 0 or (self.data and self.data % (self.zero_group or self.data)):
            raise UserError(
                f"mesh.zero_group={self.zero_group} does not cut mesh.data={self.data} evenly:"
                " choose a divisor, or 0 for one group of all."
            )
        if self.chunks < 1 or (self.chunks > 1 and (self.pipe == 1 or self.schedule != "1f1b")):
            raise UserError(
                f"mesh.chunks={self.chunks}: parts of a stage exist in a 1f1b pipeline only"
                f" (mesh.pipe={self.pipe}, mesh.schedule={self.schedule})."
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along every axis of `AXES`."""
        group = (self.zero_group or self.data) if self.zero else 1
        ways = {way: getattr(self, way) for way in WAYS}
        return {axis: (ways | {"data": self.data // group, "fsdp": group})[axis] for axis in AXES}

    @property
    def num_devices(self) -> int:
        """Devices in use."""
        return math.prod(getattr(self, way) for way in WAYS)

    @property
    def row_ways(self) -> int:
        """Parts into which the rows of a batch are cut."""
        return self.data * self.expert

    def resolve(self, num_devices: int) -> "MeshConfig":
        """Returns the config with `data=0` replaced by what `num_devices` leave."""
        if self.data:
            return self
        others = self.tensor * self.pipe * self.context * self.expert
        if num_devices % others:
            raise UserError(
                f"{num_devices} devices are there, and tensor x pipe x context x expert ="
                f" {others} does not divide them: change mesh.data or one of these."
            )
        return replace(self, data=num_devices // others)


def make_mesh(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Makes an explicit mesh over the first devices; refuses sizes that do not fit."""
    devices = jax.devices() if devices is None else devices
    cfg = cfg.resolve(len(devices))
    if cfg.num_devices > len(devices):
        named = " x ".join(f"{way} {getattr(cfg, way)}" for way in WAYS if getattr(cfg, way) > 1)
        raise UserError(
            f"mesh {named} needs {cfg.num_devices} devices, {len(devices)} are there: make a way"
            " smaller."
        )
    sizes, used = tuple(cfg.sizes.values()), devices[: cfg.num_devices]
    return jax.make_mesh(sizes, AXES, (AxisType.Explicit,) * len(AXES), devices=used)


@dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis (or several, or None = whole on every device).

    `embed` is the model dim of weights. `edge_embed` is that of the embedding and the head, which
    only the first and the last stage of a pipeline use: at rest all stages share them out.
    """

    batch: MeshAxes = ("data", "fsdp", "expert")
    length: MeshAxes = "context"
    embed: MeshAxes = "fsdp"
    edge_embed: MeshAxes = ("pipe", "fsdp")
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    ffn: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"
    experts: MeshAxes = "expert"
    layers: MeshAxes = "pipe"
    chunks: MeshAxes = None
    head_dim: MeshAxes = None

    def spec(self, *axes: str | None) -> P:
        """Translates logical axes to a PartitionSpec; a mesh axis used twice is refused."""
        known = {f.name for f in fields(self)}
        parts, used = [], []
        for axis in axes:
            if axis is not None and axis not in known:
                raise ValueError(f"unknown logical axis {axis!r}: legal are {sorted(known)}.")
            part = None if axis is None else getattr(self, axis)
            used += axis_names(part)
            parts.append(part)
        if len(set(used)) != len(used):
            raise ValueError(f"axes {axes} use a mesh axis twice: {used}.")
        return P(*parts)


def rules_at_rest(cfg: MeshConfig) -> ShardingRules:
    """Returns where the training state lies between steps: shared out from ZeRO stage 1 on."""
    if cfg.zero:
        return ShardingRules()
    return ShardingRules(embed=None, edge_embed=None)


def rules_in_use(cfg: MeshConfig) -> ShardingRules:
    """Returns where the weights lie while a step runs: whole layers, but for ZeRO stage 3."""
    return ShardingRules(embed="fsdp" if cfg.zero == 3 else None, edge_embed=None)


def shardings(axes_of: dict[str, tuple], mesh: Mesh, rules: ShardingRules) -> dict:
    """Returns one NamedSharding a path from a table of logical axes a path."""
    return {path: NamedSharding(mesh, rules.spec(*axes)) for path, axes in axes_of.items()}


def check_divides(shapes: dict[str, tuple], axes_of: dict[str, tuple], mesh: Mesh, rules) -> None:
    """Refuses a mesh whose axes do not divide the dims they shard, with the numbers."""
    for path, axes in axes_of.items():
        for dim, axis, part in zip(shapes[path], axes, rules.spec(*axes), strict=True):
            ways = math.prod(mesh.shape[name] for name in axis_names(part))
            if dim % ways:
                named = "*".join(axis_names(part))
                raise UserError(
                    f"{path}: {axis} has {dim} entries, which mesh {named}={ways} does"
                    f" not divide; choose a divisor of {dim}."
                )


def axis_names(part: MeshAxes) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a PartitionSpec."""
    return (part,) if isinstance(part, str) else tuple(part or ())
