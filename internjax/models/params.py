"""The table of a model's weights: every weight named once with shape, logical axes and init."""

from dataclasses import dataclass, replace

import jax
from jax.sharding import Mesh
from jaxtyping import Array

from internjax.errors import UserError
from internjax.mesh import ShardingRules, check_divides, shardings
from internjax.models.init import Init
from internjax.tree import Params, unflatten


@dataclass(frozen=True)
class ParamSpec:
    """One weight: its shape, the logical axis of every dim, and how it starts."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init


def init_from(table: dict[str, ParamSpec], key: Array, dtype) -> Params:
    """Draws every weight of a table; the key of a weight depends on its place in the table only."""
    keys = jax.random.split(key, len(table))
    return unflatten(
        {
            path: spec.init(keys[i], spec.shape, dtype)
            for i, (path, spec) in enumerate(table.items())
        }
    )


def param_specs(table: dict[str, ParamSpec], rules: ShardingRules) -> Params:
    """Returns the tree of PartitionSpecs of a table."""
    return unflatten({path: rules.spec(*spec.axes) for path, spec in table.items()})


def check_table(table: dict[str, ParamSpec], mesh: Mesh, rules: ShardingRules) -> None:
    """Refuses a mesh that does not divide the table's dims evenly, with the numbers."""
    axes = {path: spec.axes for path, spec in table.items()}
    check_divides({path: spec.shape for path, spec in table.items()}, axes, mesh, rules)


def param_shardings(table: dict[str, ParamSpec], mesh: Mesh, rules: ShardingRules) -> Params:
    """Returns the tree of NamedShardings of a table; refuses a mesh that does not divide it."""
    check_table(table, mesh, rules)
    return unflatten(shardings({path: spec.axes for path, spec in table.items()}, mesh, rules))


def cut_table(table: dict[str, ParamSpec], chunks: int) -> dict[str, ParamSpec]:
    """Returns the table of a model whose layers come as `[chunks, L / chunks, ...]`.

    That is the same array in the same order; a stage of an interleaved pipeline holds one slice of
    the second dim, layers that do not follow each other.
    """
    if chunks == 1:
        return table
    cut = {}
    for path, spec in table.items():
        L = spec.shape[0]
        if path.startswith("layers/"):
            if L % chunks:
                raise UserError(f"{L} layers cannot be cut into mesh.chunks={chunks} equal parts.")
            spec = replace(
                spec, shape=(chunks, L // chunks, *spec.shape[1:]), axes=("chunks", *spec.axes)
            )
        cut[path] = spec
    return cut


def cut_layers(params: Params, chunks: int) -> Params:
    """Reshapes stacked layers `[L, ...]` to `[chunks, L / chunks, ...]`."""
    if chunks == 1:
        return params
    cut = lambda x: x.reshape(chunks, x.shape[0] // chunks, *x.shape[1:])  # noqa: E731
    return {**params, "layers": jax.tree.map(cut, params["layers"])}
