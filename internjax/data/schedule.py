"""Which rows of the endless stream of training rows a step takes: growing batches, skipped ones.

All closed forms of the step, so that any step is reached at once. The batch of InternEvo's
`rampup_batch_size` and `skip_batches` is meant (internlm/data/tokenized/batch_sampler.py); where
InternEvo counts a skipped batch as a step without an update, here step k takes the next batch that
is not skipped.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from internjax.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """How many rows a step takes, and which.

    Fields:
      batch_size: rows a step, once it has grown.
      rampup: "start incr every": the first `every` batches have `start` rows, the next `every`
        have `incr` more, up to batch_size; "" begins with batch_size.
      skip_batches: "a-b,c": batches never trained on, counted from 0, ends included; "" skips none.
    """

    batch_size: int
    rampup: str = ""
    skip_batches: str = ""

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1.")
        _ = self._ramp, self._skips  # what is misspelt is said here

    def batch_of(self, step: int) -> int:
        """Returns the number of the batch that a step takes; they differ after a skipped one."""
        batch = step
        for first, last in self._skips:
            if batch < first:
                break
            batch += last - first + 1
        return batch

    def size(self, step: int) -> int:
        """Returns the rows of a step."""
        start, increment, every = self._ramp
        return min(start + increment * (self.batch_of(step) // every), self.batch_size)

    @property
    def sizes(self) -> range:
        """Every size a batch ever has, smallest first: what must divide, and is compiled."""
        start, increment, _ = self._ramp
        return range(start, self.batch_size + 1, increment)

    def first_row(self, step: int) -> int:
        """Returns the first row of a step in the stream of rows."""
        return self.rows_before(self.batch_of(step))

    def rows_before(self, batch: int) -> int:
        """Returns the rows of batches 0..batch-1, the skipped ones among them."""
        start, increment, every = self._ramp
        growing = min(batch, (self.batch_size - start) // increment * every)
        stages, rest = divmod(growing, every)
        whole = every * (stages * start + increment * stages * (stages - 1) // 2)
        partly = rest * (start + increment * stages)
        return whole + partly + (batch - growing) * self.batch_size

    @cached_property
    def _ramp(self) -> tuple[int, int, int]:
        if not self.rampup:
            return self.batch_size, self.batch_size, 1
        if not re.fullmatch(r"\s*[1-9]\d*\s+[1-9]\d*\s+[1-9]\d*\s*", self.rampup):
            raise UserError(
                f"rampup={self.rampup!r} is not 'start incr every', three whole numbers from 1."
            )
        start, increment, every = map(int, self.rampup.split())
        if start > self.batch_size or (self.batch_size - start) % increment:
            raise UserError(
                f"rampup={self.rampup!r}: steps of {increment} from {start} do not lead to "
                f"batch_size={self.batch_size}."
            )
        return start, increment, every

    @cached_property
    def _skips(self) -> list[tuple[int, int]]:
        """Ranges, ends included, in order and apart."""
        ranges: list[tuple[int, int]] = []
        found = [part.strip() for part in self.skip_batches.split(",") if part.strip()]
        for part in found:
            if not (match := re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)):
                raise UserError(
                    f"skip_batches: {part!r} is neither a batch number nor a range a-b."
                )
            first = int(match[1])
            last = int(match[2] or first)
            if last < first:
                raise UserError(f"skip_batches: the range {part} ends before it begins.")
            ranges.append((first, last))
        merged: list[tuple[int, int]] = []
        for first, last in sorted(ranges):
            if merged and first <= merged[-1][1] + 1:
                first, last = merged[-1][0], max(last, merged.pop()[1])
            merged.append((first, last))
        return merged
