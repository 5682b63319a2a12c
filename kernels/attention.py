"""Masked grouped-query attention, reference in plain jnp.

Knows nothing of models or caches: the caller says by `mask` who may see whom.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from internjax.tree import wide

NEG = -1e30  # finite: a fully masked (padding) row gives the mean of v instead of NaN


def causal_mask(
    positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
) -> Bool[Array, "B T T"]:
    """Lets position t of a row see s <= t of its own segment (packed rows)."""
    order = jnp.arange(positions.shape[1])
    mask = (order[:, None] >= order[None, :])[None]
    if segment_ids is None:
        return jnp.broadcast_to(mask, (positions.shape[0], *mask.shape[1:]))
    return mask & (segment_ids[:, :, None] == segment_ids[:, None, :])


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B C K H"],
    v: Float[Array, "B C K H"],
    mask: Bool[Array, "B T C"],
) -> Float[Array, "B T N H"]:
    """Computes softmax(q k^T / sqrt(H)) v with N/K query heads a KV head (arXiv:2305.13245).

    Scores and softmax in at least float32; fully masked rows are finite and meaningless.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    wide_dtype = wide(q.dtype)
    groups = q.reshape(B, T, K, N // K, H)  # query heads of one KV head side by side
    scores = jnp.einsum("BTKGH,BCKH->BKGTC", groups, k, preferred_element_type=wide_dtype)
    scores = jnp.where(mask[:, None, None], scores * H**-0.5, jnp.asarray(NEG, wide_dtype))
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum("BKGTC,BCKH->BTKGH", weights.astype(v.dtype), v)
    return mixed.reshape(B, T, N, H)
