"""Gradients of the flash attention of `flash.py`: one kernel for queries, one for keys.

Scores are made again from the normaliser (arXiv:2205.14135). Each kernel adds up what it alone
writes, so gradients are the same in every run; the price is that two of seven matrix products are
made twice. Two warpgroups compute and a third one copies, as in the forward kernel.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from internjax.kernels.gpu.flash import (
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
    by_role,
    filled,
    key_bounds,
    launch,
    products,
    query_bounds,
    shared,
    where_seen,
)

FOR_QUERIES = {64: Blocks(64, 4), 80: Blocks(64, 4), 96: Blocks(64, 4), 128: Blocks(64, 3)}
FOR_KEYS = {64: Blocks(64, 4), 80: Blocks(64, 3), 96: Blocks(64, 3), 128: Blocks(64, 2)}
# 256: the gradients of keys and of values together are more than the registers of a thread.
FOR_QUERIES[256] = FOR_KEYS[256] = APART = Blocks(32, 2)


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
    args = (q, k, v, ids, g, lse * LOG2E, -inner, rule, interpret)
    if FOR_KEYS[q.shape[-1]] is APART:
        (g_k,), (g_v,) = of_keys(*args, want=("k",)), of_keys(*args, want=("v",))
    else:
        g_k, g_v = of_keys(*args)
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
    interpret: Any = None,
) -> Float[Array, "B T N H"]:
    """Returns the gradient of q.

    Args:
      lse: log2 of the normaliser; inner: minus g times the output, summed over H: what the sums
        of g v start from, since it is subtracted from them.
    """
    B, T, N, H = q.shape
    G, blocks, tiles = N // k.shape[2], FOR_QUERIES[H], T // TILE
    C, stages, packed = blocks.size, blocks.stages, ids is not None
    bounds = key_bounds(T, rule, ids, C)

    def body(bounds_gm, q_gm, k_gm, v_gm, g_gm, lse_gm, inner_gm, *rest, **memory):
        *ids_gm, out_gm = rest
        b, n, wg = (lax.axis_index(name) for name in ("batch", "head", "wg"))
        tile = tiles - 1 - lax.axis_index("tile")  # the longest first
        first = bounds_gm[b if bounds.shape[0] > 1 else 0, 0, tile]
        steps = pl.cdiv((tile + 1) * TILE, jnp.int32(C)) - first
        k_sm, v_sm, ready, free = (memory[x] for x in ("k", "v", "ready", "free"))
        slot_of = lambda t: lax.rem(t, jnp.int32(stages))  # noqa: E731

        def compute():
            names = "q", "g", "lse", "inner", "queries_ready"
            q_sm, g_sm, lse_sm, inner_sm, queries_ready = (memory[x].at[wg] for x in names)
            staging = memory["staging"].at[wg] if interpret else None
            start = tile * TILE + wg * ROWS
            here = pl.ds(start, ROWS)
            plgpu.copy_gmem_to_smem(q_gm.at[b, here, n], q_sm, queries_ready)
            plgpu.copy_gmem_to_smem(g_gm.at[b, here, n], g_sm, queries_ready)
            plgpu.copy_gmem_to_smem(lse_gm.at[b, n, here], lse_sm, queries_ready)
            plgpu.copy_gmem_to_smem(inner_gm.at[b, n, here], inner_sm, queries_ready)
            if packed:
                ids_sm = memory["ids"].at[wg]
                plgpu.copy_gmem_to_smem(ids_gm[0].at[b, here], ids_sm, queries_ready)
            plgpu.barrier_wait(queries_ready)
            zero = filled(0.0, (ROWS, C), MATRIX)

            def step(t: Array, acc: Array) -> Array:
                slot = slot_of(t)
                plgpu.barrier_wait(ready.at[slot])
                of_q = zero, q_sm, k_sm.at[slot].transpose((1, 0))
                minus_inner = along_queries(inner_sm, (ROWS, C), query_axis=0)
                of_g = minus_inner, g_sm, v_sm.at[slot].transpose((1, 0))
                scores, of_weights = products(of_q, of_g, staging=staging)
                ids = (ids_sm, memory["key_ids"].at[slot]) if packed else None
                hide = lambda w: where_seen(w, 0.0, rule, (start, (first + t) * C), ids)  # noqa: E731
                weights, slope = weights_of(scores, lse_sm, rule, query_axis=0)
                change = hide(weights) * of_weights * slope
                (acc,) = products((acc, change.astype(q.dtype), k_sm.at[slot]), staging=staging)
                plgpu.barrier_arrive(free.at[slot])
                return acc

            acc = lax.fori_loop(0, steps, step, filled(0.0, (ROWS, H), MATRIX))
            q_sm[...] = (acc * rule.scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_sm, out_gm.at[b, here, n])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            kv = lax.div(n, jnp.int32(G))

            def load(t: Array, _: None) -> None:
                slot, keys = slot_of(t), pl.ds((first + t) * C, C)
                pl.when(t >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                plgpu.copy_gmem_to_smem(k_gm.at[b, keys, kv], k_sm.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(v_gm.at[b, keys, kv], v_sm.at[slot], ready.at[slot])
                if packed:
                    key_ids = memory["key_ids"].at[slot]
                    plgpu.copy_gmem_to_smem(ids_gm[0].at[b, keys], key_ids, ready.at[slot])

            lax.fori_loop(0, steps, load, None)

        by_role(wg, compute, copy)

    memory = {
        "q": shared((COMPUTE, ROWS, H), q.dtype, rows=C),
        "g": shared((COMPUTE, ROWS, H), q.dtype, rows=C),
        "k": shared((stages, C, H), q.dtype, rows=C),
        "v": shared((stages, C, H), q.dtype, rows=C),
        "lse": plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
        "inner": plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
        "queries_ready": plgpu.Barrier(num_arrivals=4 + packed, num_barriers=COMPUTE),
        "ready": plgpu.Barrier(num_arrivals=2 + packed, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
    }
    if packed:
        memory["ids"] = plgpu.SMEM((COMPUTE, ROWS), jnp.int32)
        memory["key_ids"] = plgpu.SMEM((stages, C), jnp.int32)
    out_type = jax.ShapeDtypeStruct(q.shape, q.dtype)
    run = launch("flash_backward_q", body, out_type, memory, (B, tiles, N), C, interpret)
    return run(bounds, q, k, v, g, lse, inner, *([ids] if packed else []))


def of_keys(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    ids: Int[Array, "B T"] | None,
    g: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    inner: Float[Array, "B N T"],
    rule: Rule,
    interpret: Any = None,
    *,
    want: tuple[str, ...] = ("k", "v"),
) -> list[Float[Array, "B T K H"]]:
    """Returns the gradients of k and v, or of one of them; arguments as in `of_queries`.

    Rows of its matrices are keys, columns are queries: those of all heads that read the keys.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    G, blocks, tiles = N // K, FOR_KEYS[H], T // TILE
    C, stages, packed = blocks.size, blocks.stages, ids is not None
    bounds = query_bounds(T, rule, ids, C)

    def body(bounds_gm, q_gm, k_gm, v_gm, g_gm, lse_gm, inner_gm, *rest, **memory):
        ids_gm, outs_gm = rest[:packed], rest[packed:]
        b, kv, tile, wg = (lax.axis_index(name) for name in ("batch", "head", "tile", "wg"))
        end = bounds_gm[b if bounds.shape[0] > 1 else 0, 0, tile]
        first = tile * (TILE // C)
        each = end - first  # steps of a head
        q_sm, g_sm, ready, free = (memory[x] for x in ("q", "g", "ready", "free"))
        slot_of = lambda t: lax.rem(t, jnp.int32(stages))  # noqa: E731

        def each_step(run: Callable, carry: Any) -> Any:
            """Runs `carry = run(t, head, first query, carry)` over all heads and their queries."""

            def of_head(i: Array, carry: Any) -> Any:
                def of_block(j: Array, carry: Any) -> Any:
                    return run(i * each + j, kv * G + i, (first + j) * C, carry)

                return lax.fori_loop(0, each, of_block, carry)

            return lax.fori_loop(0, G, of_head, carry)

        def compute():
            k_sm, v_sm, keys_ready = (memory[x].at[wg] for x in ("k", "v", "keys_ready"))
            staging = memory["staging"].at[wg] if interpret else None
            start = tile * TILE + wg * ROWS
            here = pl.ds(start, ROWS)
            plgpu.copy_gmem_to_smem(k_gm.at[b, here, kv], k_sm, keys_ready)
            plgpu.copy_gmem_to_smem(v_gm.at[b, here, kv], v_sm, keys_ready)
            if packed:
                ids_sm = memory["ids"].at[wg]
                plgpu.copy_gmem_to_smem(ids_gm[0].at[b, here], ids_sm, keys_ready)
            plgpu.barrier_wait(keys_ready)
            zero = filled(0.0, (ROWS, C), MATRIX)

            def step(t: Array, n: Array, query: Array, sums: list[Array]) -> list[Array]:
                slot = slot_of(t)
                plgpu.barrier_wait(ready.at[slot])
                lse_sm, inner_sm = memory["lse"].at[slot], memory["inner"].at[slot]
                of_q = zero, k_sm, q_sm.at[slot].transpose((1, 0))
                # Read so early because ptxas finds registers for all of it then.
                minus_inner = along_queries(inner_sm, (ROWS, C), query_axis=1)
                (scores,) = products(of_q, staging=staging)
                weights, slope = weights_of(scores, lse_sm, rule, query_axis=1)
                ids = (memory["query_ids"].at[slot], ids_sm) if packed else None
                weights = where_seen(weights, 0.0, rule, (query, start), ids, query_axis=1)
                # One thing after the other: more at one time would not fit into the registers.
                sums, terms = dict(zip(want, sums, strict=True)), {}
                if "v" in want:
                    terms["v"] = sums["v"], weights.astype(q.dtype), g_sm.at[slot]
                if "k" in want:
                    terms["weights"] = minus_inner, v_sm, g_sm.at[slot].transpose((1, 0))
                done = dict(zip(terms, products(*terms.values(), staging=staging), strict=True))
                if "k" in want:
                    change = (weights * done["weights"] * slope).astype(q.dtype)
                    (done["k"],) = products((sums["k"], change, q_sm.at[slot]), staging=staging)
                sums = [done[name] for name in want]
                plgpu.barrier_arrive(free.at[slot])
                return sums

            sums = [filled(0.0, (ROWS, H), MATRIX) for _ in want]
            sums = each_step(step, sums)
            for name, total, out_gm in zip(want, sums, outs_gm, strict=True):
                out_sm = {"k": k_sm, "v": v_sm}[name]
                out_sm[...] = (total * rule.scale if name == "k" else total).astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_sm, out_gm.at[b, here, kv])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            def load(t: Array, n: Array, query: Array, _: None) -> None:
                slot, queries = slot_of(t), pl.ds(query, C)
                here = ready.at[slot]
                lse_sm, inner_sm = memory["lse"].at[slot], memory["inner"].at[slot]
                pl.when(t >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                plgpu.copy_gmem_to_smem(q_gm.at[b, queries, n], q_sm.at[slot], here)
                plgpu.copy_gmem_to_smem(g_gm.at[b, queries, n], g_sm.at[slot], here)
                plgpu.copy_gmem_to_smem(lse_gm.at[b, n, queries], lse_sm, here)
                plgpu.copy_gmem_to_smem(inner_gm.at[b, n, queries], inner_sm, here)
                if packed:
                    query_ids = memory["query_ids"].at[slot]
                    plgpu.copy_gmem_to_smem(ids_gm[0].at[b, queries], query_ids, here)

            each_step(load, None)

        by_role(wg, compute, copy)

    memory = {
        "k": shared((COMPUTE, ROWS, H), q.dtype, rows=C),
        "v": shared((COMPUTE, ROWS, H), q.dtype, rows=C),
        "q": shared((stages, C, H), q.dtype, rows=C),
        "g": shared((stages, C, H), q.dtype, rows=C),
        "lse": plgpu.SMEM((stages, C), jnp.float32),
        "inner": plgpu.SMEM((stages, C), jnp.float32),
        "keys_ready": plgpu.Barrier(num_arrivals=2 + packed, num_barriers=COMPUTE),
        "ready": plgpu.Barrier(num_arrivals=4 + packed, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
    }
    if packed:
        memory["ids"] = plgpu.SMEM((COMPUTE, ROWS), jnp.int32)
        memory["query_ids"] = plgpu.SMEM((stages, C), jnp.int32)
    out_type = [jax.ShapeDtypeStruct(k.shape, k.dtype) for _ in want]
    name = "_".join(["flash_backward", *want])
    run = launch(name, body, out_type, memory, (B, tiles, K), C, interpret)
    return run(bounds, q, k, v, g, lse, inner, *([ids] if packed else []))


def weights_of(
    scores: Array, lse: Any, rule: Rule, *, query_axis: int
) -> tuple[Array, Array | float]:
    """Returns the weights of a block of products q k, and the derivative of the soft cap.

    Args:
      lse: shared memory with log2 of the normaliser of each query.
    """
    scores, slope = bent(scores, rule)
    lse = along_queries(lse, scores.shape, query_axis=query_axis)
    return jnp.exp2(scores * rule.factor - lse), slope


def along_queries(ref: Any, shape: tuple[int, int], *, query_axis: int) -> Array:
    """Repeats a vector of a block's queries along its keys."""
    layout = (BY_ROW, BY_COLUMN)[query_axis]
    return broadcast(plgpu.load(ref, layout=layout), shape, query_axis)
