"""The rows of a step in closed form agree with counting them one by one."""

import pytest
from hypothesis import given, settings, strategies as st

from internjax.data.schedule import BatchPlan
from internjax.errors import UserError


@settings(deadline=None, max_examples=200)
@given(
    start=st.integers(1, 5),
    increment=st.integers(1, 4),
    every=st.integers(1, 6),
    stages=st.integers(0, 4),
    skips=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), max_size=4),
    step=st.integers(0, 60),
)
def test_a_step_is_found_without_counting(start, increment, every, stages, skips, step):
    plan = BatchPlan(
        start + increment * stages,
        rampup=f"{start} {increment} {every}",
        skip_batches=",".join(f"{a}-{a + n}" if n else str(a) for a, n in skips),
    )
    skipped = {batch for a, n in skips for batch in range(a, a + n + 1)}
    row, steps = 0, []  # what a loop over batches does, as InternEvo's sampler
    for batch in range(200):
        size = min(start + increment * (batch // every), plan.batch_size)
        if batch not in skipped:
            steps.append((batch, row, size))
        row += size
    assert (plan.batch_of(step), plan.first_row(step), plan.size(step)) == steps[step]


def test_known_values():
    plan = BatchPlan(8, rampup="2 3 10", skip_batches="3, 5-7")
    assert [plan.batch_of(step) for step in range(6)] == [0, 1, 2, 4, 8, 9]
    assert [plan.size(step) for step in (0, 5, 6, 100)] == [2, 2, 5, 8]
    assert list(plan.sizes) == [2, 5, 8] and list(BatchPlan(4).sizes) == [4]
    assert plan.rows_before(20) == 10 * 2 + 10 * 5
    assert BatchPlan(4).first_row(10**12) == 4 * 10**12, "any step costs the same"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "at least 1"),
        ({"rampup": "4 2"}, "'start incr every'"),
        ({"rampup": "0 2 1"}, "from 1"),
        ({"rampup": "4 3 1"}, "do not lead to batch_size=8"),
        ({"rampup": "9 1 1"}, "do not lead"),
        ({"skip_batches": "a"}, "neither a batch number"),
        ({"skip_batches": "4-"}, "neither a batch number"),
        ({"skip_batches": "7-4"}, "ends before it begins"),
    ],
)
def test_misspelt_plans_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        BatchPlan(**{"batch_size": 8} | options)
