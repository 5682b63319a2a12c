"""Flash attention for Hopper GPUs in Pallas Mosaic GPU: causal, packed rows, window, soft cap.

Softmax goes online over blocks of keys (arXiv:2205.14135). Two warpgroups compute and hand the
tensor cores to each other, so that one exponentiates while the other multiplies; a third one copies
by TMA (arXiv:2407.08608). `kernels/attention.py` has the reference and the public function.
Letters beside the usual: G query heads a KV head, S segment sets (B, or 1 where all rows are one).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

ROWS = 64  # of a matrix product of one warpgroup (PTX ISA, wgmma)
COMPUTE = 2  # warpgroups that compute; one more copies
TILE = COMPUTE * ROWS  # queries of a thread block
# Of a thread, exchanged at the start: before, each has 65536 / 384, rounded down to eights: 168. If
# two of one and one of the other were more than three times that, they would wait for ever.
REGISTERS = {"compute": 240, "copy": 24}
# Score of what is not seen, and the largest score of a query that has seen nothing yet. The second
# is far above the first and below every score, so that weights of unseen keys are 0. Were they the
# same, exp2(NEG f - NEG f) would be infinite where the compiler fuses multiply and add.
NEG, LEAST = -1e30, -1e20
LOG2E = math.log2(math.e)
HEAD_SIZES = (64, 80, 96, 128, 256)
MATRIX, BY_ROW, BY_COLUMN = (
    plgpu.Layout.WGMMA,
    plgpu.Layout.WGMMA.reduce(1),
    plgpu.Layout.WGMMA.reduce(0),
)


@dataclass(frozen=True)
class Blocks:
    """Keys (or queries) of a step, and how many steps have theirs in shared memory at one time."""

    size: int
    stages: int


FORWARD = {
    64: Blocks(128, 4),
    80: Blocks(128, 3),
    96: Blocks(128, 3),
    128: Blocks(128, 2),
    256: Blocks(64, 2),
}


@dataclass(frozen=True)
class Rule:
    """How scores are made and seen.

    Fields:
      scale: scores are scale q k; soft_cap: c tanh(score / c) is taken of them (arXiv:2408.00118).
      window: keys that a query sees, itself among them; None sees all before.
    """

    scale: float
    soft_cap: float | None = None
    window: int | None = None

    @property
    def factor(self) -> float:
        """What makes exponents of two of the scores that `bent` returns."""
        return LOG2E * (self.soft_cap or self.scale)


def shared(shape: tuple[int, ...], dtype: Any, *, rows: int = ROWS) -> Any:
    """Shared memory in the tiles that TMA writes and wgmma reads.

    Args:
      rows: of a matrix in it; a tile is not wider, for then wgmma would not take its transpose.
    """
    bits = jnp.finfo(dtype).bits
    swizzle = min(plgpu.find_swizzle(shape[-1] * bits), plgpu.find_swizzle(rows * bits))
    tiles = plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=tiles)


def launch(
    name: str,
    body: Callable,
    out_type: Any,
    memory: dict[str, Any],
    grid: tuple[int, int, int],
    columns: int,
    interpret: Any,
) -> Callable:
    """Returns the kernel, to be called with its inputs.

    Args:
      memory: shared memory and barriers by name; body gets them as keywords.
      grid: batch, tiles, heads; heads change fastest, so that neighbours read the same keys.
      columns: of the widest matrix that is multiplied from registers.
    """
    if interpret:
        memory = memory | {"staging": shared((COMPUTE, ROWS, columns), jnp.bfloat16)}
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=memory,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        grid=grid,
        grid_names=("batch", "tile", "head"),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        kernel_name=name,
        interpret=interpret,
    )


def by_role(wg: Array, compute: Callable[[], None], copy: Callable[[], None]) -> None:
    """Runs `compute` in the first warpgroups and `copy` in the last, which gives up registers."""

    @pl.when(wg < COMPUTE)
    def _():
        plgpu.set_max_registers(REGISTERS["compute"], action="increase")
        compute()

    @pl.when(wg == COMPUTE)
    def _():
        plgpu.set_max_registers(REGISTERS["copy"], action="decrease")
        copy()


def broadcast(x: Array, shape: tuple[int, int], axis: int = 0) -> Array:
    """Repeats a vector along the other axis of a matrix."""
    return lax.broadcast_in_dim(x, shape, (axis,))


def filled(value: float, shape: tuple[int, ...], layout: Any) -> Array:
    """A constant in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def bent(products: Array, rule: Rule) -> tuple[Array, Array | float]:
    """Returns scores, to be multiplied with `rule.factor`, and the derivative of the soft cap."""
    if rule.soft_cap is None:
        return products, 1.0
    scores = jnp.tanh(products * (rule.scale / rule.soft_cap))
    return scores, 1 - scores * scores


