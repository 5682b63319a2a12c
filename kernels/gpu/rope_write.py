"""Rotates queries and keys and writes keys and values into the blocks of a cache, on Hopper GPUs.

A block of threads takes one head of 64 tokens: a query head is rotated, a KV head is rotated,
quantized where the cache is, and written row by row to wherever its tokens live. The pool is
changed in place when the caller donates it.
Letters beside the usual: M tokens, P blocks of the pool, C positions of a block.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from internjax.kernels.gpu.decode_attention import STEPS, KVPool, quantize_kv
from internjax.kernels.gpu.wgmma import MATRIX, down, swizzled
from internjax.kernels.platform import choose, not_for_hopper

TOKENS = 64  # of a block of threads
HEAD_SIZES = (64, 128, 256)


def destinations(
    table: Int[Array, "S B"], lengths: Int[Array, " S"], tokens: int, block: int
) -> Int[Array, "S T"]:
    """Where each slot's newest `tokens` go: block * C + offset, or -1 before the first position."""
    position = lengths[:, None] - tokens + jnp.arange(tokens, dtype=lengths.dtype)[None]
    at = jnp.maximum(position, 0)
    owned = jnp.take_along_axis(table, at // block, axis=1)
    return jnp.where(position >= 0, owned * block + at % block, -1)


def rope_write(
    q: Float[Array, "S T N H"],
    k: Float[Array, "S T K H"],
    v: Float[Array, "S T K H"],
    angle: Float[Array, "S T half"],
    pool: KVPool,
    places: Int[Array, "S T"],
    *,
    factor: float = 1.0,
    implementation: str | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "S T N H"], KVPool]:
    """Returns the rotated queries and the pool with the rotated keys and the values.

    Dim i turns with dim i + H/2, in float32, rounded once: to bfloat16 or to the pool's steps.

    Args:
      places: from `destinations`; tokens at -1 are not written.
      factor: on cosine and sine (YaRN's attention factor).
      implementation: None, "xla" or "pallas".
      interpret: `plgpu.InterpretGPUParams`, to run the Hopper kernel on a CPU.
    """
    H, K = q.shape[-1], pool.k.shape[2]
    if k.shape != v.shape or k.shape[2:] != (K, H) or angle.shape[-1] * 2 != H:
        raise ValueError(
            f"rope_write: queries {q.shape}, keys {k.shape}, values {v.shape}, angles"
            f" {angle.shape} into {pool.k.shape}; legal are heads of one size H, angles of H/2 and"
            f" {K} KV heads."
        )
    served = {"xla": None, "pallas": why_not(q, k, pool) or not_for_hopper(interpret)}
    best = "xla" if served["pallas"] else "pallas"
    chosen = choose("rope_write", implementation, served, best=best)
    turns = jnp.stack([jnp.cos(angle), jnp.sin(angle)]).astype(jnp.float32) * factor
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    given = flat(q), flat(k), flat(v), turns.reshape(2, -1, H // 2), pool, places.reshape(-1)
    if chosen == "xla" or not places.size:
        rotated, pool = reference(*given)
    else:
        rotated, pool = _launch(*given, interpret)
    return rotated.reshape(q.shape), pool


def why_not(q: Array, k: Array, pool: KVPool) -> str | None:
    """Says what the Hopper kernel does not serve in these arrays, or None."""
    if q.shape[-1] not in HEAD_SIZES:
        return f"head size {q.shape[-1]}; legal are {HEAD_SIZES}."
    legal = jnp.bfloat16 if pool.scales is None else jnp.uint8
    if q.dtype != jnp.bfloat16 or k.dtype != jnp.bfloat16 or pool.k.dtype != legal:
        return (
            f"queries of {q.dtype}, keys of {k.dtype} into {pool.k.dtype}; legal are bfloat16 and,"
            " with scales, a pool of uint8."
        )
    return None


def reference(
    q: Float[Array, "M N H"],
    k: Float[Array, "M K H"],
    v: Float[Array, "M K H"],
    turns: Float[Array, "2 M half"],
    pool: KVPool,
    places: Int[Array, " M"],
) -> tuple[Float[Array, "M N H"], KVPool]:
    """Says in plain jnp what `rope_write` computes of tokens in one dim."""
    cos, sin = turns[:, :, None]

    def rotate(x: Array) -> Array:
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    rows = rotate(k), v.astype(jnp.float32)
    block, offset = _where(places, pool)
    if pool.scales is None:
        stored, scales = [x.astype(pool.k.dtype) for x in rows], None
    else:
        quantized = [quantize_kv(x, pool.bits(k.shape[-1])) for x in rows]
        stored = [values for values, *_ in quantized]
        factors = jnp.stack([x for _, *pair in quantized for x in pair], axis=-1)  # [M, K, 4]
        scales = pool.scales.at[block, :, :, offset].set(factors, mode="drop")
    write = lambda pool, x: pool.at[block, offset].set(x, mode="drop")  # noqa: E731
    pool = KVPool(write(pool.k, stored[0]), write(pool.v, stored[1]), scales)
    return rotate(q).astype(q.dtype), pool


def _where(places: Array, pool: KVPool) -> tuple[Array, Array]:
    """Block and offset of every token; no block for those at -1."""
    P, C = pool.k.shape[:2]
    return jnp.where(places >= 0, places // C, P), places % C


def _launch(
    q: Array, k: Array, v: Array, turns: Array, pool: KVPool, places: Array, interpret: Any
) -> tuple[Array, KVPool]:
    (M, N, H), K, C = q.shape, k.shape[1], pool.k.shape[1]
    half, stored_bits = H // 2, pool.bits(H)
    quantized, width = stored_bits < 16, pool.k.shape[-1]
    pad = -M % TOKENS
    padded = [jnp.pad(x, ((0, pad), (0, 0), (0, 0))) for x in (q, k, v)]
    turns = jnp.pad(turns, ((0, 0), (0, pad), (0, 0)))
    goals = jnp.pad(places.astype(jnp.int32), (0, pad), constant_values=-1)

    def body(q_gm, k_gm, v_gm, turns_gm, goals_gm, k_pool, v_pool, out_gm, *more, **scratch):
        x_sm, turns_sm, rows_sm, goals_sm, barrier = (
            scratch[name] for name in ("x_sm", "turns_sm", "rows_sm", "goals_sm", "barrier")
        )
        i, head = lax.axis_index("i"), lax.axis_index("head")
        tokens = pl.ds(i * TOKENS, TOKENS)

        def fetch(x_gm, h):
            plgpu.copy_gmem_to_smem(x_gm.at[tokens, h], x_sm, barrier)
            plgpu.barrier_wait(barrier)

        def halves():
            parts = (x_sm.at[:, pl.ds(n * half, half)] for n in range(2))
            return [plgpu.load(part, layout=MATRIX).astype(jnp.float32) for part in parts]

        def rotated():
            first, second = halves()
            cos, sin = (plgpu.load(turns_sm.at[n], layout=MATRIX) for n in range(2))
            return first * cos - second * sin, second * cos + first * sin

        def write(parts, h, which, pool_gm):
            """Rounds two halves and copies every token's row to its place."""
            if not quantized:
                for n, part in enumerate(parts):
                    put = rows_sm.at[:, pl.ds(n * half, half)]
                    plgpu.store(put, part.astype(rows_sm.dtype), optimized=False)
            else:
                steps = STEPS[stored_bits]
                low = jnp.minimum(*(part.min(axis=1) for part in parts))
                high = jnp.maximum(*(part.max(axis=1) for part in parts))
                least = jnp.maximum(jnp.abs(low), 1e-20) * 2**-20
                scale = jnp.maximum((high - low) / steps, least)
                zero = -low / scale
                for n, values in enumerate((scale, zero)):
                    plgpu.store(more[0].at[which * 2 + n, h, tokens], values, optimized=False)
                whole = [_steps(part, scale, zero, steps, half) for part in parts]
                if stored_bits == 4:
                    whole = [whole[0] + whole[1] * 16]
                for n, part in enumerate(whole):
                    put = rows_sm.at[:, pl.ds(n * half, half)]
                    plgpu.store(put, _bytes(part), optimized=False)
            plgpu.commit_smem()

            def copy(token, _):
                place = goals_sm[token]

                @pl.when(place >= 0)
                def _():
                    at = pool_gm.at[lax.div(place, C), pl.ds(lax.rem(place, C), 1), h]
                    plgpu.copy_smem_to_gmem(rows_sm.at[pl.ds(token, 1)], at)

                return ()

            lax.fori_loop(0, TOKENS, copy, ())
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        plgpu.copy_gmem_to_smem(turns_gm.at[:, tokens], turns_sm, barrier)
        plgpu.barrier_wait(barrier)

        @pl.when(head < N)
        def _():
            fetch(q_gm, head)
            for n, part in enumerate(rotated()):
                x_sm[:, pl.ds(n * half, half)] = part.astype(x_sm.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(x_sm, out_gm.at[tokens, head])

        @pl.when(head >= N)
        def _():
            plgpu.copy_gmem_to_smem(goals_gm.at[tokens], goals_sm, barrier)
            plgpu.barrier_wait(barrier)
            fetch(k_gm, head - N)
            write(rotated(), head - N, 0, k_pool)
            fetch(v_gm, head - N)
            write(halves(), head - N, 1, v_pool)

        plgpu.wait_smem_to_gmem(0)

    refs = jax.new_ref(pool.k), jax.new_ref(pool.v)
    out_type = [jax.ShapeDtypeStruct(padded[0].shape, q.dtype)]
    if quantized:
        out_type.append(jax.ShapeDtypeStruct((4, K, M + pad), jnp.float32))
    found = plgpu.kernel(
        body,
        out_type=out_type,
        grid=((M + pad) // TOKENS, N + K),
        grid_names=("i", "head"),
        scratch_types={
            "x_sm": plgpu.SMEM((TOKENS, H), q.dtype, transforms=swizzled(16, half)),
            "turns_sm": plgpu.SMEM((2, TOKENS, half), jnp.float32, transforms=swizzled(32, half)),
            "rows_sm": plgpu.SMEM((TOKENS, width), pool.k.dtype),
            "goals_sm": plgpu.SMEM((TOKENS,), jnp.int32),
            "barrier": plgpu.Barrier(),
        },
        kernel_name=f"rope_write_{stored_bits}",
        interpret=interpret,
    )(*padded, turns, goals, *refs)
    k_pool, v_pool = (jax.freeze(ref) for ref in refs)
    scales = None
    if quantized:  # single numbers, one slot apart: XLA's scatter
        block, offset = _where(places, pool)
        factors = found[1][:, :, :M].transpose(2, 1, 0)
        scales = pool.scales.at[block, :, :, offset].set(factors, mode="drop")
    return found[0][:M], KVPool(k_pool, v_pool, scales)


def _steps(x: Array, scale: Array, zero: Array, steps: int, columns: int) -> Array:
    """What `quantize_kv` rounds to; never negative, so that cutting off is rounding down."""
    whole = (x / down(scale, columns) + down(zero, columns) + 0.5).astype(jnp.int32)
    return jnp.clip(whole, 0, steps)


def _bytes(x: Array) -> Array:
    """Integers 0..255 as uint8, by way of int8, which registers convert to."""
    return (x - 128).astype(jnp.int8).astype(jnp.uint8) ^ 128
