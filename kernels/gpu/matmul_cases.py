"""Rows of quantized products: the feed-forward block of a model of 7B, for decoding and prefill."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from internjax.kernels.case import Case, array_bytes
from internjax.kernels.gpu.quant_matmul import E4M3, Matrix, quant_matmul

INPUTS, OUTPUTS = 4096, 14336
TOKENS = (16, 4096)


def draw_matrix(dtype, groups: int, zeros: bool, key: Array, lead: tuple[int, ...] = ()) -> Matrix:
    """Draws a quantized matrix of standard normal weights, as far as its steps can say it."""
    shape, scales = (*lead, OUTPUTS, INPUTS), (*lead, groups, OUTPUTS)
    if dtype == E4M3:
        return Matrix(jax.random.normal(key, shape).astype(E4M3), jnp.ones(scales))
    most = 7 if dtype == jnp.int4 else 127
    values = jax.random.randint(key, shape, -most, most + 1, jnp.int8).astype(dtype)
    middle = jnp.full(scales, 7.5, jnp.float16) if zeros else None
    return Matrix(values, jnp.full(scales, 2 / most, jnp.float16 if zeros else jnp.float32), middle)


WEIGHTS = {  # name -> draw a matrix, activations
    "int4 in groups of 128": (partial(draw_matrix, jnp.int4, INPUTS // 128, True), None),
    "int4 in groups of 32": (partial(draw_matrix, jnp.int4, INPUTS // 32, True), None),
    "int8": (partial(draw_matrix, jnp.int8, 1, False), None),
    "int8 x int8": (partial(draw_matrix, jnp.int8, 1, False), "int8"),
    "fp8": (partial(draw_matrix, E4M3, 1, False), None),
    "fp8 in blocks": (partial(draw_matrix, E4M3, INPUTS // 128, False), None),
}


def matmul_cases() -> dict[str, Case]:
    """Names and rows of the quantized products."""
    return {
        f"{name} matmul, {tokens} tokens": _case(tokens, *how)
        for name, how in WEIGHTS.items()
        for tokens in TOKENS
    }


def _case(tokens: int, matrix: Callable[[Array], Matrix], activations: str | None) -> Case:
    def draw(key: Array) -> tuple[Array, Matrix]:
        x_key, w_key = jax.random.split(key)
        return jax.random.normal(x_key, (tokens, INPUTS), jnp.bfloat16), matrix(w_key)

    run = partial(quant_matmul, activations=activations)
    shapes = jax.eval_shape(draw, jax.random.key(0))
    return Case(
        run=partial(run, implementation="pallas"),
        draw=draw,
        reference=partial(run, implementation="xla"),
        flops=2.0 * tokens * INPUTS * OUTPUTS,
        num_bytes=array_bytes(shapes) + 2.0 * tokens * OUTPUTS,
        peers={"xla": partial(run, implementation="xla")},
    )