def products(
    *terms: tuple[Array, Any, Any], staging: Any | None, after: Callable[[], None] | None = None
) -> list[Array]:
    """Returns start + a @ b of each term (start, a, b), all under way at one time.

    Args:
      terms: `a` lies in registers or in shared memory, `b` in shared memory.
      staging: shared memory that the `a` of registers fit in, for an interpreter: it knows no
        product with an operand in registers and none that starts from a value. None compiles both.
      after: called once all products are under way.
    """
    after = after or (lambda: None)
    if staging is None:

        def run(refs: Any) -> None:
            for ref, (_, a, b) in zip(refs, terms, strict=True):
                plgpu.wgmma(ref, a, b)
            after()

        return pl.run_state(run)([plgpu.ACC.init(start) for start, _, _ in terms])
    sums = []
    for start, a, b in terms:
        if isinstance(a, jax.Array):
            staging[...] = a
            plgpu.commit_smem()
            a = staging
        sums.append(start + pl.run_scoped(partial(_product, a, b), plgpu.ACC(start.shape)))
    after()
    return sums


def _product(a: Any, b: Any, acc: Any) -> Array:
    plgpu.wgmma(acc, a, b)
    return acc[...]


def where_seen(
    x: Array,
    other: float,
    rule: Rule,
    first: tuple[Any, Any],
    ids: tuple[Any, Any] | None,
    *,
    query_axis: int = 0,
) -> Array:
    """Puts `other` where a query of a block does not see a key.

    Args:
      first: of the block, the first query and the first key.
      ids: shared memory with the segments of its queries and of its keys, where rows are packed.
      query_axis: of `x`; the keys stand along the other one.
    """
    axes = query_axis, 1 - query_axis
    iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, x.shape, axis, layout=MATRIX)  # noqa: E731
    query, key = (iota(axis) + start for axis, start in zip(axes, first, strict=True))
    seen = query >= key
    if rule.window is not None:
        seen = seen & (query - key < rule.window)
    if ids is not None:
        along = BY_ROW, BY_COLUMN
        of_query, of_key = (
            broadcast(plgpu.load(ref, layout=along[axis]), x.shape, axis)
            for axis, ref in zip(axes, ids, strict=True)
        )
        seen = seen & (of_query == of_key)
    return jnp.where(seen, x, other)


def sights(
    T: int, rule: Rule, ids: Int[Array, "B T"] | None, query_block: int, key_block: int
) -> tuple[Bool[Array, "S i j"], Bool[Array, "S i j"], Bool[Array, "i j"]]:
    """Says of each block of queries and block of keys what follows from their first and last.

    Returns whether a query of the one may see a key of the other; whether, but for the diagonal,
    all see all; and whether the order of the tokens allows any to see any.
    """
    lowest = lambda size: jnp.arange(0, T, size)  # noqa: E731
    queries, keys = lowest(query_block)[:, None], lowest(key_block)[None, :]
    ordered = queries + query_block > keys
    may = ordered[None]
    sure = jnp.ones_like(may)
    if rule.window is not None:
        may = may & (queries - (keys + key_block - 1) < rule.window)[None]
        sure = sure & (queries + query_block - 1 - keys < rule.window)[None]
    if ids is not None:
        cut = lambda size: ids.reshape(len(ids), -1, size)  # noqa: E731
        q, k = cut(query_block)[:, :, None], cut(key_block)[:, None]
        low_q, low_k, high_q, high_k = q.min(-1), k.min(-1), q.max(-1), k.max(-1)
        may = may & (low_q <= high_k) & (low_k <= high_q)
        sure = sure & (low_q == high_k) & (low_k == high_q) & (low_q == high_q)
    return may, sure, ordered


