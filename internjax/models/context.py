"""Attention of rows that are cut over the mesh axis `context`, as a ring or by exchanging heads.

A row is cut into 2 n pieces, and device i of n has pieces i and 2 n - 1 - i (`balanced_order` in
`train/place.py`), in this order. A token sees those of its own segment at its position or before;
positions rise inside a segment, so no token sees a later piece.

Ring (arXiv:2310.01889): keys and values go round, every device works on what it has and sends it
on meanwhile. Of the four pairs of pieces in a step, the late queries see the early keys of every
device, and one of the others is seen: the early pieces of a device before, the late pieces of one
behind. So every device works on two pairs in each step, and on three with its own keys: 2 n + 1 of
the (2 n) (2 n + 1) / 2 pairs that anybody sees, none idle (as in arXiv:2311.09431). The backward
pass goes round again; memory is that of a device's own pieces.

Ulysses (arXiv:2309.14509): every device gets the whole length of a share of the heads.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from internjax.collectives import Parallel
from internjax.kernels.attention import attention, causal_attention
from internjax.kernels.block_attention import Sums, add_keys, finish, gradients, no_sums, visible
from internjax.tree import wide

type Attend = Callable[[Array, Array, Array], Array]
type Grads = tuple[Array, Array]
type Pairs = Array | np.ndarray

OWN = np.array([[0, 0], [1, 0], [1, 1]], np.int32)
"""[piece of queries, piece of keys] of what a device works on with its own keys."""


def attend_on(
    positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None, par: Parallel
) -> Attend:
    """Returns `attend(q, k, v)` of a model's layers; what all layers share is done once, here.

    Args:
      positions, segment_ids: of this device's part of the rows.
    """
    axis = par.context
    if axis is None:
        return lambda q, k, v: causal_attention(q, k, v, segment_ids)
    if segment_ids is None:
        segment_ids = jnp.zeros_like(positions)
    local = jnp.stack([segment_ids.astype(jnp.int32), positions.astype(jnp.int32)])
    # 8 bytes a token, said once for all layers; keys and values are a thousand times as much.
    if par.context_mode == "ulysses":
        places = lax.all_gather(local, axis, axis=2, tiled=True)
        mask = visible(places, places)
        return lambda q, k, v: _ulysses(q, k, v, mask, axis)
    _, B, T = local.shape
    pieces = local.reshape(2, B, 2, T // 2).transpose(2, 0, 1, 3)
    places = lax.all_gather(pieces, axis)
    return lambda q, k, v: _ring(q, k, v, places, axis)


def _ulysses(q: Array, k: Array, v: Array, mask: Array, axis: str) -> Array:
    """Attends over the whole length `[B, T n, N / n, H]` of this device's heads."""
    whole = lambda x: lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)  # noqa: E731
    mixed = attention(whole(q), whole(k), whole(v), mask)
    return lax.all_to_all(mixed, axis, split_axis=1, concat_axis=2, tiled=True)


def _ring(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    places: Int[Array, "n 2 2 B P"],
    axis: str,
) -> Float[Array, "B T N H"]:
    """Attends to the keys of all devices; places are (segments, positions) by device and piece."""
    B, T, N, H = q.shape
    K, P = k.shape[2], T // 2
    queries = q.reshape(B, 2, P, K, N // K, H).transpose(1, 0, 3, 4, 2, 5)
    kv = jnp.stack([k, v]).reshape(2, B, 2, P, K, H).transpose(2, 0, 1, 4, 3, 5)
    out = _by_pieces(queries, kv, places, axis)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, T, N, H)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_pieces(
    q: Float[Array, "2 B K G P H"],
    kv: Float[Array, "2 2 B K P H"],
    places: Int[Array, "n 2 2 B P"],
    axis: str,
) -> Float[Array, "2 B K G P H"]:
    """Attends piece by piece; kv is (keys, values) by piece."""
    return _forward(q, kv, places, axis)[0]


