"""Causal attention of a piece of each sequence over keys and values in blocks; its reference.

Sequences name their blocks in a table (PagedAttention, arXiv:2309.06180), so that they can grow in
one pool and share what they have in common; a cache of whole rows is the case of one block a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from internjax.kernels.cpu import library

LANES = 16
MOST_QUERIES = 128  # of a sequence: the pieces that prompts are cut into
DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8)


def paged_attention(
    q: Float[Array, "B T N H"],
    k: Shaped[Array, "P block K H"],
    v: Shaped[Array, "P block K H"],
    table: Int[Array, "B blocks"],
    lengths: Int[Array, " B"],
    *,
    k_scale: Float[Array, "P block K"] | None = None,
    v_scale: Float[Array, "P block K"] | None = None,
    implementation: str | None = None,
    path: str = "",
) -> Float[Array, "B T N H"]:
    """Computes softmax(q k^T / sqrt(H)) v, causal: the last query of a sequence sees all its keys.

    Args:
      k, v: the pool, float32, bfloat16 or int8; P blocks of `block` positions.
      table: the blocks of each sequence in order; entries behind its length are not read.
      lengths: positions of each sequence, the queries' own among them. Queries that see no key
        give 0.
      k_scale, v_scale: of an int8 pool, which holds value / scale.
      implementation: "cpu" the kernel, "xla" plain jnp; None takes the kernel where it is there.
      path: instruction set, one of `library.PATHS`; "" the fastest that this CPU has.

    Raises:
      ValueError: shapes, dtypes or a choice that cannot be served.
    """
    check(q, k, v, table, lengths, k_scale, v_scale)
    if not library.check_choice(implementation, path):
        return reference(q, k, v, table, lengths, k_scale=k_scale, v_scale=v_scale)
    call = jax.ffi.ffi_call("internjax_paged_attention", jax.ShapeDtypeStruct(q.shape, jnp.float32))
    none = jnp.zeros((0,), jnp.float32)
    scales = (none, none) if k_scale is None else (k_scale, v_scale)
    where = table.astype(jnp.int32), lengths.astype(jnp.int32)
    return call(q.astype(jnp.float32), k, v, *scales, *where, path=path).astype(q.dtype)


def serves(q: Array | jax.ShapeDtypeStruct, dtype) -> bool:
    """Whether the kernel is there and takes such queries over a pool of `dtype`."""
    fits = q.shape[1] <= MOST_QUERIES and q.shape[3] % LANES == 0
    return fits and q.dtype in DTYPES[:2] and dtype in DTYPES and library.available()


def check(q, k, v, table, lengths, k_scale, v_scale) -> None:
    """Raises ValueError, with what was given and what is legal, before anything is launched."""
    if q.ndim != 4 or q.dtype not in DTYPES[:2]:
        raise ValueError(
            f"q is {q.dtype}{list(q.shape)}; legal are float32, bfloat16 [B, T, N, H]."
        )
    B, T, N, H = q.shape
    if not 1 <= T <= MOST_QUERIES:
        raise ValueError(f"{T} queries a sequence; legal are 1..{MOST_QUERIES}.")
    if H % LANES:
        raise ValueError(f"heads of {H} numbers; legal are multiples of {LANES}.")
    if k.dtype not in DTYPES or k.dtype != v.dtype or k.shape != v.shape or k.ndim != 4:
        raise ValueError(
            f"k is {k.dtype}{list(k.shape)}, v {v.dtype}{list(v.shape)}; legal are two like"
            " float32, bfloat16 or int8 [blocks, positions, K, H]."
        )
    if k.shape[3] != H or N % k.shape[2]:
        raise ValueError(f"q has {N} heads of {H}, the pool {k.shape[2]} of {k.shape[3]}.")
    if table.ndim != 2 or len(table) != B or lengths.shape != (B,):
        raise ValueError(
            f"table {list(table.shape)} and lengths {list(lengths.shape)} for {B} sequences; legal"
            f" are [{B}, blocks] and [{B}]."
        )
    if (k.dtype == jnp.int8) != (k_scale is not None) or (k_scale is None) != (v_scale is None):
        raise ValueError(f"k_scale and v_scale go with an int8 pool, and with no {k.dtype} one.")
    if k_scale is not None:
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale.shape != k.shape[:3] or scale.dtype != jnp.float32:
                given = f"{name} is {scale.dtype}{list(scale.shape)}"
                raise ValueError(f"{given}; legal is float32{list(k.shape[:3])}.")


def reference(
    q: Float[Array, "B T N H"],
    k: Shaped[Array, "P block K H"],
    v: Shaped[Array, "P block K H"],
    table: Int[Array, "B blocks"],
    lengths: Int[Array, " B"],
    *,
    k_scale: Float[Array, "P block K"] | None = None,
    v_scale: Float[Array, "P block K"] | None = None,
) -> Float[Array, "B T N H"]:
    """Computes `paged_attention` in plain jnp: every sequence's keys copied out of the pool."""
    B, T, N, H = q.shape
    K, C = k.shape[2], table.shape[1] * k.shape[1]
    legal = jnp.clip(table, 0, len(k) - 1)

    def rows(pool: Array, scale: Array | None) -> Array:
        out = pool[legal].reshape(B, C, K, H).astype(jnp.float32)
        return out if scale is None else out * scale[legal].reshape(B, C, K, 1)

    keys, values = rows(k, k_scale), rows(v, v_scale)
    last = jnp.clip(lengths, 0, C)[:, None] - jnp.arange(T)[::-1][None]  # [B, T] keys seen
    seen = (jnp.arange(C)[None, None] < last[..., None])[:, None, None]
    groups = q.astype(jnp.float32).reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BCKH->BKGTC", groups, keys) * H**-0.5
    scores = jnp.where(seen, scores, -jnp.inf)
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.where(seen, jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1.0, total)
    # What is not seen must not reach the sum, be it NaN.
    values = jnp.where((jnp.arange(C)[None] < lengths[:, None])[..., None, None], values, 0.0)
    return jnp.einsum("BKGTC,BCKH->BTKGH", weights, values).reshape(B, T, N, H).astype(q.dtype)
