"""Masked grouped-query attention, reference in plain jnp.

Knows nothing of models or caches: the caller says by `mask` who may see whom.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
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


BLOCK = 128  # queries of a block, at least
MOST_BLOCKS, MOST_GPU_BLOCKS = 16, 4  # each is compiled: 4 take half the time of 16
LONGEST_UNROLLED, LOOP_BLOCK = 8192, 256  # tokens of a row; queries of a block in the loop
ATTENDED = (
    "attended"  # name of what a recomputing backward pass should keep: small, and dear to make
)


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Computes what `attention` does under `causal_mask`, for training: less time and memory.

    Goes through blocks of queries and keeps no scores: the backward pass makes them again (as
    FlashAttention, arXiv:2205.14135). Each block looks at the keys up to its own end only; on 2 CPU
    cores, forward and backward, B 4, T 512, N 9, K 3, H 64: 64 ms, against 211 ms of `attention`
    and its own derivative. Longer rows are one loop on GPUs: it compiles once and holds fewer
    scores, but compiled for an H100 InternLM2-7B's step is estimated 1.6 times as long with it.
    """
    if segment_ids is None:
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
    return _blockwise(q, k, v, segment_ids)


@jax.custom_vjp
def _blockwise(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    return _blockwise_forward(q, k, v, segment_ids)[0]


def _blockwise_forward(q: Array, k: Array, v: Array, segment_ids: Array):
    few = partial(_unrolled_forward, most=MOST_GPU_BLOCKS)
    default = _looped_forward if q.shape[1] > LONGEST_UNROLLED else few
    out, normaliser = lax.platform_dependent(
        q, k, v, segment_ids, cpu=_unrolled_forward, default=default
    )
    out, normaliser = (checkpoint_name(x, ATTENDED) for x in (out, normaliser))
    return out, (q, k, v, segment_ids, out, normaliser)


def _blockwise_backward(kept, g: Array):
    args = (*kept, g)
    few = partial(_unrolled_backward, most=MOST_GPU_BLOCKS)
    default = _looped_backward if args[0].shape[1] > LONGEST_UNROLLED else few
    grads = lax.platform_dependent(*args, cpu=_unrolled_backward, default=default)
    return *grads, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _looped(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """Attends one block of queries after the other, each to all keys."""
    B, T, N, H = q.shape
    size = LOOP_BLOCK if T % LOOP_BLOCK == 0 else T

    @jax.checkpoint
    def block(start: Array) -> Array:
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1)  # noqa: E731
        causal = (start + jnp.arange(size))[:, None] >= jnp.arange(T)[None, :]
        same = cut(segment_ids)[:, :, None] == segment_ids[:, None, :]
        return attention(cut(q), k, v, causal[None] & same)

    blocks = lax.map(block, jnp.arange(0, T, size))
    return blocks.swapaxes(0, 1).reshape(B, T, N, H)


def _looped_forward(q: Array, k: Array, v: Array, segment_ids: Array) -> tuple[Array, Array]:
    return _looped(q, k, v, segment_ids), jnp.zeros(q.shape[:3], wide(q.dtype))


def _looped_backward(q, k, v, segment_ids, out, normaliser, g) -> tuple[Array, Array, Array]:
    return jax.vjp(lambda q, k, v: _looped(q, k, v, segment_ids), q, k, v)[1](g)


def _unrolled_forward(
    q: Array, k: Array, v: Array, segment_ids: Array, most: int = MOST_BLOCKS
) -> tuple[Array, Array]:
    """Returns the output `[B, T, N, H]` and the logarithm of the normaliser `[B, T, N]`."""
    keys, values = _by_head(k, k), _by_head(v, k)
    outs, normalisers = [], []
    for start, end in _blocks(q.shape[1], most):
        queries = q[:, start:end]
        scores = _scores(_by_head(queries, k), keys[:, :end], segment_ids, start, end)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        out = _matmul("XQC,XCH->XQH", weights / total, values[:, :end], v.dtype)
        outs.append(_by_row(out, queries))
        normalisers.append(_by_row(top + jnp.log(total), queries[..., :1])[..., 0])
    return jnp.concatenate(outs, axis=1), jnp.concatenate(normalisers, axis=1)


def _unrolled_backward(
    q, k, v, segment_ids, out, normaliser, g, most: int = MOST_BLOCKS
) -> tuple[Array, Array, Array]:
    keys, values = _by_head(k, k), _by_head(v, k)
    wide_dtype = wide(q.dtype)
    inner = jnp.sum(g.astype(wide_dtype) * out.astype(wide_dtype), axis=-1)
    d_keys, d_values = (jnp.zeros(x.shape, wide_dtype) for x in (keys, values))
    d_queries = []
    for start, end in _blocks(q.shape[1], most):
        cut = lambda x, s=start, e=end: _by_head(x[:, s:e], k)  # noqa: E731
        queries, g_out = cut(q), cut(g)
        scores = _scores(queries, keys[:, :end], segment_ids, start, end)
        weights = jnp.exp(scores - cut(normaliser[..., None]))
        d_values = d_values.at[:, :end].add(_matmul("XQC,XQH->XCH", weights, g_out, wide_dtype))
        d_weights = _matmul("XQH,XCH->XQC", g_out, values[:, :end], wide_dtype)
        d_scores = weights * (d_weights - cut(inner[..., None])) * q.shape[-1] ** -0.5
        d_scores = d_scores.astype(q.dtype)
        d_block = _matmul("XQC,XCH->XQH", d_scores, keys[:, :end], q.dtype)
        d_queries.append(_by_row(d_block, q[:, start:end]))
        d_keys = d_keys.at[:, :end].add(_matmul("XQC,XQH->XCH", d_scores, queries, wide_dtype))
    d_k, d_v = (_by_row(x, k).astype(k.dtype) for x in (d_keys, d_values))
    return jnp.concatenate(d_queries, axis=1), d_k, d_v


def _blocks(T: int, most: int) -> list[tuple[int, int]]:
    """Start and end of the blocks of queries."""
    size = max(BLOCK, -(-T // most))
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def _by_head(x: Array, k: Array) -> Array:
    """Returns `[B, T, N, H]` as `[B K, G T, H]`: one matrix product a KV head."""
    B, T, N, H = x.shape
    K = k.shape[2]
    return x.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B * K, -1, H)


def _by_row(x: Array, like: Array) -> Array:
    """Inverse of `_by_head` for a tensor with the batch and the heads of `like`."""
    B, _, N, _ = like.shape
    K, H = len(x) // B, x.shape[-1]
    T = x.shape[1] * K // N
    return x.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _scores(queries: Array, keys: Array, segment_ids: Array, start: int, end: int) -> Array:
    """Returns the scaled scores `[B K, G Q, end]` of one block, unseen keys at `NEG`."""
    B, heads, Q = len(segment_ids), len(keys) // len(segment_ids), end - start
    causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
    seen = causal[None] & (segment_ids[:, start:end, None] == segment_ids[:, None, :end])
    scores = _matmul("XQH,XCH->XQC", queries, keys, wide(queries.dtype))
    scores = scores.reshape(B, heads, -1, Q, end) * queries.shape[-1] ** -0.5
    scores = jnp.where(seen[:, None, None], scores, jnp.asarray(NEG, scores.dtype))
    return scores.reshape(len(keys), -1, end)


def _matmul(spec: str, a: Array, b: Array, dtype) -> Array:
    """Multiplies in the dtype of `b`, adds up in at least float32, returns `dtype`."""
    out = jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=wide(b.dtype))
    return out.astype(dtype)
