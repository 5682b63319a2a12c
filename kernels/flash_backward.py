"""Gradients of the flash attention of `kernels/flash.py`: one kernel for queries, one for keys.

Scores are made again from the normaliser (arXiv:2205.14135). Each kernel adds up what it alone
writes, so gradients are the same in every run; the price is that two of seven matrix products are
made twice. The work of warpgroups and their turns are as in the forward kernel.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from internjax.kernels.flash import (
    BY_COLUMN,
    BY_ROW,
    COMPUTE,
    LOG2E,
    MATRIX,
    ROWS,
    TILE,
    Blocks,
    Rule,
    bent,
    broadcast,
    filled,
    key_bounds,
    products,
    query_bounds,
    shared,
    where_seen,
)

FOR_QUERIES = {
    64: Blocks(64, 4),
    80: Blocks(64, 4),
    96: Blocks(64, 4),
    128: Blocks(64, 3),
    256: Blocks(32, 2),
}
FOR_KEYS = {
    64: Blocks(64, 4),
    80: Blocks(64, 3),
    96: Blocks(64, 3),
    128: Blocks(64, 2),
    256: Blocks(32, 2),
}
APART = (
    256  # head size whose gradients of keys and of values are too large for one thread's registers
)


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    ids: Int[Array, "B T"] | None,
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    g: Float[Array, "B T N H"],
    rule: Rule,
    interpret: Any = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Returns the gradients of q, k, v; `out` and `lse` are what `forward` returned."""
    inner = jnp.einsum("BTNH,BTNH->BNT", g, out, preferred_element_type=jnp.float32)
    args = (q, k, v, ids, g, lse * LOG2E, inner, rule, interpret)
    if q.shape[-1] < APART:
        g_k, g_v = of_keys(*args)
    else:
        (g_k,), (g_v,) = of_keys(*args, want=("k",)), of_keys(*args, want=("v",))
    return of_queries(*args), g_k, g_v


