"""Rotates queries and keys and writes keys and values into a cache, on the CPU.

One call a layer: as separate operations XLA hands them from thread to thread, which takes longer
than they do.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from internjax.kernels.cpu import library
from internjax.kernels.cpu.attention import DTYPES

type Pool = tuple[Array, ...]
"""Keys and values `[*positions, K, H]`, and of int8 ones their float32 scales `[*positions, K]`."""


def rope_write(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    turns: Float[Array, "2 B T half"],
    pool: Pool,
    places: Int[Array, "B T"],
) -> tuple[Float[Array, "B T N H"], Pool]:
    """Returns the rotated queries and the pool with the rotated keys and the values.

    Dim i turns with dim i + H/2, in float32; int8 pools get a scale a token and head, largest
    |x| / 127. What is not finite makes the scale NaN.

    Args:
      turns: cosines and sines.
      pool: changed in place where the caller gives it away (donates it).
      places: positions of the pool, counted through its leading dims; tokens at -1 are not written.

    Raises:
      ValueError: shapes or dtypes that cannot be served, or the kernels are not there.
    """
    check(q, k, v, turns, pool, places)
    library.check_choice("cpu", "")
    (B, T, N, H), K = q.shape, k.shape[2]
    flat = lambda x, *last: x.astype(jnp.float32).reshape(B * T, *last)  # noqa: E731
    rows = flat(q, N, H), flat(k, K, H), flat(v, K, H), turns.astype(jnp.float32)
    goals = places.reshape(-1).astype(jnp.int32)
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (rows[0], *pool)]
    aliases = {5 + i: 1 + i for i in range(len(pool))}
    call = jax.ffi.ffi_call("internjax_rope_write", results, input_output_aliases=aliases)
    rotated, *pool = call(*rows, goals, *pool)
    return rotated.reshape(q.shape).astype(q.dtype), tuple(pool)


def unwritten(shapes: Sequence[jax.ShapeDtypeStruct]) -> list[Array]:
    """Returns arrays that hold anything: the system gives them memory where they are written.

    For pools that only these kernels use, which read nothing that they did not write.
    """
    library.check_choice("cpu", "")
    return list(jax.ffi.ffi_call("internjax_unwritten", list(shapes))())


def serves(q: Array | jax.ShapeDtypeStruct, dtype) -> bool:
    """Whether the kernel is there and takes such queries into a pool of `dtype`."""
    return q.dtype in DTYPES[:2] and dtype in DTYPES and library.available()


def check(q, k, v, turns, pool, places) -> None:
    """Raises ValueError, with what was given and what is legal, before anything is launched."""
    B, T, _, H = q.shape
    if q.dtype not in DTYPES[:2] or k.shape != v.shape or k.shape[:2] != (B, T) or H % 2:
        raise ValueError(
            f"q is {q.dtype}{list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; legal are"
            " float32 or bfloat16 [B, T, N, H], [B, T, K, H] twice, H even."
        )
    if turns.shape != (2, B, T, H // 2) or places.shape != (B, T):
        raise ValueError(
            f"turns {list(turns.shape)} and places {list(places.shape)}; legal are"
            f" {[2, B, T, H // 2]} and {[B, T]}."
        )
    keys, values, *scales = pool
    if keys.dtype not in DTYPES or keys.dtype != values.dtype or keys.shape != values.shape:
        raise ValueError(
            f"pools of {keys.dtype}{list(keys.shape)} and {values.dtype}{list(values.shape)}; legal"
            " are two like float32, bfloat16 or int8 [*positions, K, H]."
        )
    if keys.shape[-2:] != k.shape[2:]:
        raise ValueError(f"k has heads {list(k.shape[2:])}, the pool {list(keys.shape[-2:])}.")
    want = [(keys.shape[:-1], jnp.float32)] * (2 if keys.dtype == jnp.int8 else 0)
    if [(x.shape, x.dtype) for x in scales] != want:
        raise ValueError(
            f"{len(scales)} scales with a pool of {keys.dtype}; an int8 pool has two, float32"
            f"{list(keys.shape[:-1])}, others have none."
        )
