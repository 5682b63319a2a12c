"""Batches are a function of (seed, step), and every epoch has every row once."""

import threading
import time
from collections import Counter

import jax
import numpy as np
import pytest

from internjax.data.loader import ReadAhead, batches
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
        jax.tree.map(np.testing.assert_array_equal, batch, in_order[step])


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


def test_sources_are_stacked_where_rows_have_them():
    made = [row.replace(sources=np.full_like(row.tokens, i)) for i, row in enumerate(numbered(6))]
    batch = batches(made, 3, seed=0)(0)
    np.testing.assert_array_equal(batch.sources, batch.tokens)
    assert batches(numbered(6), 3, seed=0)(0).sources is None


def test_reading_ahead_gives_what_was_asked_in_any_order():
    with_threads = threading.active_count()
    reader = ReadAhead(lambda step: step * step, stop=50, threads=3, buffer=5)
    asked = [0, 1, 2, 3, 9, 10, 11, 2, 3, 3, 49]
    assert [reader(step) for step in asked] == [step * step for step in asked]
    reader.close()
    for _ in range(100):
        if threading.active_count() <= with_threads:
            break
        time.sleep(0.05)
    assert threading.active_count() <= with_threads, "its threads have ended"
    assert reader(7) == 49, "and start again"
    reader.close()


def test_batches_are_made_before_they_are_asked_for():
    made = []
    reader = ReadAhead(lambda step: made.append(step) or step, stop=9, threads=1, buffer=3)
    assert reader(4) == 4
    for _ in range(100):
        if len(made) >= 4:
            break
        time.sleep(0.02)
    assert sorted(made)[:4] == [4, 5, 6, 7] and 0 not in made, "nothing from the start is read"
    reader.close()


def test_an_error_of_a_thread_arrives_with_its_line():
    def broken(step: int):
        raise UserError(f"step {step} has no rows")

    reader = ReadAhead(broken, stop=3, threads=1)
    with pytest.raises(UserError, match="step 1 has no rows"):
        reader(1)
    with pytest.raises(UserError, match=r"step 3 is not among the steps 0\.\.2"):
        reader(3)
    with pytest.raises(UserError, match="at least 1"):
        ReadAhead(broken, stop=0)
    reader.close()