def _forward(q: Array, kv: Array, places: Array, axis: str):
    me = lax.axis_index(axis)

    def work(sums: Sums, _: None, kv: Array, source: Array, pairs: Pairs) -> tuple[Sums, None]:
        def pair(sums: Sums, ab: Array) -> tuple[Sums, None]:
            a, b = ab
            where = (_at(places[me], a), _at(places[source], b))
            return _put(sums, add_keys(*_at((sums, q), a), _at(kv, b), *where), a), None

        return lax.scan(pair, sums, pairs)

    sums, _ = _go_round(work, no_sums(q), None, kv, axis)
    out, normaliser = finish(sums)
    out = out.astype(q.dtype)
    return out, (q, kv, places, out, normaliser)


def _backward(axis: str, kept: tuple[Array, ...], g: Array):
    q, kv, places, out, normaliser = kept
    me, dtype = lax.axis_index(axis), wide(q.dtype)
    g_out = jnp.sum(g.astype(dtype) * out.astype(dtype), axis=-1)

    def work(g_q: Array, g_kv: Array, kv: Array, source: Array, pairs: Pairs) -> Grads:
        def pair(grads: Grads, ab: Array) -> tuple[Grads, None]:
            (g_q, g_kv), (a, b) = grads, ab
            where = (_at(places[me], a), _at(places[source], b))
            rest = _at((normaliser, g, g_out), a)
            more_q, more_kv = gradients(_at(q, a), _at(kv, b), *where, *rest)
            g_q = _put(g_q, _at(g_q, a) + more_q, a)
            return (g_q, _put(g_kv, _at(g_kv, b) + more_kv, b)), None

        return lax.scan(pair, (g_q, g_kv), pairs)[0]

    g_q, g_kv = _go_round(work, jnp.zeros(q.shape, dtype), jnp.zeros(kv.shape, dtype), kv, axis)
    return g_q.astype(q.dtype), g_kv.astype(kv.dtype), None


_by_pieces.defvjp(_forward, _backward)


def _go_round(work: Callable, mine: Any, theirs: Any, kv: Array, axis: str) -> tuple[Any, Any]:
    """Runs `mine, theirs = work(mine, theirs, kv, source, pairs)` on every device's keys.

    One's own come first. Keys are sent on before the work on them, so that both may overlap;
    `theirs` belongs to the keys: it follows them, one step behind, and ends where they began.
    """
    n, me = lax.axis_size(axis), lax.axis_index(axis)

    def other(mine: Any, theirs: Any, kv: Array, step: int | Array) -> tuple[Any, Any]:
        source = (me - step) % n
        half = (source > me).astype(jnp.int32)
        pairs = jnp.array([[1, 0], [half, half]], jnp.int32)
        return work(mine, _send(theirs, axis), kv, source, pairs)

    def step(carry: tuple[Array, Any, Any], number: Array) -> tuple[tuple[Array, Any, Any], None]:
        kv, mine, theirs = carry
        return (_send(kv, axis), *other(mine, theirs, kv, number)), None

    start = (_send(kv, axis), *work(mine, theirs, kv, me, OWN))
    (kv, mine, theirs), _ = lax.scan(step, start, jnp.arange(1, n - 1, dtype=jnp.int32))
    mine, theirs = other(mine, theirs, kv, n - 1)
    return mine, _send(theirs, axis)


def _send(tree: Any, axis: str) -> Any:
    n = lax.axis_size(axis)
    ring = [(i, (i + 1) % n) for i in range(n)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis, ring), tree)


def _at(tree: Any, piece: int | Array) -> Any:
    take = lambda x: lax.dynamic_index_in_dim(x, piece, 0, keepdims=False)  # noqa: E731
    return jax.tree.map(take, tree)


def _put(tree: Any, part: Any, piece: int | Array) -> Any:
    put = lambda x, y: lax.dynamic_update_index_in_dim(x, y, piece, 0)  # noqa: E731
    return jax.tree.map(put, tree, part)
