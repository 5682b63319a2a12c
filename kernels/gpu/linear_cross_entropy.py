"""Cross-entropy of a linear head on Hopper GPUs: logits exist in registers only.

Forward: every tile of logits leaves its maximum, its sum of exponents, the target's logit and the
sum, and these are put together afterwards. Backward: the same tiles again, as gradients of the
logits, for a chunk of the vocabulary at a time; two plain products with each chunk give those of
the states and of the head (as arXiv:2410.10989, section 3.2, does by chunks of tokens).
`kernels/cross_entropy.py` has the meaning. Letters beside the usual: M tokens, D width of a state.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from internjax.kernels.cross_entropy import chunked_cross_entropy
from internjax.kernels.gpu.wgmma import MATRIX, ROWS, add_products, down, filled, swizzled
from internjax.kernels.platform import choose, not_for_hopper

TOKENS, DEPTH = 128, 64  # of a tile; each of two warpgroups has half of the tokens
HALF = TOKENS // 2
PART = 64  # logits of a tile's width that are finished at one time
STAGES = 3


def linear_cross_entropy(
    x: Float[Array, "*B D"],
    w: Float[Array, "D V"],
    targets: Int[Array, "*B"],
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 8192,
    implementation: str | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "*B"], Float[Array, "*B"], Float[Array, "*B"]]:
    """Returns what `chunked_cross_entropy` does of the logits x w, in float32; differentiable.

    Args:
      chunk: logits of a token whose gradients exist at one time, at most.
      implementation: None, "xla" or "pallas".
      interpret: `plgpu.InterpretGPUParams`, to run the Hopper kernels on a CPU.
    """
    D, V = w.shape
    if x.shape[-1] != D or targets.shape != x.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: states {x.shape}, head {w.shape}, targets {targets.shape};"
            " legal are [..., D], [D, V] and [...]."
        )
    served = {"xla": None, "pallas": _why_not(x, w) or not_for_hopper(interpret)}
    best = "xla" if served["pallas"] else "pallas"
    chosen = choose("linear_cross_entropy", implementation, served, best=best)
    lead, flat, aims = x.shape[:-1], x.reshape(-1, D), targets.reshape(-1)
    if chosen == "xla" or not len(flat):
        found = reference(flat, w, aims, smoothing, z_loss)
    else:
        width = chunk_width(V, chunk)
        pad = -len(flat) % TOKENS
        padded, goals = jnp.pad(flat, ((0, pad), (0, 0))), jnp.pad(aims.astype(jnp.int32), (0, pad))
        found = _losses(padded, w, goals, smoothing, z_loss, width, interpret)
        found = tuple(y[: len(flat)] for y in found)
    return tuple(y.reshape(lead) for y in found)


def _why_not(x: Array, w: Array) -> str | None:
    """Says what the Hopper kernels do not serve in these arrays, or None."""
    D, V = w.shape
    if x.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
        return f"states of {x.dtype} and a head of {w.dtype}; legal is bfloat16."
    if D % DEPTH or V % 128:
        return f"states of {D} and {V} logits; legal are multiples of {DEPTH} and of 128."
    return None


def reference(
    x: Float[Array, "M D"],
    w: Float[Array, "D V"],
    targets: Int[Array, " M"],
    smoothing: float,
    z_loss: float,
) -> tuple[Array, Array, Array]:
    """The same in plain jnp: by chunks of tokens."""

    def unembed(x: Array) -> Array:
        return jnp.matmul(x, w, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))

    given = unembed, x[None], targets[None]
    found = chunked_cross_entropy(*given, smoothing=smoothing, z_loss=z_loss)
    return tuple(y[0] for y in found)


def tile_width(V: int) -> int:
    """Logits of a tile."""
    return 256 if V % 256 == 0 else 128


def chunk_width(V: int, most: int) -> int:
    """The largest part of the vocabulary, in whole tiles, that is at most `most` and divides it."""
    tile = tile_width(V)
    tiles = V // tile
    fits = max(1, most // tile)
    return tile * max(n for n in range(1, fits + 1) if tiles % n == 0)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _losses(x, w, targets, smoothing: float, z_loss: float, width: int, interpret: Any):
    return _forward(x, w, targets, smoothing, z_loss, width, interpret)[0]


def _forward(x, w, targets, smoothing: float, z_loss: float, width: int, interpret: Any):
    del width
    top, exponents, at_target, total = _statistics(x, w, targets, interpret)
    highest = top.max(axis=0)
    normaliser = jnp.log((exponents * jnp.exp(top - highest[None])).sum(axis=0)) + highest
    at_target, mean = at_target.sum(axis=0), total.sum(axis=0) / w.shape[1]
    aim = normaliser - (1 - smoothing) * at_target - smoothing * mean + z_loss * normaliser**2
    right = (at_target >= highest).astype(jnp.float32)
    return (aim, normaliser - at_target, right), (x, w, targets, normaliser)


def _backward(smoothing: float, z_loss: float, width: int, interpret: Any, kept: tuple, g: tuple):
    x, w, targets, normaliser = kept
    g_aim, g_nll, _ = g
    (M, D), V = x.shape, w.shape[1]
    # d logit = of_softmax softmax - of_target [is target] - of_all
    of_softmax = g_aim * (1 + 2 * z_loss * normaliser) + g_nll
    of_target = g_aim * (1 - smoothing) + g_nll
    of_all = g_aim * smoothing / V
    factors = jnp.stack([normaliser, of_softmax, of_target, of_all])

    def step(i: Array, grads: tuple[Array, Array]) -> tuple[Array, Array]:
        g_x, g_w = grads
        g_logits = _gradients(x, w, targets, factors, i, width, interpret)
        part = lax.dynamic_slice_in_dim(w, i * width, width, axis=1)
        g_x += jnp.matmul(g_logits, part.T, preferred_element_type=jnp.float32)
        g_part = jnp.matmul(x.T, g_logits, preferred_element_type=jnp.float32).astype(w.dtype)
        return g_x, lax.dynamic_update_slice_in_dim(g_w, g_part, i * width, axis=1)

    start = jnp.zeros((M, D), jnp.float32), jnp.zeros_like(w)
    g_x, g_w = lax.fori_loop(0, V // width, step, start)
    return g_x.astype(x.dtype), g_w, None


_losses.defvjp(_forward, _backward)


def _statistics(x: Array, w: Array, targets: Array, interpret: Any) -> Array:
    """Returns maximum, sum of exponents, target's logit and sum of every tile, `[4, tiles, M]`."""
    M, V = len(x), w.shape[1]
    tile = tile_width(V)

    def finish(logits: Array, aims: Array, _: Any, out_sm: Any) -> None:
        top, parts = logits.max(axis=1), range(0, tile, PART)
        cut = [logits[:, start : start + PART] for start in parts]
        at = [jnp.where(_is_target(aims, n), part, 0.0) for n, part in zip(parts, cut, strict=True)]
        out_sm[0] = top
        out_sm[1] = sum(jnp.exp(part - down(top, PART)).sum(axis=1) for part in cut)
        out_sm[2] = sum(part.sum(axis=1) for part in at)
        out_sm[3] = logits.sum(axis=1)

    found = _by_tiles(
        (x, w, targets, jnp.zeros(1, jnp.int32)),
        finish,
        name="cross_entropy",
        tiles=V // tile,
        out=jax.ShapeDtypeStruct((V // tile, M // HALF, 4, HALF), jnp.float32),
        place=lambda row, column: (column, row),
        shared=plgpu.SMEM((2, 4, HALF), jnp.float32),
        interpret=interpret,
    )
    return found.transpose(2, 0, 1, 3).reshape(4, V // tile, M)


def _gradients(
    x: Array, w: Array, targets: Array, factors: Array, chunk: Array, width: int, interpret: Any
) -> Array:
    """Returns the gradients of one chunk's logits, `[M, width]`."""
    M, tile = len(x), tile_width(w.shape[1])

    def finish(logits: Array, aims: Array, factors_sm: Any, out_sm: Any) -> None:
        factors = [plgpu.load(factors_sm.at[n], layout=ROWS) for n in range(4)]
        normaliser, of_softmax, of_target, of_all = (down(v, PART) for v in factors)
        for start in range(0, tile, PART):  # a part at a time: fewer registers
            part = logits[:, start : start + PART]
            grads = of_softmax * jnp.exp(part - normaliser) - of_all
            grads -= jnp.where(_is_target(aims, start), of_target, 0.0)
            out_sm[:, pl.ds(start, PART)] = grads.astype(out_sm.dtype)

    return _by_tiles(
        (x, w, targets, (chunk * (width // tile)).astype(jnp.int32).reshape(1), factors),
        finish,
        name="cross_entropy_backward",
        tiles=width // tile,
        out=jax.ShapeDtypeStruct((M, width), x.dtype),
        place=lambda row, column: (pl.ds(row * HALF, HALF), pl.ds(column * tile, tile)),
        shared=plgpu.SMEM((2, HALF, tile), x.dtype, transforms=swizzled(16, tile)),
        interpret=interpret,
    )


def _is_target(aims: Array, start: int) -> Array:
    """Which of `PART` logits from `start` on in a tile are the targets."""
    columns = plgpu.broadcasted_iota(jnp.int32, (HALF, PART), 1, layout=MATRIX)
    return columns + start == down(aims, PART)


def _by_tiles(
    operands: tuple[Array, ...],
    finish: Callable[[Array, Array, Any, Any], None],
    *,
    name: str,
    tiles: int,
    out: jax.ShapeDtypeStruct,
    place: Callable[[Any, Any], tuple],
    shared: Any,
    interpret: Any,
) -> Array:
    """Makes tiles of logits, 64 tokens of a warpgroup each, and hands them to `finish`.

    Args:
      operands: states, head, targets, the first tile of the head `[1]`, maybe factors `[4, M]`.
      finish: of logits, the targets' columns in the tile, shared factors; writes what leaves to
        shared memory.
      tiles: of the head, from the first one on.
      place: row of 64 tokens, tile -> where in `out` it goes.
    """
    x, w, *_ = operands
    (M, D), tile = x.shape, tile_width(w.shape[1])

    def body(x_gm, w_gm, targets_gm, first_gm, *refs, out_sm, targets_sm, factors_sm, barrier):
        out_gm = refs[-1]
        v, m, wg = (lax.axis_index(axis) for axis in ("v", "m", "wg"))
        first, row = first_gm[0], 2 * m + wg
        own = pl.ds(wg * HALF, HALF)

        def step(_, x_sm, w_sm, logits):
            return add_products(
                logits, [(lambda: x_sm.at[own], w_sm)], interpreted=interpret is not None
            )

        def context(run):
            tokens = pl.ds(row * HALF, HALF)
            plgpu.copy_gmem_to_smem(targets_gm.at[tokens], targets_sm.at[wg], barrier.at[wg])
            if factors_sm is not None:
                plgpu.copy_gmem_to_smem(refs[0].at[:, tokens], factors_sm.at[wg], barrier.at[wg])
            plgpu.barrier_wait(barrier.at[wg])
            logits = run(filled(0.0, (HALF, tile)))
            aims = plgpu.load(targets_sm.at[wg], layout=ROWS) - (first + v) * tile
            factors = None if factors_sm is None else factors_sm.at[wg]
            finish(logits, aims, factors, out_sm.at[wg])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_sm.at[wg], out_gm.at[*place(row, v)])
            plgpu.wait_smem_to_gmem(0)

        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(D // DEPTH,),
            in_specs=[
                plgpu.BlockSpec((TOKENS, DEPTH), lambda t: (m, t), transforms=swizzled(16, DEPTH)),
                plgpu.BlockSpec(
                    (DEPTH, tile), lambda t: (t, first + v), transforms=swizzled(16, tile)
                ),
            ],
            max_concurrent_steps=STAGES,
            memory_registers=40,
            wg_axis="wg",
            num_compute_wgs=2,
            compute_context=context,
        )(x_gm, w_gm)

    more = len(operands) == 5
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(tiles, M // TOKENS),  # tokens pass before the next tile of the head is read
        grid_names=("v", "m"),
        num_threads=3,
        thread_name="wg",
        scratch_types={
            "out_sm": shared,
            "targets_sm": plgpu.SMEM((2, HALF), jnp.int32),
            "factors_sm": plgpu.SMEM((2, 4, HALF), jnp.float32) if more else None,
            "barrier": plgpu.Barrier(num_arrivals=1 + more, num_barriers=2),
        },
        kernel_name=name,
        interpret=interpret,
    )(*operands)
