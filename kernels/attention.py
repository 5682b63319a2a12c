"""Masked grouped-query attention: the reference in plain jnp, and causal attention for training.

Knows nothing of models or caches. In `attention` the caller says by `mask` who may see whom;
`causal_attention` has several implementations, which compute the same.
"""

import importlib.util
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from internjax.kernels.platform import choose, missing_extra, not_for_hopper, not_opaque, target
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
    soft_cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Computes softmax(q k^T / sqrt(H)) v with N/K query heads a KV head (arXiv:2305.13245).

    Scores and softmax in at least float32; fully masked rows are finite and meaningless.

    Args:
      soft_cap: c, if c tanh(score / c) is taken of scores (arXiv:2408.00118).
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    wide_dtype = wide(q.dtype)
    groups = q.reshape(B, T, K, N // K, H)  # query heads of one KV head side by side
    scores = jnp.einsum("BTKGH,BCKH->BKGTC", groups, k, preferred_element_type=wide_dtype)
    scores = scores * H**-0.5
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.asarray(NEG, wide_dtype))
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
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
    interpret: Any = None,
) -> Float[Array, "B T N H"]:
    """Computes what `attention` does under `causal_mask`, for training: less time and memory.

    Goes through blocks of queries and keeps no scores: the backward pass makes them again (as
    FlashAttention, arXiv:2205.14135). Each block looks at the keys up to its own end only; on 2 CPU
    cores, forward and backward, B 4, T 512, N 9, K 3, H 64: 64 ms, against 211 ms of `attention`
    and its own derivative. Longer rows are one loop on GPUs: it compiles once and holds fewer
    scores, but compiled for an H100 InternLM2-7B's step is estimated 1.6 times as long with it.

    Args:
      window: tokens that a token sees, itself among them; None is all before it.
      soft_cap: as in `attention`.
      implementation: "xla", "pallas" (`flash_attention.py`: sm_90, bfloat16), "cudnn", "tokamax";
        None takes the first that serves of "pallas", "cudnn" and "xla".
      interpret: parameters of Pallas's GPU interpreter, to run "pallas" on any machine.

    Raises:
      ValueError: for shapes that do not fit, and for an implementation that cannot serve the call.
    """
    _check(q, k, v, segment_ids, window, soft_cap)
    legal = {
        "xla": None,
        "pallas": _not_pallas(q, interpret),
        "cudnn": _not_cudnn(q, segment_ids, soft_cap),
        "tokamax": missing_extra("tokamax"),
    }
    best = "pallas" if legal["pallas"] is None else "xla"
    if legal["pallas"] is not None and legal["cudnn"] is None and not_opaque() is None:
        best = "cudnn"
    chosen = choose("causal attention", implementation, legal, best=best)
    if q.size == 0:
        return jnp.zeros_like(q)
    if chosen == "pallas":
        from internjax.kernels.gpu.flash import Rule
        from internjax.kernels.gpu.flash_attention import flash_attention

        rule = Rule(q.shape[3] ** -0.5, soft_cap, window)
        return flash_attention(q, k, v, segment_ids, rule, keep=ATTENDED, interpret=interpret)
    sight = None if window is None else (window - 1, 0)
    if chosen == "cudnn":
        attend = jax.nn.dot_product_attention
        return attend(q, k, v, is_causal=True, local_window_size=sight, implementation="cudnn")
    if chosen == "tokamax":
        return _tokamax(q, k, v, segment_ids, sight, soft_cap)
    if segment_ids is None:
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
    if window is not None or soft_cap is not None:
        return _looped(q, k, v, segment_ids, window, soft_cap)
    return _blockwise(q, k, v, segment_ids)


def _check(
    q: Array, k: Array, v: Array, ids: Array | None, window: int | None, soft_cap: float | None
) -> None:
    """Raises ValueError for what no implementation serves."""
    B, T, N, H = q.shape
    if k.shape != v.shape or (*k.shape[:2], k.shape[3]) != (B, T, H):
        raise ValueError(
            f"causal attention: q {q.shape}, k {k.shape}, v {v.shape}; legal are [B, T, N, H] and"
            " twice [B, T, K, H] with the same B, T, H."
        )
    if k.shape[2] == 0 or N % k.shape[2]:
        raise ValueError(
            f"causal attention: {N} query heads and {k.shape[2]} KV heads; the first must be a"
            " multiple of the second."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"causal attention: q is {q.dtype}, k {k.dtype}, v {v.dtype}; cast them to one dtype."
        )
    if ids is not None and (ids.shape != (B, T) or not jnp.issubdtype(ids.dtype, jnp.integer)):
        raise ValueError(
            f"causal attention: segment_ids {ids.dtype}{list(ids.shape)}; legal are integers"
            f" [{B}, {T}]."
        )
    if window is not None and window < 1:
        raise ValueError(f"causal attention: window={window}; at least 1, or None for no window.")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"causal attention: soft_cap={soft_cap}; above 0, or None for no cap.")


def _not_pallas(q: Array, interpret: Any) -> str | None:
    if (why := not_for_hopper(interpret)) is not None:
        return why
    from internjax.kernels.gpu.flash_attention import unserved  # a second that only GPUs pay

    return unserved(q)


def _not_cudnn(q: Array, ids: Array | None, soft_cap: float | None) -> str | None:
    """Says why cuDNN cannot serve a call, or None (limits of jax.nn.dot_product_attention)."""
    if target().platform != "gpu":
        return f"it is for NVIDIA GPUs, this is {target().kind!r}: take 'xla'."
    if not _has_cudnn():
        return "the library is not installed: pip install nvidia-cudnn-cu13, or take 'xla'."
    if ids is not None or soft_cap is not None:
        return "it takes neither segment ids nor a soft cap: take 'xla'."
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[3] % 8 or q.shape[3] > 128:
        return (
            "it takes bfloat16 and float16 and heads of at most 128 in multiples of 8, got"
            f" {q.dtype} and {q.shape[3]}: take 'xla'."
        )
    return None


def _has_cudnn() -> bool:
    if importlib.util.find_spec("nvidia") is None:
        return False
    return importlib.util.find_spec("nvidia.cudnn") is not None


def _tokamax(q: Array, k: Array, v: Array, ids: Array | None, sight: Any, soft_cap: Any) -> Array:
    import tokamax

    mask = None if ids is None else (ids[:, :, None] == ids[:, None, :])[:, None]
    return tokamax.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, local_window_size=sight, logits_soft_cap=soft_cap
    )


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


def _looped(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Array:
    """Attends one block of queries after the other, each to all keys."""
    B, T, N, H = q.shape
    size = LOOP_BLOCK if T % LOOP_BLOCK == 0 else T

    @jax.checkpoint
    def block(start: Array) -> Array:
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1)  # noqa: E731
        before = (start + jnp.arange(size))[:, None] - jnp.arange(T)[None, :]
        seen = before >= 0 if window is None else (before >= 0) & (before < window)
        same = cut(segment_ids)[:, :, None] == segment_ids[:, None, :]
        return attention(cut(q), k, v, seen[None] & same, soft_cap)

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
