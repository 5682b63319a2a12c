"""A cache as Hopper's kernels see it: blocks of 64 positions.

Longer blocks are several of these in order; nothing is copied. Knows the arrays of one layer;
`cache.py` asks it first.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from internjax.kernels.platform import choose, not_for_hopper

BLOCK = 64


def attends(q: Float[Array, "B T N H"], keys: Shaped[Array, "P C K _"]) -> bool:
    """Whether the kernel attends such queries to a cache; said in the log once."""
    if (why := not_for_hopper() or _no_blocks(keys)) is None:
        from internjax.kernels.gpu.decode_attention import why_not  # a second that only GPUs pay

        why = why_not(q, _pool(keys, keys))
    return _chosen("attention to the cache", why)


def writes(q: Float[Array, "B T N H"], keys: Shaped[Array, "P C K _"]) -> bool:
    """Whether the kernel rotates such queries and keys and writes these; said in the log once."""
    if (why := not_for_hopper() or _no_blocks(keys)) is None:
        from internjax.kernels.gpu.rope_write import why_not

        why = why_not(q, q, _pool(keys, keys))
    return _chosen("rotation into the cache", why)


def attend(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "P C K H"],
    values: Float[Array, "P C K H"],
    start: Int[Array, " B"],
    bound: int | None = None,
    table: Int[Array, "B n"] | None = None,
    *,
    interpret: Any = None,
) -> Float[Array, "B T N H"]:
    """Attends queries at positions start.. of each sequence to the keys up to their own.

    Args:
      bound: positions that hold all of them; None is all there are.
      table: the blocks of each sequence in order; None gives each one block, its row.
    """
    from internjax.kernels.gpu.decode_attention import decode_attention

    parts = keys.shape[1] // BLOCK
    if table is None:
        table = jnp.arange(len(q), dtype=jnp.int32)[:, None]
    first = table[:, :, None] * parts
    small = (first + jnp.arange(parts, dtype=jnp.int32)[None, None]).reshape(len(q), -1)
    small = small[:, : -(-bound // BLOCK) if bound else None]
    # What a free slot attends to is of no use, but must be there.
    lengths = jnp.minimum(start + q.shape[1], small.shape[1] * BLOCK)
    how = {"implementation": "pallas", "interpret": interpret}
    return decode_attention(q, _pool(keys, values), small, lengths, **how)


def rotate_and_write(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    angle: Float[Array, "B T half"],
    factor: float,
    keys: Float[Array, "P C K H"],
    values: Float[Array, "P C K H"],
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
    if keys.dtype == jnp.uint8:
        return "keys of 4 bits; legal are floats."
    if keys.shape[1] % BLOCK:
        return f"blocks of {keys.shape[1]} positions; legal are multiples of {BLOCK}."
    return None


def _pool(keys: Array, values: Array):
    from internjax.kernels.gpu.decode_attention import KVPool

    return KVPool(*(x.reshape(-1, BLOCK, *x.shape[2:]) for x in (keys, values)))
