"""Attention of the newest tokens to a cache in blocks, on Hopper: bfloat16, int8 or int4 keys.

A block of threads takes one slot, one KV head and one part of the slot's keys (split-K, as
FlashDecoding: https://pytorch.org/blog/flash-decoding); the parts meet by their log sums. One query
a slot is decoding, several verify speculated tokens (arXiv:2211.17192): query t of T stands at
position length - T + t. Quantized keys are multiplied as they are, exact in bfloat16; scales and
zeros come after the sums.
Letters beside the usual: P blocks of the pool, C positions of a block, R = G T rows of one KV head.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from internjax.kernels.gpu.wgmma import (
    COLUMNS,
    MATRIX,
    MULTIPROCESSORS,
    ROWS,
    across,
    add_products,
    down,
    filled,
    swizzled,
)
from internjax.kernels.platform import choose, not_for_hopper

NEG = -1e30  # log2 of nothing: finite, so that nothing minus nothing is 0
MOST_ROWS = 64  # of wgmma
HEAD_SIZES = {16: (64, 80, 96, 128, 256), 8: (64, 96, 128, 256), 4: (64, 128, 256)}  # by bits
BLOCKS = (64, 128)  # positions of a block
MOST_BLOCK = 128 * 128  # numbers of a block: shared memory holds four
LEAST_PART, MOST_PARTS = 256, 32  # keys of a part, parts of a slot
MOST_COLUMNS = 256  # of what TMA copies at one time
MOST_UNPACKED = 128  # bytes of a stored vector at one time, a tile: more spill beside sums of 256
STAGES = 2  # blocks of keys in flight: two thread blocks then fit an SM
STEPS = {8: 255, 4: 15}


class KVPool(NamedTuple):
    """Keys and values of one layer, in blocks that any slot may own.

    Fields:
      k, v: `[P, C, K, H]` bfloat16, or uint8: int8 `[P, C, K, H]`, int4 `[P, C, K, H/2]` with dim i
        in the low and dim i + H/2 in the high nibble.
      scales: None, or float32 `[P, K, 4, C]`: scale and zero of a position's key, scale and zero of
        its value: x = (q - zero) * scale.
    """

    k: Any
    v: Any
    scales: Any = None

    def bits(self, head_dim: int) -> int:
        """Bits of a stored number: 16, 8 or 4."""
        if self.scales is None:
            return 16
        return 8 if self.k.shape[-1] == head_dim else 4


def quantize_kv(
    x: Float[Array, "*B H"], bits: int
) -> tuple[Array, Float[Array, "*B"], Float[Array, "*B"]]:
    """Rounds each vector to 2^bits steps from its minimum to its maximum; int4 is packed.

    scale = (max - min) / steps, zero = -min / scale, q = floor(x / scale + zero + 1/2), as
    LMDeploy's online KV quantization (lmdeploy/pytorch/kernels/cuda/fill_kv_cache.py).
    """
    if bits not in STEPS:
        raise ValueError(f"quantize_kv: bits={bits}; legal are 8 and 4.")
    wide = x.astype(jnp.float32)
    low, high = wide.min(axis=-1), wide.max(axis=-1)
    # The floor keeps a constant vector's zero finite.
    scale = jnp.maximum((high - low) / STEPS[bits], jnp.maximum(jnp.abs(low), 1e-20) * 2**-20)
    zero = -low / scale
    q = jnp.floor(wide / scale[..., None] + zero[..., None] + 0.5)
    q = jnp.clip(q, 0, STEPS[bits]).astype(jnp.uint8)
    if bits == 4:
        first, second = jnp.split(q, 2, axis=-1)
        q = first | (second << 4)
    return q, scale, zero


def dequantize_kv(
    q: Array, scale: Float[Array, "*B"], zero: Float[Array, "*B"], head_dim: int
) -> Float[Array, "*B H"]:
    """Returns the float32 vectors that `quantize_kv` stands for."""
    if q.shape[-1] != head_dim:
        q = jnp.concatenate([q & 15, q >> 4], axis=-1)
    return (q.astype(jnp.float32) - zero[..., None]) * scale[..., None]


def decode_attention(
    q: Float[Array, "S T N H"],
    pool: KVPool,
    table: Int[Array, "S M"],
    lengths: Int[Array, " S"],
    *,
    implementation: str | None = None,
    interpret: Any = None,
) -> Float[Array, "S T N H"]:
    """Attends each slot's newest T tokens, already written, to all of its tokens so far.

    A query that sees nothing (an empty slot) gives 0. Scores and sums are float32.

    Args:
      table: blocks of a slot in order; entries beyond its length are never read.
      lengths: positions written, the T newest among them.
      implementation: None, "xla" or "pallas".
      interpret: `plgpu.InterpretGPUParams`, to run the Hopper kernel on a CPU.
    """
    _check(q, pool, table)
    served = {"xla": None, "pallas": why_not(q, pool) or not_for_hopper(interpret)}
    best = "xla" if served["pallas"] else "pallas"
    chosen = choose("decode_attention", implementation, served, best=best)
    if chosen == "xla" or not len(q):
        return reference(q, pool, table, lengths)
    return _in_parts(q, pool, table, lengths, interpret)


def _check(q: Array, pool: KVPool, table: Array) -> None:
    H, K = q.shape[-1], pool.k.shape[2]
    stored = {16: H, 8: H, 4: H // 2}[pool.bits(H)]
    shape = (*pool.k.shape[:3], stored)
    scales = None if pool.scales is None else (shape[0], K, 4, shape[1])
    found = (pool.k.shape, pool.v.shape, getattr(pool.scales, "shape", None))
    if found != (shape, shape, scales) or q.shape[2] % K:
        raise ValueError(
            f"decode_attention: queries {q.shape}, keys {found[0]}, values {found[1]}, scales"
            f" {found[2]}; legal are [S, T, N, H], twice [P, C, K, H] (int4: H/2) and [P, K, 4, C],"
            " with N a multiple of K."
        )
    if len(table) != len(q):
        raise ValueError(f"decode_attention: a table of {len(table)} slots for {len(q)} slots.")


def why_not(q: Array, pool: KVPool) -> str | None:
    """Says what the Hopper kernel does not serve in these arrays, or None."""
    _, T, N, H = q.shape
    _, C, K, _ = pool.k.shape
    if H not in HEAD_SIZES[pool.bits(H)]:
        return f"head size {H} in {pool.bits(H)} bits; legal are {HEAD_SIZES[pool.bits(H)]}."
    if C not in BLOCKS or C * H > MOST_BLOCK:
        return f"blocks of {C} positions; legal are {BLOCKS}, and 64 for head size 256."
    if N // K * T > MOST_ROWS:
        return f"{N // K} query heads a KV head x {T} queries; legal are {MOST_ROWS} at most."
    legal = jnp.bfloat16 if pool.scales is None else jnp.uint8
    if q.dtype != jnp.bfloat16 or pool.k.dtype != legal or pool.v.dtype != legal:
        return (
            f"queries of {q.dtype}, keys of {pool.k.dtype}, values of {pool.v.dtype}; legal are"
            " bfloat16, and with scales keys and values of uint8."
        )
    return None


def reference(
    q: Float[Array, "S T N H"],
    pool: KVPool,
    table: Int[Array, "S M"],
    lengths: Int[Array, " S"],
) -> Float[Array, "S T N H"]:
    """Says in plain jnp what `decode_attention` computes: gathers all blocks, masks, sums."""
    S, T, N, H = q.shape
    _, C, K, _ = pool.k.shape
    length = table.shape[1] * C
    used = jnp.arange(table.shape[1])[None] * C < lengths[:, None]
    blocks = jnp.where(used, table, 0)

    def rows(x: Array, at: int) -> Array:
        parts = x[blocks]  # [S, M, C, K, H]
        if pool.scales is not None:
            scale, zero = (pool.scales[blocks][:, :, :, at + i].swapaxes(2, 3) for i in range(2))
            parts = dequantize_kv(parts, scale, zero, H)
        return parts.astype(jnp.float32).reshape(S, length, K, H)

    groups = q.astype(jnp.float32).reshape(S, T, K, N // K, H)
    scores = jnp.einsum("STKGH,SCKH->SKGTC", groups, rows(pool.k, 0)) * H**-0.5
    last = lengths[:, None] - T + jnp.arange(T)[None]  # position of every query
    seen = jnp.arange(length)[None, None] <= last[:, :, None]
    seen = (seen & (last >= 0)[:, :, None])[:, None, None]
    scores = jnp.where(seen, scores, NEG)
    weights = jnp.where(seen, jnp.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
    weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    # What no query may see must not spoil it: 0 times NaN is NaN.
    values = jnp.where(
        (jnp.arange(length)[None] < lengths[:, None])[..., None, None], rows(pool.v, 2), 0.0
    )
    mixed = jnp.einsum("SKGTC,SCKH->STKGH", weights, values)
    return mixed.reshape(S, T, N, H).astype(q.dtype)


def parts_of(slots: int, kv_heads: int, positions: int) -> int:
    """Parts of a slot's keys: enough for two blocks on every SM, none of a few keys only."""
    wanted = -(-2 * MULTIPROCESSORS // (slots * kv_heads))
    return max(1, min(wanted, positions // LEAST_PART, MOST_PARTS))


def _in_parts(q: Array, pool: KVPool, table: Array, lengths: Array, interpret: Any) -> Array:
    S, T, N, H = q.shape
    C, K = pool.k.shape[1:3]
    G, blocks = N // K, table.shape[1]
    rows = -(-G * T // 8) * 8
    parts = parts_of(S, K, blocks * C)
    queries = q.reshape(S, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(S, K, G * T, H)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, rows - G * T), (0, 0)))
    columns = min(-(-blocks // 4) * 4, MOST_COLUMNS)  # TMA copies multiples of 16 bytes
    table = jnp.pad(table.astype(jnp.int32), ((0, 0), (0, -blocks % columns)))
    table = table.reshape(S, -1, columns)
    shape = _Shape(rows, T, H, C, parts, pool.bits(H))
    out, log_sums = _launch(shape, queries, pool, table, lengths.astype(jnp.int32), interpret)
    share = jnp.exp2(log_sums - log_sums.max(axis=2, keepdims=True))  # [S, K, parts, rows]
    share = (share / share.sum(axis=2, keepdims=True))[:, :, :, :rows, None]
    mixed = jnp.sum(out * share, axis=2) if parts > 1 else out[:, :, 0]
    mixed = mixed[:, :, : G * T].reshape(S, K, G, T, H).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(S, T, N, H).astype(q.dtype)


class _Shape(NamedTuple):
    rows: int
    queries: int
    head_dim: int
    block: int
    parts: int
    bits: int


def _launch(
    shape: _Shape, queries: Array, pool: KVPool, table: Array, lengths: Array, interpret: Any
) -> tuple[Array, Array]:
    """Runs the kernel: results of every part and the base-2 logarithms of their sums."""
    rows, T, H, C, parts, bits = shape
    S, K = queries.shape[:2]
    quantized = bits < 16
    middle = 2.0 ** (bits - 1) if quantized else 0.0  # stored numbers less this are signed
    width = H // 2 if bits == 4 else H
    scale = H**-0.5 * math.log2(math.e)
    out_dtype = jnp.float32 if parts > 1 else jnp.bfloat16

    def body(q_gm, k_gm, v_gm, *refs, ends, sums_sm, table_sm, staged, p_sm, barrier):
        q_sm, out_sm = ends
        scales_gm = refs[0] if quantized else None
        table_gm, lengths_gm, out_gm, sums_gm = refs[-4:]
        s, h, part = (lax.axis_index(name) for name in ("s", "h", "part"))
        some = pl.ds(0, rows)
        plgpu.copy_gmem_to_smem(q_gm.at[s, h], q_sm.at[some], barrier)
        plgpu.copy_gmem_to_smem(table_gm.at[s], table_sm, barrier)
        plgpu.barrier_wait(barrier)
        length = lengths_gm[s]
        blocks = lax.div(length + (C - 1), C)
        per_part = lax.div(blocks + (parts - 1), parts)
        first = part * per_part
        count = jnp.clip(blocks - first, 0, per_part)

        query = lax.rem(plgpu.broadcasted_iota(jnp.int32, (MOST_ROWS, C), 0, layout=MATRIX), T)
        last = query + (length - T)  # position of a row's query
        columns = plgpu.broadcasted_iota(jnp.int32, (MOST_ROWS, C), 1, layout=MATRIX)
        q_sum = None
        if quantized:
            q_rows = plgpu.load(q_sm, layout=MATRIX).astype(jnp.float32)
            q_sum = q_rows.sum(axis=1)

        def unpacked(x_sm, to):
            """The signed integers of a block as bfloat16, in shared memory as wgmma takes them."""
            if not quantized:
                return x_sm
            for at in range(0, width, MOST_UNPACKED):
                here = pl.ds(at, min(MOST_UNPACKED, width))
                x = plgpu.load(x_sm.at[:, here], layout=MATRIX)
                if bits == 8:
                    to[:, here] = (x ^ 128).astype(jnp.int8).astype(jnp.bfloat16)
                else:
                    low = (x & 15).astype(jnp.int8).astype(jnp.bfloat16)
                    high = ((x & 240) ^ 128).astype(jnp.int8).astype(jnp.bfloat16)
                    to[:, here] = low - jnp.bfloat16(8)
                    to[:, pl.ds(width + at, here.size)] = high * jnp.bfloat16(1 / 16)
            plgpu.commit_smem()
            return to

        def product(a, b, start):
            return add_products(start, [(lambda: a, b)], interpreted=interpret is not None)

        def factor(scales_sm, n):
            return across(plgpu.load(scales_sm.at[n], layout=COLUMNS), MOST_ROWS)

        def clear_end(v_sm, written):
            """Makes 0 what nobody wrote in a block: 0 times what was there may be NaN."""

            @pl.when(written < C)
            def _():
                at = plgpu.broadcasted_iota(jnp.int32, (C, H), 0, layout=MATRIX)
                values = plgpu.load(v_sm, layout=MATRIX)
                v_sm[...] = jnp.where(at < written, values, jnp.zeros_like(values))
                plgpu.commit_smem()

        def step(index, k_sm, v_sm, *rest):
            top, total, mixed = rest[-1]
            keys = unpacked(k_sm, staged[0]).transpose((1, 0))
            scores = product(q_sm, keys, filled(0.0, (MOST_ROWS, C)))
            if quantized:
                scores -= down(q_sum, C) * (factor(rest[0], 1) - middle)
                scores *= factor(rest[0], 0)
            seen = columns + (first + index[0]) * C <= last
            scores = jnp.where(seen, scores * scale, NEG)
            new_top = jnp.maximum(top, scores.max(axis=1))
            shrink = jnp.exp2(top - new_top)
            weights = jnp.where(seen, jnp.exp2(scores - down(new_top, C)), 0.0)
            total = total * shrink + weights.sum(axis=1)
            if quantized:
                weights = jnp.where(seen, weights * factor(rest[0], 2), 0.0)
            weights = weights.astype(jnp.bfloat16)
            mixed *= down(shrink, H)
            if quantized:  # of the rounded weights: what is added is taken off again exactly
                off = weights.astype(jnp.float32) * (factor(rest[0], 3) - middle)
                mixed -= down(jnp.where(seen, off, 0.0).sum(axis=1), H)
            else:
                clear_end(v_sm, length - (first + index[0]) * C)
            values = unpacked(v_sm, staged[1])
            if interpret is not None:  # wgmma is interpreted with shared operands only
                p_sm[...] = weights
                plgpu.commit_smem()
                weights = p_sm
            return new_top, total, product(weights, values, mixed)

        start = (
            filled(NEG, (MOST_ROWS,), ROWS),
            filled(0.0, (MOST_ROWS,), ROWS),
            filled(0.0, (MOST_ROWS, H)),
        )

        def block(t):
            at = first + t
            return table_sm[lax.div(at, table.shape[2]), lax.rem(at, table.shape[2])]

        place = lambda t: (block(t), 0, h, 0)  # noqa: E731
        stored = swizzled(8 if quantized else 16, width)
        specs = [plgpu.BlockSpec((None, C, None, width), place, transforms=stored)] * 2
        if quantized:
            here = lambda t: (block(t), h, 0, 0)  # noqa: E731
            specs.append(plgpu.BlockSpec((None, None, 4, C), here))
        top, total, mixed = plgpu.emit_pipeline(
            step, grid=(count,), in_specs=specs, max_concurrent_steps=STAGES, init_carry=start
        )(k_gm, v_gm, *([scales_gm] if quantized else []))
        some_seen = total > 0
        safe = jnp.where(some_seen, total, 1.0)
        out_sm[...] = (mixed / down(safe, H)).astype(out_dtype)
        sums_sm[...] = jnp.where(some_seen, top + jnp.log2(safe), NEG)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_sm.at[some], out_gm.at[s, h, part])
        plgpu.copy_smem_to_gmem(sums_sm, sums_gm.at[s, h, part])
        plgpu.wait_smem_to_gmem(0)

    def tile(columns, dtype, tiled=None, rows=MOST_ROWS):
        transforms = swizzled(jax.dtypes.itemsize_bits(dtype), tiled or columns)
        return plgpu.SMEM((rows, columns), dtype, transforms=transforms)

    operands = (queries, pool.k, pool.v, *([pool.scales] if quantized else []), table, lengths)
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((S, K, parts, rows, H), out_dtype),
            jax.ShapeDtypeStruct((S, K, parts, MOST_ROWS), jnp.float32),
        ),
        grid=(S, K, parts),
        grid_names=("s", "h", "part"),
        scratch_types={
            # Queries are of no use when results come: they share memory.
            "ends": plgpu.RefUnion(tile(H, jnp.bfloat16, width), tile(H, out_dtype)),
            "sums_sm": plgpu.SMEM((MOST_ROWS,), jnp.float32),
            "table_sm": plgpu.SMEM(table.shape[1:], jnp.int32),
            # Both factors of a product are tiled alike: int4's halves are written apart.
            "staged": [tile(H, jnp.bfloat16, width, C) if quantized else None] * 2,
            "p_sm": tile(C, jnp.bfloat16) if interpret is not None else [],
            "barrier": plgpu.Barrier(num_arrivals=2),
        },
        kernel_name=f"decode_attention_{bits}",
        interpret=interpret,
    )(*operands)
