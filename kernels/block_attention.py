"""Attention to one piece of the keys after another, in plain jnp: sums that add up, and gradients.

Scores exist for `BLOCK` keys at a time (online softmax, arXiv:1805.02867); the gradients need the
normaliser only, not the scores (arXiv:2205.14135, appendix B). Knows nothing of devices.
Letters beside the usual: G query heads a KV head, P queries and C keys of a piece.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from internjax.kernels.attention import NEG
from internjax.tree import wide

BLOCK = 512  # keys whose scores exist at one time
NOWHERE = -1  # a segment that no token has


class Sums(NamedTuple):
    """What is known of a softmax after some keys, in at least float32.

    Fields:
      out: sum of exp(score - top) v over the keys seen, `[..., P, H]`.
      top: the largest score, total: sum of exp(score - top); both `[..., P]`.
    """

    out: Array
    top: Array
    total: Array


def no_sums(q: Float[Array, "*lead H"]) -> Sums:
    """Returns the sums of queries that have seen no key."""
    dtype = wide(q.dtype)
    top = jnp.full(q.shape[:-1], NEG, dtype)
    return Sums(jnp.zeros(q.shape, dtype), top, jnp.zeros(q.shape[:-1], dtype))


def finish(sums: Sums) -> tuple[Float[Array, "*lead H"], Float[Array, "*lead"]]:
    """Returns the attention and the log sum exp of the scores; every query has seen a key."""
    return sums.out / sums.total[..., None], sums.top + jnp.log(sums.total)


def visible(queries: Int[Array, "2 B P"], keys: Int[Array, "2 B C"]) -> Bool[Array, "B P C"]:
    """Lets tokens see their own segment up to their position; given as (segments, positions)."""
    same = queries[0][:, :, None] == keys[0][:, None, :]
    return same & (queries[1][:, :, None] >= keys[1][:, None, :])


def add_keys(
    sums: Sums,
    q: Float[Array, "B K G P H"],
    kv: Float[Array, "2 B K C H"],
    queries: Int[Array, "2 B P"],
    keys: Int[Array, "2 B C"],
) -> Sums:
    """Returns the sums after one more piece of keys and values.

    Args:
      queries, keys: where they stand, as in `visible`.
    """
    zero, low = (jnp.asarray(x, sums.top.dtype) for x in (0, NEG))

    def step(sums: Sums, block: tuple[Array, Array]) -> tuple[Sums, None]:
        (k, v), keys = block
        seen = visible(queries, keys)[:, None, None]
        scores = jnp.where(seen, _scores(q, k), low)
        top = jnp.maximum(sums.top, scores.max(axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - top[..., None]), zero)
        shrink = jnp.exp(sums.top - top)
        more = _product("BKGPC,BKCH->BKGPH", weights.astype(v.dtype), v)
        total = sums.total * shrink + weights.sum(axis=-1)
        return Sums(sums.out * shrink[..., None] + more, top, total), None

    return lax.scan(step, sums, _blocks(kv, keys))[0]


def gradients(
    q: Float[Array, "B K G P H"],
    kv: Float[Array, "2 B K C H"],
    queries: Int[Array, "2 B P"],
    keys: Int[Array, "2 B C"],
    normaliser: Float[Array, "B K G P"],
    g: Float[Array, "B K G P H"],
    g_out: Float[Array, "B K G P"],
) -> tuple[Float[Array, "B K G P H"], Float[Array, "2 B K C H"]]:
    """Returns what one piece of keys adds to the gradients of q and kv, in at least float32.

    Args:
      normaliser: log sum exp of all scores of a query, over all pieces.
      g: gradient of the attention's output; g_out: g times that output, summed over H.
    """
    dtype, scale = normaliser.dtype, q.shape[-1] ** -0.5

    def step(g_q: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
        (k, v), keys = block
        seen = visible(queries, keys)[:, None, None]
        weights = jnp.exp(_scores(q, k) - normaliser[..., None])
        weights = jnp.where(seen, weights, jnp.zeros((), dtype))
        g_v = _product("BKGPC,BKGPH->BKCH", weights.astype(g.dtype), g)
        g_weights = _product("BKGPH,BKCH->BKGPC", g, v)
        g_scores = (weights * (g_weights - g_out[..., None]) * scale).astype(q.dtype)
        g_k = _product("BKGPC,BKGPH->BKCH", g_scores, q)
        return g_q + _product("BKGPC,BKCH->BKGPH", g_scores, k), jnp.stack([g_k, g_v])

    g_q, g_kv = lax.scan(step, jnp.zeros(q.shape, dtype), _blocks(kv, keys))
    g_kv = jnp.moveaxis(g_kv, 0, 3).reshape(*kv.shape[:3], -1, kv.shape[4])
    return g_q, g_kv[:, :, :, : kv.shape[3]]


def _blocks(kv: Array, keys: Array) -> tuple[Array, Array]:
    """Cuts keys and values to `[c, 2, B, K, C / c, H]`, their places to `[c, 2, B, C / c]`."""
    _, B, K, C, H = kv.shape
    size = min(C, BLOCK)
    pad = -C % size
    kv = jnp.pad(kv, ((0, 0), (0, 0), (0, 0), (0, pad), (0, 0))).reshape(2, B, K, -1, size, H)
    keys = jnp.pad(keys, ((0, 0), (0, 0), (0, pad)), constant_values=NOWHERE)
    return jnp.moveaxis(kv, 3, 0), jnp.moveaxis(keys.reshape(2, B, -1, size), 2, 0)


def _scores(q: Array, k: Array) -> Array:
    return _product("BKGPH,BKCH->BKGPC", q, k) * q.shape[-1] ** -0.5


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=wide(a.dtype))
