"""The table of a model's weights: every weight named once with shape, logical axes and init."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from internjax.mesh import ShardingRules, check_divides, shardings
from internjax.tree import Params, unflatten

type Init = Callable[[Array, tuple[int, ...], jnp.dtype], Array]


@dataclass(frozen=True)
class ParamSpec:
    """One weight: its shape, the logical axis of every dim, and how it starts."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init


def normal(std: float) -> Init:
    """Makes an initializer drawing from N(0, std^2)."""

    def init(key: Array, shape: tuple[int, ...], dtype) -> Array:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)

    return init


def ones(key: Array, shape: tuple[int, ...], dtype) -> Array:
    """Starts norms at one."""
    return jnp.ones(shape, dtype)


def zeros(key: Array, shape: tuple[int, ...], dtype) -> Array:
    """Starts biases at zero."""
    return jnp.zeros(shape, dtype)


def init_from(table: dict[str, ParamSpec], key: Array, dtype) -> Params:
    """Draws every weight of a table; the key of a weight depends on its place in the table only."""
    keys = jax.random.split(key, len(table))
    return unflatten(
        {
            path: spec.init(keys[i], spec.shape, dtype)
            for i, (path, spec) in enumerate(table.items())
        }
    )


def param_shardings(table: dict[str, ParamSpec], mesh: Mesh, rules: ShardingRules) -> Params:
    """Returns the tree of NamedShardings of a table; refuses a mesh that does not divide it."""
    axes = {path: spec.axes for path, spec in table.items()}
    check_divides({path: spec.shape for path, spec in table.items()}, axes, mesh, rules)
    return unflatten(shardings(axes, mesh, rules))
