"""Parameter trees as plain data: nested dicts of arrays, addressed by "/"-joined paths.

Knows nothing of models. Leaves may be arrays, shape structs or the weight records of `weights`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

type Leaf = Any
type Params = dict[str, Any]


def flatten(tree: Params) -> dict[str, Leaf]:
    """Flattens nested dicts to one dict of "/"-joined paths; anything that is no dict is a leaf."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Leaf]) -> Params:
    """Inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def map_with_path(fn: Callable[[str, Leaf], Leaf], tree: Params) -> Params:
    """Applies `fn(path, leaf)` to every leaf and keeps the structure."""
    return unflatten({path: fn(path, leaf) for path, leaf in flatten(tree).items()})


def select(tree: Params, pattern: str) -> dict[str, Leaf]:
    """Returns the leaves whose whole path matches the regular expression `pattern`."""
    return {p: leaf for p, leaf in flatten(tree).items() if re.fullmatch(pattern, p)}


def count(tree: Any) -> int:
    """Counts the numbers held by the arrays of a tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def size_bytes(tree: Any) -> int:
    """Sums the bytes of the arrays of a tree as stored."""
    return sum(int(np.prod(x.shape)) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def wide(dtype: Any) -> Any:
    """Returns the dtype of sums and norms: float32, or float64 where the computation runs in it."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def cast(tree: Any, dtype: Any) -> Any:
    """Casts every floating-point array of a tree; integers (quantized values) stay as they are."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def unstack_layers(params: Params) -> Params:
    """Splits `params["layers"]` from a dict of `[L, ...]` leaves into a tuple of L dicts.

    Decoding on CPU wants this form: slices of a stacked leaf are copied at every step there. A
    weight with a method `at_layer` is asked for its layer instead of being sliced.
    """
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params
    num_layers = jax.tree.leaves(layers)[0].shape[0]
    knows = lambda x: hasattr(x, "at_layer")  # noqa: E731
    pick = lambda x, i: x.at_layer(i) if knows(x) else x[i]  # noqa: E731
    split = tuple(
        jax.tree.map(lambda x, i=i: pick(x, i), layers, is_leaf=knows) for i in range(num_layers)
    )
    return {**params, "layers": split}


def stack_layers(params: Params) -> Params:
    """Inverse of `unstack_layers`."""
    layers = params["layers"]
    if isinstance(layers, dict):
        return params
    return {**params, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}


def global_norm(tree: Any) -> jax.Array:
    """Returns the l2 norm over all numbers of a tree, summed in at least float32."""
    leaves: Iterable[jax.Array] = jax.tree.leaves(tree)
    leaves = [x.astype(wide(x.dtype)) for x in leaves]
    # Not vdot: a product over a sharded dim would have to be told where its result lies.
    return jnp.sqrt(sum(jnp.sum(x * x) for x in leaves))
