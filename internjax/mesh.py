"""Device meshes and the one table that says which logical axis of an array lies on which mesh axis.

Mesh axes are explicit (JAX's sharding in types): a sharding mistake is an error while tracing.
"""

from dataclasses import dataclass, fields

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from internjax.errors import UserError

AXES = ("data", "fsdp", "tensor")
type MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices used.

    Fields:
      data: copies of the model, each with its own rows of the batch.
      fsdp: shards of parameters and optimizer state; its rows of the batch are its own, too.
      tensor: shards of heads, feed-forward columns and vocabulary.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Makes an explicit mesh over the first devices; refuses sizes that do not fit."""
    sizes = tuple(getattr(cfg, axis) for axis in AXES)
    devices = jax.devices() if devices is None else devices
    total = 1
    for axis, size in zip(AXES, sizes, strict=True):
        if size < 1:
            raise UserError(f"mesh.{axis}={size}: a mesh axis has at least one device.")
        total *= size
    if total > len(devices):
        named = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(
            f"mesh {named} needs {total} devices, {len(devices)} are there: make an axis smaller."
        )
    return jax.make_mesh(sizes, AXES, (AxisType.Explicit,) * len(AXES), devices=devices[:total])


@dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis (or several, or None = whole on every device).

    `embed` is the model dim of weights (sharded by FSDP at rest, gathered for use); `act_embed`
    is the model dim of activations.
    """

    batch: MeshAxes = ("data", "fsdp")
    embed: MeshAxes = "fsdp"
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    ffn: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    layers: MeshAxes = None
    length: MeshAxes = None
    act_embed: MeshAxes = None

    def spec(self, *axes: str | None) -> P:
        """Translates logical axes to a PartitionSpec; a mesh axis used twice is refused."""
        known = {f.name for f in fields(self)}
        parts, used = [], []
        for axis in axes:
            if axis is not None and axis not in known:
                raise ValueError(f"unknown logical axis {axis!r}: legal are {sorted(known)}.")
            part = None if axis is None else getattr(self, axis)
            used += [part] if isinstance(part, str) else list(part or ())
            parts.append(part)
        if len(set(used)) != len(used):
            raise ValueError(f"axes {axes} use a mesh axis twice: {used}.")
        return P(*parts)

    def gathered(self) -> "ShardingRules":
        """Returns the rules of weights in use: FSDP's shards gathered, tensor shards kept."""
        return ShardingRules(**{**self.__dict__, "embed": None})


def shardings(axes_of: dict[str, tuple], mesh: Mesh, rules: ShardingRules) -> dict:
    """Returns one NamedSharding a path from a table of logical axes a path."""
    return {path: NamedSharding(mesh, rules.spec(*axes)) for path, axes in axes_of.items()}


def check_divides(shapes: dict[str, tuple], axes_of: dict[str, tuple], mesh: Mesh, rules) -> None:
    """Refuses a mesh whose axes do not divide the dims they shard, with the numbers."""
    for path, axes in axes_of.items():
        spec = rules.spec(*axes)
        for dim, axis, part in zip(shapes[path], axes, spec, strict=True):
            names = (part,) if isinstance(part, str) else part or ()
            ways = 1
            for name in names:
                ways *= mesh.shape[name]
            if dim % ways:
                raise UserError(
                    f"{path}: {axis} has {dim} entries, which mesh {'*'.join(names)}={ways} does"
                    f" not divide; choose a divisor of {dim}."
                )
