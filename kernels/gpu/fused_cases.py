"""Rows of the pieces between matrix products, for a model of 7B."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from internjax.kernels.case import Arrays, Case, array_bytes
from internjax.kernels.gpu.row_kernels import rms_norm, swiglu

TOKENS, D_MODEL, D_FF = 4096, 4096, 14336


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
    }


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
