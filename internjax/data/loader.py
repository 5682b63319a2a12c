"""Packed rows to batches through Grain; the batch of a step is a pure function of (seed, step)."""

from collections.abc import Callable, Sequence

import grain
import jax.numpy as jnp
import numpy as np

from internjax.data.batch import Batch
from internjax.errors import UserError


def batches(rows: Sequence[Batch], batch_size: int, *, seed: int) -> Callable[[int], Batch]:
    """Returns `batch_at(step)`: rows reshuffled every epoch, stacked to `[batch_size, T]`.

    Args:
      rows: one record a row, every field `[T]`.
    """
    if not rows:
        raise UserError("the training set is empty: no packed row holds a token that counts.")
    source = grain.MapDataset.source(range(len(rows))).seed(seed).shuffle().repeat()

    def batch_at(step: int) -> Batch:
        picked = [rows[source[step * batch_size + i]] for i in range(batch_size)]
        return Batch(
            **{
                name: jnp.asarray(np.stack([np.asarray(getattr(row, name)) for row in picked]))
                for name in Batch.__dataclass_fields__
            }
        )

    return batch_at
