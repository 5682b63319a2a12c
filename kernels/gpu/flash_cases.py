"""Rows of causal attention: one row of 8,192 tokens, forward as in prefill, and with gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from internjax.kernels.attention import causal_attention
from internjax.kernels.case import Case, array_bytes
from internjax.kernels.gpu.flash import (
    FORWARD,
    HEAD_SIZES,
    TILE,
    Blocks,
    Rule,
    key_bounds,
    query_bounds,
)
from internjax.kernels.gpu.flash_backward import APART, FOR_KEYS, FOR_QUERIES

LENGTH, HEADS, KV_HEADS, SEGMENTS = 8192, 32, 8, 4
WINDOW, SOFT_CAP = 1024, 30.0
SPILLS = {
    "attention 256, gradients": (
        "half of the 240 registers hold the sum of 64 x 256; what spills are addresses, read and"
        " written outside of the loop over blocks or once a block"
    ),
    "attention 128, packed, window, soft cap, gradients": (
        "the derivative of the soft cap is one more matrix that lives until the scores' gradient"
    ),
}


def flash_cases() -> dict[str, Case]:
    """Names and rows; the number is the head size."""
    special = {"window": WINDOW, "soft_cap": SOFT_CAP}
    cases = {}
    for gradients in (False, True):
        end = ", gradients" if gradients else ""
        cases |= {f"attention {H}{end}": _case(H, gradients) for H in HEAD_SIZES}
        cases[f"attention 128, packed{end}"] = _case(128, gradients, packed=True)
        name = f"attention 128, packed, window, soft cap{end}"
        cases[name] = _case(128, gradients, packed=True, **special)
    return {name: _with_reason(case, SPILLS.get(name, "")) for name, case in cases.items()}


def _with_reason(case: Case, why: str) -> Case:
    return Case(**{**vars(case), "why": why})


def _case(H: int, gradients: bool, packed: bool = False, **options: Any) -> Case:
    def draw(key: Array) -> tuple[Array, ...]:
        heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
        keys = jax.random.split(key, 4)
        q, k, v, g = (
            jax.random.normal(key, (1, LENGTH, n, H), jnp.bfloat16)
            for key, n in zip(keys, heads, strict=True)
        )
        return (q, k, v, *([_segments()] if packed else []), *([g] if gradients else []))

    def by(implementation: str) -> Any:
        attend = partial(causal_attention, implementation=implementation, **options)
        return partial(_gradients, attend) if gradients else attend

    def reference(*args: Array) -> Any:
        wide = (x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in args)
        return by("xla")(*wide)

    shapes = jax.eval_shape(draw, jax.random.key(0))
    results = jax.eval_shape(by("xla"), *shapes)
    reach = LENGTH // SEGMENTS if packed else LENGTH
    window = min(options.get("window", reach), reach)
    seen = LENGTH * window - (LENGTH // reach) * window * (window - 1) // 2
    peers = {"xla": by("xla")}
    if not packed and H <= 128:
        peers["cudnn"] = by("cudnn")
    peers["tokamax"] = by("tokamax")
    return Case(
        run=by("pallas"),
        draw=draw,
        reference=reference,
        # Two products a pair of tokens and head; gradients are five more of the same size.
        flops=4.0 * HEADS * H * seen * (3.5 if gradients else 1),
        num_bytes=array_bytes(shapes, results),
        peers=peers,
        tolerance=0.01,
        work=partial(_work, H, gradients, packed, Rule(H**-0.5, **options)),
    )


def _work(H: int, gradients: bool, packed: bool, rule: Rule) -> dict[str, float]:
    """FLOPs of each kernel: all of every block that it goes through."""
    ids = _segments() if packed else None

    def pairs(blocks: Blocks, bounds: Callable, *, keys: bool) -> float:
        """Pairs of a query and a key in the blocks of all tiles."""
        first_or_end = bounds(LENGTH, rule, ids, blocks.size)[0, 0]
        tile = jnp.arange(LENGTH // TILE)
        if keys:
            count = -(-(tile + 1) * TILE // blocks.size) - first_or_end
        else:
            count = first_or_end - tile * TILE // blocks.size
        return float(count.sum()) * blocks.size * TILE

    product = 2.0 * HEADS * H
    work = {"flash_forward": 2 * product * pairs(FORWARD[H], key_bounds, keys=True)}
    if not gradients:
        return work
    work["flash_backward_q"] = 3 * product * pairs(FOR_QUERIES[H], key_bounds, keys=True)
    once = product * pairs(FOR_KEYS[H], query_bounds, keys=False)
    if FOR_KEYS[H] is APART:
        return work | {"flash_backward_k": 3 * once, "flash_backward_v": 2 * once}
    return work | {"flash_backward_k_v": 4 * once}


def _segments() -> Array:
    return (jnp.arange(LENGTH) // (LENGTH // SEGMENTS)).astype(jnp.int32)[None]


def _gradients(attend: Any, q: Array, k: Array, v: Array, *rest: Array) -> tuple[Array, ...]:
    *ids, g = rest
    return jax.vjp(lambda q, k, v: attend(q, k, v, *ids), q, k, v)[1](g.astype(q.dtype))
