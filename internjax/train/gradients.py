"""Gradients of a loss over micro-batches, on one device or on a mesh (ZeRO stages 0 to 3).

On a mesh everything up to the summed gradients is one `shard_map` over all axes; the collectives in
it are those written here and in the model, no others. See `collectives.py` for the convention.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P
from jaxtyping import Array

from internjax.collectives import as_float, regather, rescatter, sum_copies
from internjax.data.batch import Batch
from internjax.tree import Params, wide

type LossFn = Callable[[Params, Batch, Any], tuple[Array, dict[str, Array]]]
type Parts = dict[str, Array]
type Gradients = Callable[[Params, Batch, Any], tuple[Parts, Params]]
type Specs = Any
"""Tree of PartitionSpecs, or a prefix of one."""


@dataclass(frozen=True)
class Layout:
    """Where things lie on a mesh.

    Fields:
      mesh: the devices.
      rest: specs of the parameters between steps, and of their gradients after one.
      use: specs of the working copy that the loss is given.
      batch: spec of every field of a batch; frozen: specs of what is not trained.
      scatter_each: scatter the gradients of every micro-batch (ZeRO 2) instead of their sum.
    """

    mesh: Mesh
    rest: Specs
    use: Specs
    batch: P
    frozen: Specs = P()
    scatter_each: bool = False


def make_gradients(
    loss_fn: LossFn,
    *,
    micro_batches: int = 1,
    layout: Layout | None = None,
    dtype: str | None = None,
    reduce_dtype: str | None = None,
) -> Gradients:
    """Makes `gradients(params, batch, frozen) -> (parts, grads)` of the summed loss.

    With n micro-batches the rows are cut into n parts and their gradients added; every part counts
    by its tokens, so the result is that of the whole batch at once.

    Args:
      loss_fn: of a working copy of the parameters; on a mesh, of this device's shards and rows.
      dtype: of the working copy; None keeps the parameters'. Norms always keep theirs.
      reduce_dtype: in which gradients travel between devices; None as they are accumulated.
    """

    def local(params: Params, batch: Batch, frozen: Any) -> tuple[Parts, Params]:
        work = working_copy(params, dtype)
        if layout is not None:
            work = jax.tree.map(regather, work, layout.rest, layout.use)
        each = lambda grads: grads  # noqa: E731
        if layout is not None and layout.scatter_each:
            each = lambda grads: scatter(grads, layout, reduce_dtype)  # noqa: E731
        parts, grads = accumulate(loss_fn, work, batch, frozen, micro_batches, each)
        if layout is not None:
            if not layout.scatter_each:
                grads = scatter(grads, layout, reduce_dtype)
            grads = add_copies(grads, layout, reduce_dtype)
            parts = jax.tree.map(lambda x: lax.psum(x, layout.mesh.axis_names), parts)
        return parts, jax.tree.map(lambda g, p: g.astype(wide(p.dtype)), grads, params)

    return local if layout is None else on_mesh(local, layout, (P(), layout.rest))


def make_parts(
    loss_fn: LossFn, *, layout: Layout | None = None, dtype: str | None = None
) -> Callable[[Params, Batch, Any], Parts]:
    """Makes the sums of a loss over a batch without its gradients: for evaluation."""

    def local(params: Params, batch: Batch, frozen: Any) -> Parts:
        work = working_copy(params, dtype)
        if layout is None:
            return loss_fn(work, batch, frozen)[1]
        work = jax.tree.map(regather, work, layout.rest, layout.use)
        parts = loss_fn(work, batch, frozen)[1]
        return jax.tree.map(lambda x: lax.psum(x, layout.mesh.axis_names), parts)

    return local if layout is None else on_mesh(local, layout, P())


def on_mesh(local: Callable, layout: Layout, out: Specs) -> Callable:
    """Runs `local` on every device of a mesh, each with its shards."""
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(layout.rest, layout.batch, layout.frozen),
        out_specs=out,
        check_vma=False,
    )


def working_copy(params: Params, dtype: str | None) -> Params:
    """Casts matrices and embeddings to the dtype of the computation; norms and routers stay."""
    if dtype is None:
        return params

    def cast(path, x: Array) -> Array:
        name = jax.tree_util.keystr(path)
        return x if "norm" in name or "router" in name else as_float(x, jnp.dtype(dtype))

    return jax.tree_util.tree_map_with_path(cast, params)


def accumulate(
    loss_fn: LossFn,
    work: Params,
    batch: Batch,
    frozen: Any,
    micro_batches: int,
    each: Callable[[Params], Params],
) -> tuple[Parts, Params]:
    """Adds up the gradients of micro-batches, in at least float32; `each` is applied to each."""

    def summed(work: Params, batch: Batch) -> tuple[Array, Parts]:
        _, parts = loss_fn(work, batch, frozen)
        return parts["loss_sum"], parts

    def gradients(batch: Batch) -> tuple[Parts, Params]:
        (_, parts), grads = jax.value_and_grad(summed, has_aux=True)(work, batch)
        return parts, each(grads)

    if micro_batches == 1:
        return gradients(batch)
    cut = jax.tree.map(lambda x: cut_rows(x, micro_batches), batch)
    shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], cut))[1]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, wide(s.dtype)), shapes)

    def add(total: Params, part: Batch) -> tuple[Params, Parts]:
        parts, grads = gradients(part)
        return jax.tree.map(lambda a, g: a + g.astype(a.dtype), total, grads), parts

    grads, parts = lax.scan(add, zeros, cut)
    return jax.tree.map(lambda x: x.sum(axis=0), parts), grads


def cut_rows(rows: Array, parts: int) -> Array:
    """Cuts `[B, ...]` to `[parts, B / parts, ...]`; part i takes rows i, i + parts, ...

    So every device of a mesh cuts the rows that it has, and none moves.
    """
    return jnp.reshape(rows, (rows.shape[0] // parts, parts, *rows.shape[1:])).swapaxes(0, 1)


def scatter(grads: Params, layout: Layout, dtype: str | None) -> Params:
    """Adds up gradients over the devices that share out the state; each keeps its shard."""
    grads = _travelling(grads, dtype)
    return jax.tree.map(rescatter, grads, layout.rest, layout.use)


def add_copies(grads: Params, layout: Layout, dtype: str | None) -> Params:
    """Adds up the shards of gradients over the copies of the state."""
    grads = _travelling(grads, dtype)
    return jax.tree.map(lambda g, spec: sum_copies(g, spec, layout.mesh), grads, layout.rest)


def _travelling(grads: Params, dtype: str | None) -> Params:
    return grads if dtype is None else jax.tree.map(lambda g: as_float(g, jnp.dtype(dtype)), grads)
