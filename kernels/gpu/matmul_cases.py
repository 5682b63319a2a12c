"""Rows of quantized products: the feed-forward block of a model of 7B, for decoding and prefill."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from internjax.kernels.case import Case, array_bytes
from internjax.kernels.gpu.grouped_matmul import grouped_matmul
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


WEIGHTS: dict[str, tuple[Callable[..., Matrix], str | None, int]] = {
    # name -> draw a matrix, activations, rate of the tensor cores against bfloat16
    "int4 in groups of 128": (partial(draw_matrix, jnp.int4, INPUTS // 128, True), None, 1),
    "int4 in groups of 32": (partial(draw_matrix, jnp.int4, INPUTS // 32, True), None, 1),
    "int8": (partial(draw_matrix, jnp.int8, 1, False), None, 1),
    "int8 x int8": (partial(draw_matrix, jnp.int8, 1, False), "int8", 2),
    "fp8": (partial(draw_matrix, E4M3, 1, False), None, 2),
    "fp8 in blocks": (partial(draw_matrix, E4M3, INPUTS // 128, False), None, 2),
}


def matmul_cases() -> dict[str, Case]:
    """Names and rows of the quantized products."""
    return {
        f"{name} matmul, {tokens} tokens": _case(tokens, *how)
        for name, how in WEIGHTS.items()
        for tokens in TOKENS
    }


EXPERTS, ROWS = 8, {"decoding": (16, 8), "prefill": (48, 512)}  # blocks, rows of a block


def grouped_cases() -> dict[str, Case]:
    """Names and rows of the experts' products."""
    kinds = {"bfloat16": None, "int4 in groups of 128": WEIGHTS["int4 in groups of 128"][0]}
    rows = {
        f"{name} experts, {phase}": _grouped(*shape, matrix)
        for name, matrix in kinds.items()
        for phase, shape in ROWS.items()
    }
    plain = rows["bfloat16 experts, prefill"]
    return rows | {"bfloat16 experts, backward": _backward(plain)}


def _grouped(blocks: int, size: int, matrix: Callable[..., Matrix] | None) -> Case:
    def draw(key: Array) -> tuple[Array, Array | Matrix, Array, Array]:
        x_key, w_key = jax.random.split(key)
        rows = jax.random.normal(x_key, (blocks, size, INPUTS), jnp.bfloat16)
        shape = (EXPERTS, INPUTS, OUTPUTS)
        w = matrix(w_key, (EXPERTS,)) if matrix else jax.random.normal(w_key, shape, jnp.bfloat16)
        owner = jnp.sort(jnp.arange(blocks, dtype=jnp.int32) % EXPERTS)
        return rows, w, owner, jnp.asarray(blocks, jnp.int32)

    shapes = jax.eval_shape(draw, jax.random.key(0))
    return Case(
        run=partial(grouped_matmul, implementation="pallas"),
        draw=draw,
        reference=partial(grouped_matmul, implementation="xla"),
        flops=2.0 * blocks * size * INPUTS * OUTPUTS,
        num_bytes=array_bytes(shapes) + 2.0 * blocks * size * OUTPUTS,
        peers={"xla": partial(grouped_matmul, implementation="xla")},
    )


def _backward(case: Case) -> Case:
    """The gradients of a row's first two arguments, for a gradient of ones."""

    def gradients(run: Callable) -> Callable:
        def of(rows: Array, w: Array, owner: Array, used: Array) -> tuple[Array, Array]:
            y, pull = jax.vjp(lambda rows, w: run(rows, w, owner, used), rows, w)
            return pull(jnp.ones_like(y))

        return of

    return replace(
        case,
        run=gradients(case.run),
        reference=gradients(case.reference),
        flops=2 * case.flops,
        work=lambda: {"grouped_matmul_turned_many": case.flops},  # the weights' gradient is XLA's
        num_bytes=2 * case.num_bytes,
        peers={"xla": gradients(case.reference)},
    )


def _case(
    tokens: int, matrix: Callable[[Array], Matrix], activations: str | None, rate: int
) -> Case:
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
        rate=rate,
    )
