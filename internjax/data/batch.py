"""The record that crosses from the data to the training step."""

from flax import struct

from internjax.tree import Leaf


@struct.dataclass
class Batch:
    """Rows of packed documents; every field `[B, T]`, or `[T]` for one row.

    Fields:
      tokens: int32 ids; targets: the id that follows inside the same document, else anything.
      segment_ids: int32, 1, 2, ... by document of the row; 0 is padding.
      positions: int32, restarting at 0 in every document.
      loss_mask: float32, 1 where the target counts.
      sources: int32, the number of the source in `Mixture.names`, so that a step can report its
        loss by source; None where rows come from one place.
    """

    tokens: Leaf
    targets: Leaf
    segment_ids: Leaf
    positions: Leaf
    loss_mask: Leaf
    sources: Leaf = None
