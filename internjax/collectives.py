"""What the devices of a mesh say to each other inside a `shard_map` over all its axes.

One convention holds everywhere: a device's loss counts its own tokens, and what is minimised is
the sum of the losses of all devices. Then every collective has the transpose that JAX gives it
without replication checks (psum of psum, all_gather of psum_scatter), and the gradient of a weight
is the sum of its copies' gradients.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P
from jaxtyping import Array, Float

from internjax.mesh import MeshConfig, axis_names


@dataclass(frozen=True)
class Parallel:
    """Mesh axes that the code of a model talks over; None where nothing is cut that way.

    Fields:
      tensor: heads, columns and vocabulary are local shards; between blocks the length is.
      context: keys and values of other parts of a row are at other devices.
      expert: experts of a mixture are at other devices.
      fsdp: weights of a layer come as shards of their model dim and are gathered for use (ZeRO 3).
      tokens: all axes over which tokens are spread, for means over a whole batch.
    """

    tensor: str | None = None
    context: str | None = None
    context_mode: Literal["ring", "ulysses"] = "ring"
    expert: str | None = None
    fsdp: str | None = None
    tokens: tuple[str, ...] = ()


def parallel_of(cfg: MeshConfig) -> Parallel:
    """Returns what a model has to say to other devices under `cfg`; axes of one device drop out."""
    used = lambda axis: axis if cfg.sizes[axis] > 1 else None  # noqa: E731
    spread = ("data", "fsdp", "expert", "context", "tensor")
    return Parallel(
        tensor=used("tensor"),
        context=used("context"),
        context_mode=cfg.context_mode,
        expert=used("expert"),
        fsdp=used("fsdp") if cfg.zero == 3 else None,
        tokens=tuple(axis for axis in spread if used(axis)),
    )


ALONE = Parallel()


def gather_length(x: Float[Array, "B S D"], par: Parallel) -> Float[Array, "B T D"]:
    """Enters a tensor-parallel block: the shards of the length become whole rows."""
    if par.tensor is None:
        return x
    return lax.all_gather(x, par.tensor, axis=1, tiled=True)


def scatter_length(x: Float[Array, "B T D"], par: Parallel) -> Float[Array, "B S D"]:
    """Leaves a tensor-parallel block: partial sums are added, each device keeps its length."""
    if par.tensor is None:
        return x
    return lax.psum_scatter(x, par.tensor, scatter_dimension=1, tiled=True)


def own_length(x: Array, par: Parallel) -> Array:
    """Cuts `[B, T]`, equal on the devices of `tensor`, to the part this device counts."""
    if par.tensor is None:
        return x
    size = x.shape[1] // lax.axis_size(par.tensor)
    start = lax.axis_index(par.tensor) * size
    return lax.dynamic_slice_in_dim(x, start, size, axis=1)


def regather(x: Array, rest: P, use: P) -> Array:
    """Gathers the mesh axes that shard `x` at rest and not in use."""
    for dim, axes in _moved(rest, use):
        x = lax.all_gather(x, axes, axis=dim, tiled=True)
    return x


def rescatter(x: Array, rest: P, use: P) -> Array:
    """Adds up copies and keeps this device's shard: the transpose of `regather`."""
    for dim, axes in _moved(rest, use):
        x = lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)
    return x


def sum_copies(x: Array, spec: P, mesh: Mesh) -> Array:
    """Adds up what every device holds of an array that lies as `spec`: the axes it names apart."""
    sharded = {name for part in spec for name in axis_names(part)}
    axes = tuple(a for a in mesh.axis_names if a not in sharded and mesh.shape[a] > 1)
    return lax.psum(x, axes) if axes else x


def _moved(rest: P, use: P) -> list[tuple[int, tuple[str, ...]]]:
    """Dims of an array with the mesh axes that `rest` has there and `use` has not."""
    use = (*use, *(None,) * (len(rest) - len(use)))
    pairs = [
        (dim, tuple(name for name in axis_names(a) if name not in axis_names(b)))
        for dim, (a, b) in enumerate(zip(rest, use, strict=True))
    ]
    return [(dim, axes) for dim, axes in pairs if axes]


def token_mean(x: Array, count: Array, par: Parallel) -> Array:
    """Returns the sum of `x` over the count of tokens, both over every device that has tokens."""
    if not par.tokens:
        return x / count
    return lax.psum(x, par.tokens) / lax.psum(count, par.tokens)


def as_float(x: Array, dtype) -> Array:
    """Casts floating-point arrays and leaves integers alone."""
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
