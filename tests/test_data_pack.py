"""Packing loses no token, keeps documents apart, and counts exactly the targets it was told to."""

from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from internjax.data.pack import OPEN_ROWS, fill, pack
from internjax.errors import UserError

PAIRS = st.lists(
    st.lists(st.tuples(st.integers(1, 99), st.integers(0, 1)), max_size=25).map(
        lambda sample: ([i for i, _ in sample], [m for _, m in sample])
    ),
    max_size=12,
)
LAW = settings(deadline=None, max_examples=60)
LENGTHS = st.integers(2, 16)


def segments_of(row):
    """[(ids, positions, targets, loss)] of one row, and checks that padding is only at its end."""
    count = int(row.segment_ids.max())
    used = int((row.segment_ids > 0).sum())
    assert (row.segment_ids[:used] > 0).all() and (np.diff(row.segment_ids[:used]) >= 0).all()
    assert sorted(set(row.segment_ids[:used].tolist())) == list(range(1, count + 1))
    fields = (row.tokens, row.positions, row.targets, row.loss_mask)
    return [
        tuple(each[row.segment_ids == number].tolist() for each in fields)
        for number in range(1, count + 1)
    ]


@LAW
@given(samples=PAIRS, length=LENGTHS)
def test_first_fit_keeps_every_sample_as_its_own_segments(samples, length):
    rows = list(pack(samples, length, pad_id=7))
    found = Counter(tuple(s[0]) for row in rows for s in segments_of(row))
    pieces = [ids[i : i + length] for ids, _ in samples for i in range(0, len(ids), length)]
    assert found == Counter(map(tuple, pieces))


@LAW
@given(samples=PAIRS, length=LENGTHS)
def test_concat_is_the_stream_cut_at_every_length(samples, length):
    rows = list(pack(samples, length, mode="concat"))
    stream = [i for ids, _ in samples for i in ids]
    cut = [stream[i : i + length] for i in range(0, len(stream), length)]
    assert [segments_of(row)[0][0] for row in rows] == cut
    assert all(row.segment_ids.max() == 1 for row in rows)


@pytest.mark.parametrize("mode", ["first_fit", "concat"])
@LAW
@given(samples=PAIRS, length=LENGTHS)
def test_positions_restart_and_targets_stay_inside_the_segment(mode, samples, length):
    for row in pack(samples, length, mode=mode, pad_id=7):
        for ids, positions, targets, loss in segments_of(row):
            assert positions == list(range(len(ids)))
            assert targets[:-1] == ids[1:]
            assert loss[-1] == 0
        padding = row.segment_ids == 0
        assert not row.loss_mask[padding].any() and (row.tokens[padding] == 7).all()
        assert row.tokens.dtype == row.targets.dtype == row.segment_ids.dtype == np.int32
        assert row.positions.dtype == np.int32 and row.loss_mask.dtype == np.float32
        assert all(leaf.shape == (length,) for leaf in jax.tree.leaves(row))


@LAW
@given(samples=PAIRS, length=LENGTHS)
def test_the_loss_counts_the_marked_ids_that_have_a_predecessor(samples, length):
    counted = Counter()
    for row in pack(samples, length):
        counted.update(row.targets[row.loss_mask == 1].tolist())
    expected = Counter()
    for ids, mask in samples:
        for start in range(0, len(ids), length):
            piece = list(zip(ids, mask, strict=True))[start : start + length]
            expected.update(i for i, m in piece[1:] if m)
    assert counted == expected


def test_a_row_written_by_hand():
    rows = list(pack([([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])], 8, pad_id=2))
    assert len(rows) == 1
    (row,) = rows
    assert row.tokens.tolist() == [5, 6, 7, 8, 9, 2, 2, 2]
    assert row.targets.tolist() == [6, 7, 2, 9, 2, 2, 2, 2]
    assert row.segment_ids.tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert row.loss_mask.tolist() == [1, 1, 0, 1, 0, 0, 0, 0]
    assert fill(rows) == 5 / 8


def test_first_fit_uses_the_room_that_is_left():
    samples = [(list(range(1, n + 1)), [1] * n) for n in (6, 5, 2, 3)]
    rows = list(pack(samples, 8))
    assert len(rows) == 2 and fill(rows) == 1.0


def test_rows_come_while_samples_still_come():
    """Memory is bounded: an endless source is packed lazily."""

    def endless():
        while True:
            yield [1, 2, 3], [1, 1, 1]

    rows = pack(endless(), 4)  # no two samples share a row
    assert [next(rows).tokens.tolist() for _ in range(3)] == [[1, 2, 3, 0]] * 3
    assert OPEN_ROWS < 1000


@pytest.mark.parametrize(
    ("samples", "length", "mode", "match"),
    [
        ([([1, 2], [1])], 4, "first_fit", "Sample 0 has 2 ids but 1 mask"),
        ([], 1, "first_fit", "at least 2"),
        ([], 4, "best_fit", "first_fit, concat"),
    ],
)
def test_what_cannot_be_packed_is_refused(samples, length, mode, match):
    with pytest.raises(UserError, match=match):
        list(pack(samples, length, mode=mode))
