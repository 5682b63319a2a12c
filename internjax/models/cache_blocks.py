"""A cache of whole rows as Hopper's kernels see it: blocks of 64 positions, in order.

Position c of row b is place b C + c of the pool, whether it is cut into rows or into blocks:
nothing is copied. Knows the arrays of one layer; `cache.py` asks it first.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from internjax.kernels.platform import choose, not_for_hopper

BLOCK = 64


def attends(q: Float[Array, "B T N H"], keys: Shaped[Array, "rows C K H"]) -> bool:
    """Whether the kernel attends such queries to a cache; said in the log once."""
    if (why := not_for_hopper() or _no_blocks(keys)) is None:
        from internjax.kernels.gpu.decode_attention import why_not  # a second that only GPUs pay

        why = why_not(q, _pool(keys, keys))
    return _chosen("attention to the cache", why)


def writes(q: Float[Array, "B T N H"], keys: Shaped[Array, "rows C K H"]) -> bool:
    """Whether the kernel rotates such queries and keys and writes these; said in the log once."""
    if (why := not_for_hopper() or _no_blocks(keys)) is None:
        from internjax.kernels.gpu.rope_write import why_not

        why = why_not(q, q, _pool(keys, keys))
    return _chosen("rotation into the cache", why)


def attend(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "rows C K H"],
    values: Float[Array, "rows C K H"],
    start: Int[Array, " B"],
    bound: int | None = None,
    *,
    interpret: Any = None,
) -> Float[Array, "B T N H"]:
    """Attends queries at positions start.. of each row to the keys up to their own.

    Args:
      bound: positions that hold all of them; None is C.
    """
    from internjax.kernels.gpu.decode_attention import decode_attention

    B, C = keys.shape[:2]
    table = jnp.arange(B * C // BLOCK, dtype=jnp.int32).reshape(B, -1)
    table = table[:, : -(-(bound or C) // BLOCK)]
    # A free slot counts on behind its row; what it attends to is of no use, but must be there.
    lengths = jnp.minimum(start + q.shape[1], table.shape[1] * BLOCK)
    how = {"implementation": "pallas", "interpret": interpret}
    return decode_attention(q, _pool(keys, values), table, lengths, **how)


def rotate_and_write(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    angle: Float[Array, "B T half"],
    factor: float,
    keys: Float[Array, "rows C K H"],
    values: Float[Array, "rows C K H"],
    places: Int[Array, "B T"],
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "B T N H"], Array, Array]:
    """Returns rotated queries, and the rows with rotated keys and values at `places`."""
    from internjax.kernels.gpu.rope_write import rope_write

    how = {"factor": factor, "implementation": "pallas", "interpret": interpret}
    q, pool = rope_write(q, k, v, angle, _pool(keys, values), places, **how)
    return q, pool.k.reshape(keys.shape), pool.v.reshape(values.shape)


def _chosen(what: str, why: str | None) -> bool:
    best = "xla" if why else "pallas"
    return choose(what, None, {"xla": None, "pallas": why}, best=best) == "pallas"


def _no_blocks(keys: Array) -> str | None:
    if keys.shape[1] % BLOCK:
        return f"a cache of {keys.shape[1]} positions; legal are multiples of {BLOCK}."
    return None


def _pool(keys: Array, values: Array):
    from internjax.kernels.gpu.decode_attention import KVPool

    return KVPool(*(x.reshape(-1, BLOCK, *x.shape[2:]) for x in (keys, values)))
