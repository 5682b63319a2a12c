"""The keyed permutation is one, differs by key, and never changes."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from internjax.data.permute import key_of, keys_of, permute


def whole(count: int, key: int) -> np.ndarray:
    return permute(np.arange(count), count, np.full(count, key, np.uint64))


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_every_index_appears_once(count, key):
    assert sorted(whole(count, key).tolist()) == list(range(count))


def test_each_index_may_have_its_own_key_and_comes_alone():
    keys = keys_of(key_of("source", 0, "en"), np.arange(5))
    together = permute(np.full(5, 7), 1000, keys)
    alone = [int(permute(np.array([7]), 1000, keys[i : i + 1])[0]) for i in range(5)]
    assert together.tolist() == alone
    assert len(set(alone)) == 5


def test_places_are_spread_evenly():
    """Over 2,000 keys, index 0 of 8 falls on each place about 250 times (sd 14.8; 5 sd)."""
    keys = keys_of(key_of(1), np.arange(2000))
    counts = np.bincount(permute(np.zeros(2000, np.int64), 8, keys), minlength=8)
    assert (np.abs(counts - 250) < 74).all()
    neighbours = np.diff(whole(1000, 3)) == 1  # expected once in 1,000
    assert neighbours.sum() < 8


def test_the_order_is_part_of_a_result():
    """The same seed must give the same data for ever: these values were written down once."""
    key = key_of("source", 0, "en")
    assert key == 8068679552095834077
    assert whole(10, key).tolist() == [2, 1, 4, 9, 0, 5, 6, 7, 3, 8]
    far = permute(np.array([2**40]), 2**41 + 1, np.array([5], np.uint64))
    assert far.tolist() == [1079417515755]


def test_a_space_of_one_and_of_none():
    assert whole(1, 9).tolist() == [0]
    with pytest.raises(AssertionError, match="no index"):
        permute(np.array([0]), 0, np.array([1], np.uint64))
