"""What the log tells about a batch: rows, documents, their lengths, padding."""

from typing import Any

import numpy as np
from jaxtyping import Int

from internjax.data.batch import Batch


def batch_facts(batch: Batch) -> dict[str, Any]:
    """Returns counts of a batch; those of documents only where all its rows lie in this process."""
    rows = {"batch_tokens": int(np.prod(batch.tokens.shape)), "batch_rows": batch.tokens.shape[0]}
    if not getattr(batch.segment_ids, "is_fully_addressable", True):
        return rows
    return rows | document_facts(np.asarray(batch.segment_ids))


def document_facts(segment_ids: Int[np.ndarray, "B T"]) -> dict[str, Any]:
    """Counts documents (as packed: one cut over two rows counts twice) and their lengths.

    Fields: num_documents; longest_document, shortest_document in tokens; padding: share of
    positions that belong to no document.
    """
    starts = np.ones(segment_ids.shape, bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = np.flatnonzero(starts)
    lengths = np.diff(np.append(first, segment_ids.size))
    lengths = lengths[segment_ids.reshape(-1)[first] > 0]
    return {
        "num_documents": len(lengths),
        "longest_document": int(lengths.max(initial=0)),
        "shortest_document": int(lengths.min(initial=segment_ids.size)) if len(lengths) else 0,
        "padding": float(np.mean(segment_ids == 0)),
    }