def of_queries(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    ids: Int[Array, "B T"] | None,
    g: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    inner: Float[Array, "B N T"],
    rule: Rule,
    interpret: Any,
) -> Float[Array, "B T N H"]:
    """Returns the gradient of q.

    Args:
      lse: log2 of the normaliser; inner: g times the output, summed over H.
    """
    B, T, N, H = q.shape
    G, blocks, tiles = N // k.shape[2], FOR_QUERIES[H], T // TILE
    C, stages, packed = blocks.keys, blocks.stages, ids is not None
    bounds = key_bounds(T, rule, ids, C)

    def body(bounds_gm, q_gm, k_gm, v_gm, g_gm, lse_gm, inner_gm, *rest, **memory):
        *ids_gm, out_gm = rest
        b, n, wg = (lax.axis_index(name) for name in ("batch", "head", "wg"))
        tile = tiles - 1 - lax.axis_index("tile")  # the longest first
        kv = lax.div(n, jnp.int32(G))
        segment_set = b if bounds.shape[0] > 1 else 0
        first, clear = bounds_gm[segment_set, 0, tile], bounds_gm[segment_set, 1, tile]
        steps = pl.cdiv((tile + 1) * TILE, jnp.int32(C)) - first
        k_sm, v_sm, k_ready, v_ready = (memory[x] for x in ("k", "v", "k_ready", "v_ready"))
        k_free, v_free, turn = (memory[x] for x in ("k_free", "v_free", "turn"))
        slot_of = lambda t: lax.rem(t, jnp.int32(stages))  # noqa: E731

        def compute():
            plgpu.set_max_registers(232, action="increase")
            q_sm, g_sm, ready = (memory[x].at[wg] for x in ("q", "g", "ready"))
            staging = memory["staging"].at[wg] if interpret else None
            start = tile * TILE + wg * ROWS
            here = pl.ds(start, ROWS)
            plgpu.copy_gmem_to_smem(q_gm.at[b, here, n], q_sm, ready)
            plgpu.copy_gmem_to_smem(g_gm.at[b, here, n], g_sm, ready)
            plgpu.copy_gmem_to_smem(lse_gm.at[b, n, here], memory["lse"].at[wg], ready)
            plgpu.copy_gmem_to_smem(inner_gm.at[b, n, here], memory["inner"].at[wg], ready)
            if packed:
                plgpu.copy_gmem_to_smem(ids_gm[0].at[b, here], memory["ids"].at[wg], ready)
            plgpu.barrier_wait(ready)
            full = (start + 1) // C  # blocks before it are before every query

            def pass_turn():
                plgpu.barrier_arrive(turn.at[1 - wg])

            def next_products(t: Array, *terms: tuple) -> list[Array]:
                """Multiplies what is given, and q and g with step t, in this one's turn."""
                slot, zero = slot_of(t), filled(0.0, (ROWS, C), MATRIX)
                plgpu.barrier_wait(k_ready.at[slot])
                plgpu.barrier_wait(v_ready.at[slot])
                plgpu.barrier_wait(turn.at[wg])
                of_q = zero, q_sm, k_sm.at[slot].transpose((1, 0))
                of_g = zero, g_sm, v_sm.at[slot].transpose((1, 0))
                return products(of_q, of_g, *terms, staging=staging, after=pass_turn)

            def scores_gradient(t: Array, scores: Array, of_weights: Array) -> Array:
                slot, block, shape = slot_of(t), first + t, scores.shape
                scores, slope = bent(scores, rule)
                lse = plgpu.load(memory["lse"].at[wg], layout=BY_ROW)
                weights = jnp.exp2(scores * rule.factor - broadcast(lse, shape))

                def hide(weights: Array) -> Array:
                    ids = (memory["ids"].at[wg], memory["key_ids"].at[slot]) if packed else None
                    return where_seen(weights, 0.0, rule, (start, block * C), ids)

                masked = (block < clear) | (block >= full)
                weights = lax.cond(masked, hide, lambda w: w, weights)
                plgpu.barrier_arrive(v_free.at[slot])
                inner = plgpu.load(memory["inner"].at[wg], layout=BY_ROW)
                out = weights * (of_weights - broadcast(inner, shape))
                return (out if slope is None else out * slope).astype(q.dtype)

            def step(t: Array, carry: tuple) -> tuple:
                acc, scores, of_weights = carry
                slot = slot_of(t - 1)
                change = scores_gradient(t - 1, scores, of_weights)
                scores, of_weights, acc = next_products(t, (acc, change, k_sm.at[slot]))
                plgpu.barrier_arrive(k_free.at[slot])
                return acc, scores, of_weights

            pl.when(wg == 1)(pass_turn)  # the other one begins
            carry = filled(0.0, (ROWS, H), MATRIX), *next_products(jnp.int32(0))
            acc, scores, of_weights = lax.fori_loop(1, steps, step, carry)
            change = scores_gradient(steps - 1, scores, of_weights)
            plgpu.barrier_wait(turn.at[wg])
            (acc,) = products((acc, change, k_sm.at[slot_of(steps - 1)]), staging=staging)
            pl.when(wg == 0)(pass_turn)
            q_sm[...] = (acc * rule.scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_sm, out_gm.at[b, here, n])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            plgpu.set_max_registers(40, action="decrease")

            def load(t: Array, _: None) -> None:
                slot, again = slot_of(t), t >= stages
                keys = pl.ds((first + t) * C, C)
                pl.when(again)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                plgpu.copy_gmem_to_smem(k_gm.at[b, keys, kv], k_sm.at[slot], k_ready.at[slot])
                pl.when(again)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                plgpu.copy_gmem_to_smem(v_gm.at[b, keys, kv], v_sm.at[slot], v_ready.at[slot])
                if packed:
                    key_ids = memory["key_ids"].at[slot]
                    plgpu.copy_gmem_to_smem(ids_gm[0].at[b, keys], key_ids, v_ready.at[slot])

            lax.fori_loop(0, steps, load, None)

        pl.when(wg < COMPUTE)(compute)
        pl.when(wg == COMPUTE)(copy)

    memory = {
        "q": shared((COMPUTE, ROWS, H), q.dtype),
        "g": shared((COMPUTE, ROWS, H), q.dtype),
        "k": shared((stages, C, H), q.dtype),
        "v": shared((stages, C, H), q.dtype),
        "lse": plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
        "inner": plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
        "ready": plgpu.Barrier(num_arrivals=4 + packed, num_barriers=COMPUTE),
        "k_ready": plgpu.Barrier(num_barriers=stages),
        "v_ready": plgpu.Barrier(num_arrivals=1 + packed, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        "turn": plgpu.Barrier(num_barriers=COMPUTE),
    }
    if packed:
        memory["ids"] = plgpu.SMEM((COMPUTE, ROWS), jnp.int32)
        memory["key_ids"] = plgpu.SMEM((stages, C), jnp.int32)
    if interpret:
        memory["staging"] = shared((COMPUTE, ROWS, C), q.dtype)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=memory,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(B, tiles, N),
        grid_names=("batch", "tile", "head"),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        kernel_name="flash_backward_queries",
        interpret=interpret,
    )(bounds, q, k, v, g, lse, inner, *([ids] if packed else []))


