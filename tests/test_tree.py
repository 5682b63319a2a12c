"""Trees as data: paths, selection, counting, casting."""

import jax.numpy as jnp
import numpy as np

from internjax.tree import cast, count, flatten, map_with_path, select, size_bytes, unflatten


def tree():
    return {"a": {"w": jnp.ones((2, 3)), "ids": jnp.arange(4)}, "norm": jnp.ones(5)}


def test_flatten_and_back():
    flat = flatten(tree())
    assert set(flat) == {"a/w", "a/ids", "norm"}
    assert set(unflatten(flat)["a"]) == {"w", "ids"}


def test_select_matches_whole_paths():
    assert set(select(tree(), "a/.*")) == {"a/w", "a/ids"}
    assert select(tree(), "a") == {}


def test_map_with_path_keeps_the_structure():
    doubled = map_with_path(lambda path, x: 2 * x if path == "a/w" else x, tree())
    np.testing.assert_array_equal(doubled["a"]["w"], np.full((2, 3), 2.0))
    np.testing.assert_array_equal(doubled["norm"], np.ones(5))


def test_count_and_bytes():
    assert count(tree()) == 6 + 4 + 5
    assert size_bytes(tree()) == 4 * 15


def test_cast_leaves_integers_alone():
    narrow = cast(tree(), jnp.bfloat16)
    assert narrow["a"]["w"].dtype == jnp.bfloat16
    assert narrow["a"]["ids"].dtype == jnp.int32
