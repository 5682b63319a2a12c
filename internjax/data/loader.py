"""Batches by step: from packed rows in memory, and read ahead by threads, through Grain."""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np

from internjax.data.batch import Batch
from internjax.errors import UserError


def batches(rows: Sequence[Batch], batch_size: int, *, seed: int) -> Callable[[int], Batch]:
    """Returns `batch_at(step)`: rows reshuffled every epoch, stacked to `[batch_size, T]`.

    Args:
      rows: one record a row, every field `[T]`; `sources` in all of them or in none.
    """
    if not rows:
        raise UserError("the training set is empty: no packed row holds a token that counts.")
    source = grain.MapDataset.source(range(len(rows))).seed(seed).shuffle().repeat()
    fields = [name for name in Batch.__dataclass_fields__ if getattr(rows[0], name) is not None]

    def batch_at(step: int) -> Batch:
        picked = [rows[source[step * batch_size + i]] for i in range(batch_size)]
        return Batch(
            **{
                name: jnp.asarray(np.stack([np.asarray(getattr(row, name)) for row in picked]))
                for name in fields
            }
        )

    return batch_at


class ReadAhead:
    """`reader(step)` is `batch_at(step)`, made by threads before it is asked for.

    Steps asked in order come from Grain's prefetching iterator. Any other step is right as well:
    the reading ahead then starts anew from there, as it does after a restart.

    Args:
      batch_at: a pure function of the step; called from several threads at once.
      stop: no step from this one on is read.
      threads: that make batches; buffer: batches held ready, in memory.
    """

    def __init__(
        self, batch_at: Callable[[int], Any], *, stop: int, threads: int = 2, buffer: int = 4
    ):
        if stop < 1 or threads < 1 or buffer < 1:
            raise UserError(
                f"reading ahead needs stop={stop}, threads={threads} and buffer={buffer} of at "
                "least 1."
            )
        self._steps = grain.MapDataset.source(_Steps(batch_at, stop))
        self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
        self._stop, self._next, self._ahead = stop, None, None

    def __call__(self, step: int) -> Any:
        """Returns the batch of a step, 0 <= step < stop."""
        if not 0 <= step < self._stop:
            raise UserError(f"step {step} is not among the steps 0..{self._stop - 1} to read.")
        if step != self._next:
            self.close()
            self._ahead = iter(self._steps[step:].to_iter_dataset(self._options))
        self._next = step + 1
        return next(self._ahead)

    def close(self) -> None:
        """Stops the threads; the next call starts them again."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = self._next = None


class _Steps:
    """What Grain reads from: element k is the batch of step k."""

    def __init__(self, batch_at: Callable[[int], Any], stop: int):
        self._batch_at, self._stop = batch_at, stop

    def __len__(self) -> int:
        return self._stop

    def __getitem__(self, step: int) -> Any:
        return self._batch_at(int(step))