def of_keys(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    ids: Int[Array, "B T"] | None,
    g: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    inner: Float[Array, "B N T"],
    rule: Rule,
    interpret: Any,
    *,
    want: tuple[str, ...] = ("k", "v"),
) -> list[Float[Array, "B T K H"]]:
    """Returns the gradients of k and v, or of one of them; arguments as in `of_queries`."""
    B, T, N, H = q.shape
    K = k.shape[2]
    G, blocks, tiles = N // K, FOR_KEYS[H], T // TILE
    C, stages, packed = blocks.keys, blocks.stages, ids is not None
    bounds = query_bounds(T, rule, ids, C)

    def body(bounds_gm, q_gm, k_gm, v_gm, g_gm, lse_gm, inner_gm, *rest, **memory):
        ids_gm, outs_gm = rest[:packed], rest[packed:]
        b, kv, tile, wg = (lax.axis_index(name) for name in ("batch", "head", "tile", "wg"))
        segment_set = b if bounds.shape[0] > 1 else 0
        end, clear = bounds_gm[segment_set, 0, tile], bounds_gm[segment_set, 1, tile]
        first = tile * TILE // C
        each = end - first  # blocks of queries of a head
        steps = each * G
        q_sm, g_sm, q_ready, g_ready = (memory[x] for x in ("q", "g", "q_ready", "g_ready"))
        q_free, g_free = memory["q_free"], memory["g_free"]
        slot_of = lambda t: lax.rem(t, jnp.int32(stages))  # noqa: E731
        block_of = lambda t: first + lax.rem(t, each)  # noqa: E731

        def compute():
            plgpu.set_max_registers(232, action="increase")
            k_sm, v_sm, ready = (memory[x].at[wg] for x in ("k", "v", "ready"))
            staging = memory["staging"].at[wg] if interpret else None
            start = tile * TILE + wg * ROWS
            here = pl.ds(start, ROWS)
            plgpu.copy_gmem_to_smem(k_gm.at[b, here, kv], k_sm, ready)
            plgpu.copy_gmem_to_smem(v_gm.at[b, here, kv], v_sm, ready)
            if packed:
                plgpu.copy_gmem_to_smem(ids_gm[0].at[b, here], memory["ids"].at[wg], ready)
            plgpu.barrier_wait(ready)
            zero = filled(0.0, (ROWS, C), MATRIX)

            def step(t: Array, sums: list[Array]) -> list[Array]:
                slot, block, shape = slot_of(t), block_of(t), (ROWS, C)
                plgpu.barrier_wait(q_ready.at[slot])
                plgpu.barrier_wait(g_ready.at[slot])
                of_q = zero, k_sm, q_sm.at[slot].transpose((1, 0))
                of_g = zero, v_sm, g_sm.at[slot].transpose((1, 0))
                if "k" in want:
                    scores, of_weights = products(of_q, of_g, staging=staging)
                else:
                    (scores,) = products(of_q, staging=staging)
                scores, slope = bent(scores, rule)
                lse = plgpu.load(memory["lse"].at[slot], layout=BY_COLUMN)
                weights = jnp.exp2(scores * rule.factor - broadcast(lse, shape, 1))

                def hide(weights: Array) -> Array:
                    ids = (memory["query_ids"].at[slot], memory["ids"].at[wg]) if packed else None
                    return where_seen(weights, 0.0, rule, (block * C, start), ids, query_axis=1)

                masked = (block >= clear) | (block * C < start + ROWS - 1)
                weights = lax.cond(masked, hide, lambda w: w, weights)
                terms = []
                if "k" in want:
                    inner = plgpu.load(memory["inner"].at[slot], layout=BY_COLUMN)
                    change = weights * (of_weights - broadcast(inner, shape, 1))
                    change = change if slope is None else change * slope
                    terms.append((sums[0], change.astype(q.dtype), q_sm.at[slot]))
                if "v" in want:
                    terms.append((sums[-1], weights.astype(q.dtype), g_sm.at[slot]))
                sums = products(*terms, staging=staging)
                plgpu.barrier_arrive(q_free.at[slot])
                plgpu.barrier_arrive(g_free.at[slot])
                return sums

            sums = [filled(0.0, (ROWS, H), MATRIX) for _ in want]
            sums = lax.fori_loop(0, steps, step, sums)
            for name, sum_, ref, out in zip(want, sums, (k_sm, v_sm), outs_gm, strict=False):
                ref[...] = (sum_ * rule.scale if name == "k" else sum_).astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(ref, out.at[b, here, kv])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            plgpu.set_max_registers(40, action="decrease")

            def load(t: Array, _: None) -> None:
                slot, again = slot_of(t), t >= stages
                n = kv * G + lax.div(t, each)
                queries = pl.ds(block_of(t) * C, C)
                pl.when(again)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                ready = q_ready.at[slot]
                plgpu.copy_gmem_to_smem(q_gm.at[b, queries, n], q_sm.at[slot], ready)
                plgpu.copy_gmem_to_smem(lse_gm.at[b, n, queries], memory["lse"].at[slot], ready)
                if packed:
                    query_ids = memory["query_ids"].at[slot]
                    plgpu.copy_gmem_to_smem(ids_gm[0].at[b, queries], query_ids, ready)
                pl.when(again)(lambda: plgpu.barrier_wait(g_free.at[slot]))
                ready = g_ready.at[slot]
                plgpu.copy_gmem_to_smem(g_gm.at[b, queries, n], g_sm.at[slot], ready)
                plgpu.copy_gmem_to_smem(inner_gm.at[b, n, queries], memory["inner"].at[slot], ready)

            lax.fori_loop(0, steps, load, None)

        pl.when(wg < COMPUTE)(compute)
        pl.when(wg == COMPUTE)(copy)

    memory = {
        "k": shared((COMPUTE, ROWS, H), q.dtype),
        "v": shared((COMPUTE, ROWS, H), q.dtype),
        "q": shared((stages, C, H), q.dtype),
        "g": shared((stages, C, H), q.dtype),
        "lse": plgpu.SMEM((stages, C), jnp.float32),
        "inner": plgpu.SMEM((stages, C), jnp.float32),
        "ready": plgpu.Barrier(num_arrivals=2 + packed, num_barriers=COMPUTE),
        "q_ready": plgpu.Barrier(num_arrivals=2 + packed, num_barriers=stages),
        "g_ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "q_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        "g_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
    }
    if packed:
        memory["ids"] = plgpu.SMEM((COMPUTE, ROWS), jnp.int32)
        memory["query_ids"] = plgpu.SMEM((stages, C), jnp.int32)
    if interpret:
        memory["staging"] = shared((COMPUTE, ROWS, C), q.dtype)
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(k.shape, k.dtype) for _ in want],
        scratch_types=memory,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=(B, tiles, K),
        grid_names=("batch", "tile", "head"),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        kernel_name="_".join(["flash_backward", *want]),
        interpret=interpret,
    )(bounds, q, k, v, g, lse, inner, *([ids] if packed else []))
