"""The matrix product of every quantized format on Hopper: wgmma fed by TMA, scales in between.

y[m, o] = sum over groups t of col[t, m] row[t, o] (sum over i in t of x[m, i] w[o, i]
                                                    - zero[t, o] sums[t, m])
The weight is wgmma's first operand, so outputs lie along its 64 rows and a small batch wastes
nothing: the product comes out transposed and is turned back on its way through shared memory.
Knows layouts and tiles, no formats: those are in `quant_matmul`. PTX ISA 9.7.15 describes wgmma.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from internjax.kernels.gpu.wgmma import (
    COLUMNS,
    MULTIPROCESSORS,
    ROWS,
    across,
    add_products,
    bits,
    down,
    filled,
    swizzled,
)

FEW = (8, 16, 32, 64)  # tokens of a tile when there are few
MOST_SPLITS = 4
SHARED_BYTES = 220 * 1024  # of a block, a little left for barriers and factors


@dataclass(frozen=True)
class Tiles:
    """How the product is cut.

    Fields:
      tokens, outs, depth: of a tile; `outs` of one warpgroup.
      warpgroups: 1 computes and fetches; 2 compute while a third fetches.
      stages: tiles in flight.
      splits: parts of the depth that different blocks add up, in float32.
    """

    tokens: int
    outs: int
    depth: int
    warpgroups: int
    stages: int
    splits: int = 1


@dataclass(frozen=True)
class Scaling:
    """The factors of the formula above; None leaves one out. T is 1 or I / group.

    Fields:
      row, zero: `[E, T, O]`, float32 or float16; col, sums: `[T, M]` float32, but where T is 1 and
        the depth is split, sums of the parts, `[splits, M]`.
    """

    row: Array | None = None
    zero: Array | None = None
    col: Array | None = None
    sums: Array | None = None


def choose_tiles(
    tokens: int,
    outs: int,
    depth: int,
    *,
    bits: tuple[int, int],
    promotes: bool,
    blocks: int = 1,
) -> Tiles:
    """Picks the tiles of a product of so many tokens, outputs and inputs.

    Few tokens: small tiles, and enough splits of the depth that every SM has a block. Many: two
    computing warpgroups, so weights are read once for 128 tokens.

    Args:
      bits: of an element of the tokens and of the weights.
      promotes: sums of many tokens need registers of their own before they are scaled and added.
      blocks: of so many tokens each, in one launch.
    """
    step = 64 if min(bits) >= 16 else 128
    if tokens <= FEW[-1] or outs % 128:
        batch = next((n for n in FEW if tokens <= n), FEW[-1])
        splits, steps = 1, depth // step
        launched = blocks * (outs // 64) * -(-tokens // batch)
        while splits < MOST_SPLITS and launched * splits < MULTIPROCESSORS:
            if steps % (2 * splits):
                break
            splits *= 2
        return Tiles(batch, 64, step, 1, 4, splits)
    wide = 64 if promotes or outs % 256 else 128
    stage = step * (128 * bits[0] + 2 * wide * bits[1]) // 8
    return Tiles(128, wide, step, 2, min(4, (SHARED_BYTES - 2 * wide * 128 * 2) // stage))


def group_sums(x: Array, groups: int, tiles: Tiles) -> Array:
    """Returns the sums of tokens that `Scaling` wants beside zeros."""
    parts = groups if groups > 1 else tiles.splits
    return x.astype(jnp.float32).reshape(len(x), parts, -1).sum(axis=-1).T


def scaled_matmul(
    x: Array,
    w: Array,
    scaling: Scaling,
    *,
    owner: Array | None = None,
    used: Array | None = None,
    input_major: bool = False,
    out_dtype,
    tiles: Tiles,
    name: str,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Array:
    """Computes the product at the head of this file, `[M, O]`.

    Args:
      x: `[M, I]`, M a multiple of `tiles.tokens`; in the dtype that wgmma multiplies.
      w: `[E, O, I]`; int4 and int8 become bfloat16 in registers when x is bfloat16. int4 holds
        the formula's w - 8: what has 16 steps from 0 fits, and zeros keep their digits.
      owner: expert of every tile of tokens, `[M / tiles.tokens]`; left out when E is 1.
      used: tiles of tokens that count, the first ones, `[1]`; the others give 0.
      input_major: w is `[E, I, O]`, in 16 bits.
      name: of the kernel, in reports and profiles.
      interpret: runs on a CPU, block by block.
    """
    (M, I), O = x.shape, w.shape[2 if input_major else 1]
    given = dict(x=x, w=w, **vars(scaling), owner=owner, used=used)
    given = {name: value for name, value in given.items() if value is not None}
    factors = [name for name in vars(scaling) if name in given]
    T = scaling.row.shape[1] if scaling.row is not None else 1
    group = I // T if T > 1 else tiles.depth  # inputs whose sum is scaled at one time
    groups = tiles.depth // group
    many, outs, tokens = tiles.warpgroups == 2, tiles.outs, tiles.tokens
    width = outs * tiles.warpgroups
    interpreted = interpret is not None
    in_registers = x.dtype == jnp.bfloat16 and jnp.issubdtype(w.dtype, jnp.integer)
    shift = 8.0 if bits(w) == 4 else 0.0
    # Many tokens: cheaper to scale the weights than the sums, and the tensor cores never wait.
    expand = many and in_registers and T > 1
    # The tensor cores' own sums of fp8 keep about 14 bits (arXiv:2412.19437, 3.3.2): they are added
    # up in float32 after every step.
    promote = (T > 1 and not expand) or x.dtype == jnp.float8_e4m3fn
    piped = ["x", "w", *(factors if T > 1 else [])]
    turned, sum_dtype = (outs, tokens), jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    steps = I // tiles.depth // tiles.splits
    out = jax.ShapeDtypeStruct((M, O), out_dtype)
    if tiles.splits > 1:
        out = jax.ShapeDtypeStruct((tiles.splits, O, M), jnp.float32)  # 32 bits do not turn

    def body(*refs, out_sm, late, staged, barrier):
        gm, out_gm = dict(zip(given, refs[:-1], strict=True)), refs[-1]
        m, o, s = (lax.axis_index(name) for name in "mos")
        wg = lax.axis_index("wg") if many else 0
        own = pl.ds(wg * outs, outs)  # this warpgroup's outputs within the tile
        expert = gm["owner"][m] if "owner" in gm else 0

        def read(ref, layout):
            return plgpu.load(ref, layout=layout).astype(jnp.float32)

        def scaled(part, sm, n, own):
            part = part.astype(jnp.float32)
            if "zero" in sm:
                zero = down(read(sm["zero"].at[n, own], ROWS) - shift, tokens)
                part -= zero * across(read(sm["sums"].at[n], COLUMNS), outs)
            if "row" in sm:
                part *= down(read(sm["row"].at[n, own], ROWS), tokens)
            if "col" in sm:
                part *= across(read(sm["col"].at[n], COLUMNS), outs)
            return part

        def weights(sm, values, n):
            """The weights of a group, as wgmma's first operand."""
            columns = pl.ds(n * group, group)
            if values is None:
                if input_major:
                    return sm["w"].at[columns, own].transpose((1, 0))
                return sm["w"].at[own, columns]
            values = values[:, n * group : (n + 1) * group].astype(x.dtype)
            if expand:
                values = values.astype(jnp.float32)
                if "zero" in sm:
                    values -= down(read(sm["zero"].at[n, own], ROWS) - shift, group)
                values *= down(read(sm["row"].at[n, own], ROWS), group)
                values = values.astype(x.dtype)
            if not interpreted:
                return values
            staged[wg, :, columns] = values  # wgmma is interpreted with shared operands only
            plgpu.commit_smem()
            return staged.at[wg, :, columns]

        def step(_, *args):
            sm, total = dict(zip(piped, args[:-1], strict=True)), args[-1]
            values = sm["w"][own, :] if in_registers else None
            terms = [
                (
                    partial(weights, sm, values, n),
                    sm["x"].at[:, pl.ds(n * group, group)].transpose((1, 0)),
                )
                for n in range(groups)
            ]
            if not promote:
                return add_products(total, terms, interpreted=interpreted)
            for n, term in enumerate(terms):
                part = add_products(zeros(), [term], interpreted=interpreted)
                total += scaled(part, sm, n, own) if T > 1 else part
            return total

        def finish(total):
            if T == 1 and factors:
                for name in factors:
                    part = (pl.ds(s if name == "sums" else 0, 1), pl.ds(m * tokens, tokens))
                    if name in ("row", "zero"):
                        part = (expert, pl.ds(0, 1), pl.ds(o * width + wg * outs, outs))
                    plgpu.copy_gmem_to_smem(gm[name].at[*part], late[name].at[wg], barrier.at[wg])
                plgpu.barrier_wait(barrier.at[wg])
                sm = {name: late[name].at[wg] for name in factors}
                total = scaled(total, sm, 0, pl.ds(0, outs))
            store(total)

        def store(total):
            here, there = pl.ds(m * tokens, tokens), pl.ds(o * width + wg * outs, outs)
            if tiles.splits > 1:
                out_sm[wg] = total.astype(out.dtype)
                target = out_gm.at[s, there, here]
            else:
                out_sm.at[wg].transpose((1, 0))[...] = total.astype(out.dtype)
                target = out_gm.at[here, there]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_sm.at[wg], target)
            plgpu.wait_smem_to_gmem(0)

        def zeros():
            return filled(0, turned, dtype=sum_dtype)

        def compute():
            first = s * steps
            place = {
                "x": ((tokens, tiles.depth), lambda t: (m, first + t)),
                "w": ((width, tiles.depth), lambda t: (o, first + t)),
                "row": ((groups, width), lambda t: (first + t, o)),
                "col": ((groups, tokens), lambda t: (first + t, m)),
            }
            if input_major:
                place["w"] = (tiles.depth, width), lambda t: (first + t, o)
            place |= {"zero": place["row"], "sums": place["col"]}
            columns = outs if input_major else tiles.depth if in_registers else group
            transforms = {"x": swizzled(bits(x), group), "w": swizzled(bits(w), columns)}
            specs = [plgpu.BlockSpec(*place[n], transforms=transforms.get(n, ())) for n in piped]
            sources = [gm[n].at[expert] if n in ("w", "row", "zero") else gm[n] for n in piped]
            pipeline = {"grid": (steps,), "in_specs": specs, "max_concurrent_steps": tiles.stages}
            if many:
                plgpu.emit_pipeline_warp_specialized(
                    step,
                    memory_registers=40,
                    wg_axis="wg",
                    num_compute_wgs=2,
                    compute_context=lambda run: finish(run(zeros())),
                    **pipeline,
                )(*sources)
            else:
                finish(plgpu.emit_pipeline(step, init_carry=zeros(), **pipeline)(*sources))

        if "used" not in gm:
            compute()
            return
        live = m < gm["used"][0]
        pl.when(live)(compute)

        @pl.when(jnp.logical_not(live))
        def _():
            pl.when(wg < tiles.warpgroups)(lambda: store(zeros()))

    ours = tiles.warpgroups
    length = {"row": outs, "zero": outs, "col": tokens, "sums": tokens}
    late = {n: plgpu.SMEM((ours, 1, length[n]), given[n].dtype) for n in factors if T == 1}
    staged = []
    if in_registers and interpreted:
        staged = plgpu.SMEM((ours, outs, tiles.depth), x.dtype, transforms=swizzled(16, group))
    stored = turned if tiles.splits > 1 else turned[::-1]
    total = plgpu.kernel(
        body,
        out_type=out,
        grid=(M // tokens, O // width, tiles.splits),
        grid_names=("m", "o", "s"),
        scratch_types={
            "out_sm": plgpu.SMEM(
                (ours, *stored), out.dtype, transforms=swizzled(bits(out), stored[1])
            ),
            "late": late,
            "staged": staged,
            "barrier": plgpu.Barrier(num_arrivals=max(1, len(late)), num_barriers=ours),
        },
        kernel_name=f"{name}_{'many' if many else 'few'}",
        interpret=interpret,
        **({"num_threads": 3, "thread_name": "wg"} if many else {}),
    )(*given.values())
    return total.sum(axis=0).T.astype(out_dtype) if tiles.splits > 1 else total
