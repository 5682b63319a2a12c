"""Rows of attention to a cache in blocks: 16 slots with 8,192 tokens each, of a model of 7B."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from internjax.kernels.case import Case, array_bytes
from internjax.kernels.gpu.decode_attention import KVPool, decode_attention

SLOTS, LENGTH, HEADS, KV_HEADS, BLOCK = 16, 8192, 32, 8, 64
ROWS = {  # name -> slots, tokens of each, bits of the cache, head size, queries
    "bfloat16": (SLOTS, LENGTH, 16, 128, 1),
    "bfloat16, 4 queries": (SLOTS, LENGTH, 16, 128, 4),
    "bfloat16, 1 slot of 131,072": (1, 131072, 16, 128, 1),
    "int8": (SLOTS, LENGTH, 8, 128, 1),
    "int4": (SLOTS, LENGTH, 4, 128, 1),
    "bfloat16, head size 64": (SLOTS, LENGTH, 16, 64, 1),
    "int4, head size 64": (SLOTS, LENGTH, 4, 64, 1),
    "bfloat16, head size 256": (SLOTS, LENGTH, 16, 256, 1),
    "int8, head size 256": (SLOTS, LENGTH, 8, 256, 1),
    "int4, head size 256": (SLOTS, LENGTH, 4, 256, 1),
}


# A few bytes of a thread, which stay in L1; int8 spilled 356 before it was unpacked by halves.
SPILLS = "heads of 256: the sums alone are 128 of a thread's 255 registers"


def decode_attention_cases() -> dict[str, Case]:
    """Names and rows."""
    return {f"decode attention, {name}": _case(*shape) for name, shape in ROWS.items()}


def draw_pool(key: Array, bits: int, head_dim: int, blocks: int) -> KVPool:
    """Draws a pool of standard normal keys and values, quantized ones as their steps fall."""
    width = head_dim // 2 if bits == 4 else head_dim
    shape = (blocks, BLOCK, KV_HEADS, width)
    keys = jax.random.split(key)
    if bits == 16:
        return KVPool(*(jax.random.normal(k, shape, jnp.bfloat16) for k in keys))
    stored = (jax.random.bits(k, shape, jnp.uint8) for k in keys)
    steps = 2**bits - 1
    factors = jnp.array([4 / steps, steps / 2, 4 / steps, steps / 2], jnp.float32)[:, None]
    return KVPool(*stored, jnp.broadcast_to(factors, (blocks, KV_HEADS, 4, BLOCK)))


def _case(slots: int, length: int, bits: int, head_dim: int, queries: int) -> Case:
    blocks = slots * length // BLOCK

    def draw(key: Array) -> tuple[Array, KVPool, Array, Array]:
        q_key, pool_key, table_key = jax.random.split(key, 3)
        q = jax.random.normal(q_key, (slots, queries, HEADS, head_dim), jnp.bfloat16)
        table = jax.random.permutation(table_key, blocks).reshape(slots, -1)
        lengths = jnp.full(slots, length, jnp.int32)
        return q, draw_pool(pool_key, bits, head_dim, blocks), table.astype(jnp.int32), lengths

    shapes = jax.eval_shape(draw, jax.random.key(0))
    return Case(
        run=partial(decode_attention, implementation="pallas"),
        draw=draw,
        reference=partial(decode_attention, implementation="xla"),
        flops=4.0 * slots * queries * HEADS * head_dim * length,
        num_bytes=array_bytes(shapes) + array_bytes(shapes[0]),
        peers={"xla": partial(decode_attention, implementation="xla")},
        why=SPILLS if head_dim == 256 else "",
    )
