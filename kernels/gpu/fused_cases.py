"""Rows of the pieces between matrix products, for a model of 7B."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from internjax.kernels.case import Arrays, Case, array_bytes
from internjax.kernels.gpu.attention_cases import BLOCK, draw_pool
from internjax.kernels.gpu.linear_cross_entropy import linear_cross_entropy
from internjax.kernels.gpu.rope_write import destinations, rope_write
from internjax.kernels.gpu.row_kernels import rms_norm, swiglu

TOKENS, D_MODEL, D_FF, VOCABULARY = 4096, 4096, 14336, 92544


def fused_cases() -> dict[str, Case]:
    """Names and rows."""
    norm = ((TOKENS, D_MODEL), (D_MODEL,))
    gated = ((TOKENS, D_FF),) * 2
    eight = {"quantize": "int8"}
    return {
        "rms norm": _case(partial(rms_norm, eps=1e-5), norm, flops=4 * TOKENS * D_MODEL),
        "rms norm to int8": _case(
            partial(rms_norm, eps=1e-5, **eight), norm, flops=6 * TOKENS * D_MODEL
        ),
        "swiglu": _case(swiglu, gated, flops=5 * TOKENS * D_FF),
        "swiglu to int8": _case(partial(swiglu, **eight), gated, flops=7 * TOKENS * D_FF),
        "cross-entropy": _cross_entropy(VOCABULARY, backward=False),
        "rope and write, bfloat16": _rope_write(16),
        "rope and write, int8": _rope_write(8),
        "rope and write, int4": _rope_write(4),
        "cross-entropy of 131,072, backward": _cross_entropy(131072, backward=True),
    }


def _rope_write(bits: int) -> Case:
    """A prompt of 4,096 tokens of one slot, which fills the pool."""
    heads, kv_heads, head_dim = 32, 8, 128
    blocks = TOKENS // BLOCK

    def draw(key: Array) -> Arrays:
        *keys, pool_key, table_key = jax.random.split(key, 5)
        q, k, v = (
            jax.random.normal(k, (1, TOKENS, n, head_dim), jnp.bfloat16)
            for k, n in zip(keys, (heads, kv_heads, kv_heads), strict=True)
        )
        angle = (
            jnp.arange(TOKENS, dtype=jnp.float32)[None, :, None] / jnp.arange(1.0, 65.0)[None, None]
        )
        table = jax.random.permutation(table_key, blocks).astype(jnp.int32)[None]
        places = destinations(table, jnp.array([TOKENS], jnp.int32), TOKENS, BLOCK)
        return q, k, v, angle, draw_pool(pool_key, bits, head_dim, blocks), places

    q, k, v, angle, pool, places = jax.eval_shape(draw, jax.random.key(0))
    return Case(
        run=partial(rope_write, implementation="pallas"),
        draw=draw,
        reference=partial(rope_write, implementation="xla"),
        flops=3.0 * TOKENS * (heads + kv_heads) * head_dim,
        num_bytes=float(array_bytes(q, q, k, v, angle, angle, pool, places)),
        peers={"xla": partial(rope_write, implementation="xla")},
        needs=("tma",),
    )


def _cross_entropy(vocabulary: int, *, backward: bool) -> Case:
    """Forward alone; or forward and backward, for the mean of the losses."""

    def draw(key: Array) -> Arrays:
        x_key, w_key, targets_key = jax.random.split(key, 3)
        x = jax.random.normal(x_key, (TOKENS, D_MODEL), jnp.bfloat16)
        w = jax.random.normal(w_key, (D_MODEL, vocabulary), jnp.bfloat16) / 64
        return x, w, jax.random.randint(targets_key, (TOKENS,), 0, vocabulary, jnp.int32)

    def by(implementation: str) -> Callable:
        run = partial(linear_cross_entropy, implementation=implementation)
        if not backward:
            return run
        return jax.grad(lambda x, w, targets: run(x, w, targets)[0].mean(), (0, 1))

    x, w, _ = given = jax.eval_shape(draw, jax.random.key(0))
    logits = 2.0 * TOKENS * D_MODEL * vocabulary
    kernels = ("cross_entropy", "cross_entropy_backward")[: 1 + backward]
    return Case(
        run=by("pallas"),
        draw=draw,
        reference=by("xla"),
        flops=logits * (4 if backward else 1),  # logits twice, the gradients of both factors
        work=partial(dict.fromkeys, kernels, logits),  # the factors' products are XLA's
        num_bytes=float(array_bytes(given) + (array_bytes(w) * 2 + array_bytes(x)) * backward),
        peers={"xla": by("xla")},
    )


def _case(fn: Callable, shapes: tuple[tuple[int, ...], ...], *, flops: float) -> Case:
    def draw(key: Array) -> Arrays:
        keys = jax.random.split(key, len(shapes))
        return tuple(
            jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=True)
        )

    given = jax.eval_shape(draw, jax.random.key(0))
    made = jax.eval_shape(partial(fn, implementation="xla"), *given)
    return Case(
        run=partial(fn, implementation="pallas"),
        draw=draw,
        reference=partial(fn, implementation="xla"),
        flops=float(flops),
        num_bytes=float(array_bytes(given, made)),
        peers={"xla": partial(fn, implementation="xla")},
        needs=(),  # elementwise: vector loads and stores are all there is
    )
