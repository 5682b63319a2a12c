"""Batches are a function of (seed, step), and every epoch has every row once."""

from collections import Counter

import numpy as np
import pytest

from internjax.data.loader import batches
from internjax.errors import UserError
from tests.training import rows


def numbered(count: int):
    made = rows(count)
    return [row.replace(tokens=np.full_like(row.tokens, i)) for i, row in enumerate(made)]


def firsts(batch_at, steps) -> list[int]:
    return [int(x) for step in steps for x in batch_at(step).tokens[:, 0]]


def test_a_step_has_its_batch_whatever_was_asked_before():
    straight = batches(numbered(10), 4, seed=3)
    resumed = batches(numbered(10), 4, seed=3)
    in_order = [straight(step) for step in range(8)]
    for step in (6, 2, 7):
        batch = resumed(step)
        for name in batch.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(batch, name), getattr(in_order[step], name))


def test_every_epoch_has_every_row_once_in_another_order():
    batch_at = batches(numbered(12), 4, seed=0)
    first, second = firsts(batch_at, range(3)), firsts(batch_at, range(3, 6))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second and first != list(range(12))
    assert firsts(batches(numbered(12), 4, seed=1), range(3)) != first


def test_epochs_need_not_be_whole_batches():
    batch_at = batches(numbered(5), 4, seed=0)
    counts = Counter(firsts(batch_at, range(5)))  # 20 rows are 4 epochs of 5
    assert counts == dict.fromkeys(range(5), 4)
    assert batch_at(1).tokens.shape == (4, 16)


def test_no_rows_are_refused():
    with pytest.raises(UserError, match="training set is empty"):
        batches([], 4, seed=0)
