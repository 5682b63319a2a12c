"""Rows of one source of token shards, any of them at once: row j is a list of token ranges.

The tokens of all documents are one stream; a row is made of runs of it. Two ways cut the stream
every T tokens, so row j is known without any table; the third, first fit, needs a table that is
computed from the lengths of the documents. In all of them a target is the token that follows in the
same document, also across the end of a row, so every token but the first of a document is learned
once an epoch, wherever the cuts are.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64

from internjax.data.batch import Batch
from internjax.data.pack import first_fit
from internjax.data.shards import TokenShards
from internjax.errors import Corrupt, UserError

Run = tuple[int, int]  # tokens start..stop-1 of the stream

PACKINGS = {
    "apart": "the stream cut every T; no document sees another (pack_sample_into_one=False)",
    "concat": "the stream cut every T; a row is one text (pack_sample_into_one=True)",
    "first_fit": "documents whole where they fit, padding behind them",
}


class Rows:
    """The rows of one source.

    Args:
      shards: the documents. length: tokens a row, T >= 2. packing: one of `PACKINGS`.
    """

    def __init__(self, shards: TokenShards, length: int, packing: str):
        if packing not in PACKINGS:
            raise UserError(f"packing={packing!r} is not known; legal are {', '.join(PACKINGS)}.")
        if length < 2:
            raise UserError(f"length={length}: a row needs at least 2 tokens to hold one target.")
        self.shards, self.length, self.packing = shards, length, packing
        self._total = int(shards.offsets[-1])
        if packing == "first_fit":
            self._table, self._firsts = _fit(shards.offsets, length)

    def __len__(self) -> int:
        if self.packing == "first_fit":
            return len(self._firsts) - 1
        return -(-self._total // self.length)

    def runs(self, row: int) -> Sequence[Run]:
        """Returns the token ranges that lie side by side in a row."""
        if self.packing == "first_fit":
            table = self._table[self._firsts[row] : self._firsts[row + 1]]
            return [(int(start), int(stop)) for start, stop in table]
        start = row * self.length
        return [(start, min(start + self.length, self._total))]

    def documents(self, row: int) -> list[tuple[int, int, int]]:
        """Returns (document, first token in it, tokens) of everything in a row: its provenance."""
        offsets, found = self.shards.offsets, []
        for start, stop in self.runs(row):
            first = int(np.searchsorted(offsets, start, side="right")) - 1
            last = int(np.searchsorted(offsets, stop, side="left"))
            for document in range(first, last):
                begin = max(start, int(offsets[document]))
                end = min(stop, int(offsets[document + 1]))
                if begin < end:
                    found.append((document, begin - int(offsets[document]), end - begin))
        return found

    def fill(self, blank: "Blank", at: int, row: int) -> None:
        """Writes one row into place `at` of a batch."""
        offsets, place = self.shards.offsets, 0
        for start, stop in self.runs(row):
            count, follows = stop - start, min(stop + 1, self._total)
            ids = self.shards.read(start, follows)
            blank.tokens[at, place : place + count] = ids[:count]
            blank.targets[at, place : place + follows - start - 1] = ids[1:]
            learn = blank.learn[at, place : place + count]
            if self.shards.masked:
                learn[: follows - start - 1] = self.shards.read_mask(start + 1, follows)
            else:
                learn[:] = 1
            first = np.searchsorted(offsets, start, side="right")
            ends = offsets[first : np.searchsorted(offsets, stop, side="right")] - start
            learn[ends - 1] = 0  # nothing follows the last token of a document
            if self.packing != "concat":
                blank.begins[at, place] = True
                blank.begins[at, place + ends[ends < count]] = True
            place += count
        blank.used[at] = place


class Blank:
    """A batch while it is filled: what `Rows.fill` writes, and what follows from it."""

    def __init__(self, rows: int, length: int):
        self.tokens: Int32[np.ndarray, "B T"] = np.zeros((rows, length), np.int32)
        self.targets: Int32[np.ndarray, "B T"] = np.zeros((rows, length), np.int32)
        self.learn = np.zeros((rows, length), np.float32)
        self.begins: Bool[np.ndarray, "B T"] = np.zeros((rows, length), bool)
        self.used: Int64[np.ndarray, "B"] = np.zeros(rows, np.int64)

    def batch(self, sources: Int32[np.ndarray, "B"]) -> Batch:
        """Returns the finished batch; what a row does not fill is segment 0."""
        length = self.tokens.shape[1]
        place = np.arange(length, dtype=np.int32)
        self.begins[:, 0] = True
        segments = np.cumsum(self.begins, axis=1, dtype=np.int32)
        positions = place - np.maximum.accumulate(np.where(self.begins, place, 0), axis=1)
        for row in np.flatnonzero(self.used < length):
            segments[row, self.used[row] :] = positions[row, self.used[row] :] = 0
        return Batch(
            tokens=self.tokens,
            targets=self.targets,
            segment_ids=segments,
            positions=positions,
            loss_mask=self.learn,
            sources=np.repeat(sources[:, None], length, axis=1),
        )


def check_ids(tokens: Int32[np.ndarray, "T"], shards: TokenShards) -> None:
    """Raises `Corrupt` where a token lies beyond the vocabulary that the shards name."""
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < shards.vocab_size:
        worst = max(int(tokens.max()), -int(tokens.min()))
        raise Corrupt(
            f"{shards.path}: holds the token id {worst}, beyond its vocabulary of "
            f"{shards.vocab_size}: the shards are damaged, make them again."
        )


def _fit(
    offsets: Int64[np.ndarray, "M"], length: int
) -> tuple[Int64[np.ndarray, "P 2"], Int64[np.ndarray, "S"]]:
    """Plans first fit: (start, stop) of every piece, and where each row begins among them."""
    pieces = (range(a, b) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist()))
    table: list[Run] = []
    firsts = [0]
    for row in first_fit(pieces, length):
        table += [(piece.start, piece.stop) for piece in row]
        firsts.append(len(table))
    return np.array(table, np.int64).reshape(-1, 2), np.array(firsts, np.int64)
