"""Samples of any length into rows of one length, without attention between documents.

Two ways, as in InternEvo: keep samples apart (`pack_sample_into_one=False`) or cut one long stream
(`True`). Memory is bounded by the rows still open, whatever the number of samples.
"""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field

import numpy as np

from internjax.data.batch import Batch
from internjax.errors import UserError

Sample = tuple[Sequence[int], Sequence[int]]
"""(ids, loss mask), equally long; mask 1 where the model shall learn to write that id."""

OPEN_ROWS = 64  # rows that first_fit keeps looking for small enough samples


def pack(
    samples: Iterable[Sample], length: int, *, mode: str = "first_fit", pad_id: int = 0
) -> Iterator[Batch]:
    """Yields rows, each a `Batch` whose fields are `[T]` with T = `length`.

    Args:
      samples: documents or chats. One longer than `length` is split into several segments.
      length: tokens a row, >= 2.
      mode: "first_fit" puts each sample as a segment of its own into the first open row that has
        room; "concat" joins everything into one stream and cuts it, so a row is one segment and
        documents in it see each other.
      pad_id: fills what is left; it lies in segment 0 and never counts.

    Raises:
      UserError: a sample whose ids and mask differ in length, an unknown mode, a length below 2.
    """
    if mode not in _MODES:
        raise UserError(f"mode={mode!r} is no way of packing; legal are {', '.join(_MODES)}.")
    if length < 2:
        raise UserError(f"length={length}: a row needs at least 2 tokens to hold one target.")
    return (_row(segments, length, pad_id) for segments in _MODES[mode](_checked(samples), length))


def fill(rows: Sequence[Batch]) -> float:
    """Returns the share of positions that are not padding."""
    return float(np.mean([np.mean(row.segment_ids > 0) for row in rows]))


@dataclass
class _Segment:
    ids: np.ndarray  # [n]
    learn: np.ndarray  # [n], whether an id counts as a target

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "_Segment":
        return _Segment(self.ids[part], self.learn[part])


@dataclass
class _OpenRow:
    room: int
    pieces: list = field(default_factory=list)


def _checked(samples: Iterable[Sample]) -> Iterator[_Segment]:
    for index, (ids, mask) in enumerate(samples):
        if len(ids) != len(mask):
            raise UserError(f"Sample {index} has {len(ids)} ids but {len(mask)} mask values.")
        if len(ids):
            yield _Segment(np.asarray(ids, np.int32), np.asarray(mask, np.float32))


def first_fit[Piece: Sized](pieces: Iterable[Piece], length: int) -> Iterator[list[Piece]]:
    """Yields the pieces of each row: a piece goes into the first open row that has room for it.

    Args:
      pieces: anything with a length that can be sliced: token ids, or a `range` of positions.
      length: of a row; a longer piece is cut into several.
    """
    rows: list[_OpenRow] = []
    for whole in pieces:
        for piece in _split(whole, length):
            size = len(piece)
            row = next((row for row in rows if row.room >= size), None)
            if row is None:
                row = _OpenRow(length)
                rows.append(row)
            row.pieces.append(piece)
            row.room -= size
            if row.room == 0:
                rows.remove(row)
                yield row.pieces
            elif len(rows) > OPEN_ROWS:
                fullest = min(rows, key=lambda row: row.room)
                rows.remove(fullest)
                yield fullest.pieces
    yield from (row.pieces for row in rows)


def _concat(segments: Iterable[_Segment], length: int) -> Iterator[list[_Segment]]:
    waiting: list[_Segment] = []
    count = 0
    for segment in segments:
        waiting.append(segment)
        count += len(segment.ids)
        if count >= length:
            *full, rest = _split(_join(waiting), length)
            if len(rest.ids) == length:
                full, rest = [*full, rest], None
            yield from ([each] for each in full)
            waiting = [rest] if rest else []
            count = len(rest.ids) if rest else 0
    if waiting:
        yield [_join(waiting)]


_MODES = {"first_fit": first_fit, "concat": _concat}


def _split[Piece: Sized](piece: Piece, length: int) -> list[Piece]:
    return [piece[i : i + length] for i in range(0, len(piece), length)]


def _join(segments: list[_Segment]) -> _Segment:
    return _Segment(
        np.concatenate([each.ids for each in segments]),
        np.concatenate([each.learn for each in segments]),
    )


def _row(segments: list[_Segment], length: int, pad_id: int) -> Batch:
    tokens, targets = np.full((2, length), pad_id, np.int32)
    segment_ids, positions = np.zeros((2, length), np.int32)
    loss_mask = np.zeros(length, np.float32)
    at = 0
    for number, segment in enumerate(segments, start=1):
        end = at + len(segment.ids)
        tokens[at:end] = segment.ids
        targets[at : end - 1] = segment.ids[1:]  # the last id of a segment has no target
        segment_ids[at:end] = number
        positions[at:end] = np.arange(end - at)
        loss_mask[at : end - 1] = segment.learn[1:]
        at = end
    return Batch(tokens, targets, segment_ids, positions, loss_mask)