def key_bounds(
    T: int, rule: Rule, ids: Int[Array, "B T"] | None, key_block: int
) -> Int[Array, "S 2 t"]:
    """Returns of each tile of queries the first block of keys that any of it may see, and the block
    from which on, up to the diagonal, all of it sees all."""
    may, sure, ordered = sights(T, rule, ids, TILE, key_block)
    after = jnp.arange(1, T // key_block + 1)[None, None]
    first = jnp.argmax(may, axis=2)
    clear = jnp.where(ordered[None] & ~sure, after, 0).max(axis=2)
    return jnp.stack([first, clear], axis=1).astype(jnp.int32)


def query_bounds(
    T: int, rule: Rule, ids: Int[Array, "B T"] | None, query_block: int
) -> Int[Array, "S 2 t"]:
    """Returns of each tile of keys the block of queries after the last that may see any of it, and
    the one before which, from the diagonal on, all see all of it."""
    may, sure, ordered = sights(T, rule, ids, query_block, TILE)
    block = jnp.arange(T // query_block)[None, :, None]
    end = jnp.where(may, block + 1, 0).max(axis=1)
    clear = jnp.where(ordered[None] & ~sure, block, T).min(axis=1)
    return jnp.stack([end, clear], axis=1).astype(jnp.int32)


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    ids: Int[Array, "B T"] | None,
    rule: Rule,
    interpret: Any = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns the attention and the natural logarithm of its normaliser; T is a multiple of TILE.

    Args:
      ids: segments of packed rows.
    """
    B, T, N, H = q.shape
    G, blocks, tiles = N // k.shape[2], FORWARD[H], T // TILE
    C, stages = blocks.size, blocks.stages
    packed = ids is not None
    bounds = key_bounds(T, rule, ids, C)

    def body(bounds_gm, q_gm, k_gm, v_gm, *rest, **memory):
        *ids_gm, o_gm, lse_gm = rest
        b, n, wg = (lax.axis_index(name) for name in ("batch", "head", "wg"))
        tile = tiles - 1 - lax.axis_index("tile")  # the longest first
        kv = lax.div(n, jnp.int32(G))
        segment_set = b if bounds.shape[0] > 1 else 0
        first, clear = bounds_gm[segment_set, 0, tile], bounds_gm[segment_set, 1, tile]
        steps = pl.cdiv((tile + 1) * TILE, jnp.int32(C)) - first
        k_sm, v_sm = memory["k"], memory["v"]
        k_ready, v_ready = memory["k_ready"], memory["v_ready"]
        k_free, v_free, turn = memory["k_free"], memory["v_free"], memory["turn"]
        slot_of = lambda t: lax.rem(t, jnp.int32(stages))  # noqa: E731

        def compute():
            q_sm, lse_sm, q_ready = (memory[x].at[wg] for x in ("q", "lse", "q_ready"))
            staging = memory["staging"].at[wg] if interpret else None
            start = tile * TILE + wg * ROWS
            here = pl.ds(start, ROWS)
            plgpu.copy_gmem_to_smem(q_gm.at[b, here, n], q_sm, q_ready)
            if packed:
                plgpu.copy_gmem_to_smem(ids_gm[0].at[b, here], memory["ids"].at[wg], q_ready)
            plgpu.barrier_wait(q_ready)
            full = (start + 1) // C  # blocks before it are before every query

            def pass_turn():
                plgpu.barrier_arrive(turn.at[1 - wg])

            def next_scores(t: Array, *terms: tuple) -> list[Array]:
                """Multiplies what is given, and q with the keys of step t, in this one's turn."""
                slot = slot_of(t)
                plgpu.barrier_wait(k_ready.at[slot])
                plgpu.barrier_wait(turn.at[wg])
                zero = filled(0.0, (ROWS, C), MATRIX)
                keys = k_sm.at[slot].transpose((1, 0))
                done = products((zero, q_sm, keys), *terms, staging=staging, after=pass_turn)
                plgpu.barrier_arrive(k_free.at[slot])
                return done

            def soften(t: Array, top: Array, total: Array, acc: Array, scores: Array) -> tuple:
                """Adds the scores of step t to the softmax; returns its weights, too."""
                slot, block = slot_of(t), first + t
                scores, _ = bent(scores, rule)
                plgpu.barrier_wait(v_ready.at[slot])  # segments of keys come with the values

                def hide(scores: Array) -> Array:
                    ids = (memory["ids"].at[wg], memory["key_ids"].at[slot]) if packed else None
                    return where_seen(scores, NEG, rule, (start, block * C), ids)

                scores = lax.cond((block < clear) | (block >= full), hide, lambda s: s, scores)
                higher = jnp.maximum(top, scores.max(axis=1) * rule.factor)
                weights = jnp.exp2(scores * rule.factor - broadcast(higher, scores.shape))
                shrink = jnp.exp2(top - higher)
                total = total * shrink + weights.sum(axis=1)
                return higher, total, acc * broadcast(shrink, acc.shape), weights.astype(q.dtype)

            def step(t, carry):
                top, total, acc, scores = carry
                top, total, acc, weights = soften(t - 1, *carry)
                slot = slot_of(t - 1)
                scores, acc = next_scores(t, (acc, weights, v_sm.at[slot]))
                plgpu.barrier_arrive(v_free.at[slot])
                return top, total, acc, scores

            pl.when(wg == 1)(pass_turn)  # the other one begins
            (scores,) = next_scores(jnp.int32(0))
            nothing = filled(LEAST, (ROWS,), BY_ROW), filled(0.0, (ROWS,), BY_ROW)
            carry = (*nothing, filled(0.0, (ROWS, H), MATRIX), scores)
            carry = lax.fori_loop(1, steps, step, carry)
            top, total, acc, weights = soften(steps - 1, *carry)
            plgpu.barrier_wait(turn.at[wg])
            last = (acc, weights, v_sm.at[slot_of(steps - 1)])
            (acc,) = products(last, staging=staging)
            pl.when(wg == 0)(pass_turn)
            q_sm[...] = (acc / broadcast(total, acc.shape)).astype(q.dtype)
            lse_sm[...] = top * (1 / LOG2E) + jnp.log(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_sm, o_gm.at[b, here, n])
            plgpu.copy_smem_to_gmem(lse_sm, lse_gm.at[b, n, here])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            def load(t: Array, _: None) -> None:
                slot, again = slot_of(t), t >= stages
                keys = pl.ds((first + t) * C, C)
                pl.when(again)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                plgpu.copy_gmem_to_smem(k_gm.at[b, keys, kv], k_sm.at[slot], k_ready.at[slot])
                pl.when(again)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                plgpu.copy_gmem_to_smem(v_gm.at[b, keys, kv], v_sm.at[slot], v_ready.at[slot])
                if packed:
                    ids_of = memory["key_ids"].at[slot]
                    plgpu.copy_gmem_to_smem(ids_gm[0].at[b, keys], ids_of, v_ready.at[slot])

            lax.fori_loop(0, steps, load, None)

        by_role(wg, compute, copy)

    pieces = 1 + packed  # copies that a barrier waits for
    memory = {
        "q": shared((COMPUTE, ROWS, H), q.dtype),
        "k": shared((stages, C, H), q.dtype),
        "v": shared((stages, C, H), q.dtype),
        "lse": plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_arrivals=pieces, num_barriers=COMPUTE),
        "k_ready": plgpu.Barrier(num_barriers=stages),
        "v_ready": plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        "turn": plgpu.Barrier(num_barriers=COMPUTE),
    }
    if packed:
        memory["ids"] = plgpu.SMEM((COMPUTE, ROWS), jnp.int32)
        memory["key_ids"] = plgpu.SMEM((stages, C), jnp.int32)
    out_type = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    )
    run = launch("flash_forward", body, out_type, memory, (B, tiles, N), C, interpret)
    return run(bounds, q, k, v, *([ids] if packed else []))
