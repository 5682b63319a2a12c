"""The kernels of `flash.py` and `flash_backward.py` as one differentiable function."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from internjax.kernels.gpu.flash import HEAD_SIZES, TILE, Rule, forward
from internjax.kernels.gpu.flash_backward import backward

NOBODY = -1  # segment of what a row is padded with


def unserved(q: Array) -> str | None:
    """Says why the kernels cannot serve these queries, or None."""
    if q.dtype != jnp.bfloat16:
        return f"it takes bfloat16, got {q.dtype}: cast q, k and v, or take 'xla'."
    if q.shape[3] not in HEAD_SIZES:
        legal = ", ".join(map(str, HEAD_SIZES))
        return f"it takes heads of size {legal}, got {q.shape[3]}: take 'xla'."
    return None


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
    rule: Rule,
    *,
    keep: str,
    interpret: Any = None,
) -> Float[Array, "B T N H"]:
    """Computes causal attention; rows are padded to whole tiles of 128 tokens.

    Args:
      keep: name (`checkpoint_name`) of what a recomputing backward pass should keep.
    """
    T = q.shape[1]
    pad = -T % TILE
    if pad:
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    ids = None
    if segment_ids is not None:
        ids = segment_ids.astype(jnp.int32)
        ids = jnp.pad(ids, ((0, 0), (0, pad)), constant_values=NOBODY)
    return _attend(q, k, v, ids, rule, keep, interpret)[:, :T]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q: Array, k: Array, v: Array, ids: Array | None, rule: Rule, keep: str, interpret: Any):
    return forward(q, k, v, ids, rule, interpret)[0]


def _attend_forward(q, k, v, ids, rule: Rule, keep: str, interpret: Any):
    out, lse = (checkpoint_name(x, keep) for x in forward(q, k, v, ids, rule, interpret))
    return out, (q, k, v, ids, out, lse)


def _attend_backward(rule: Rule, keep: str, interpret: Any, kept: tuple, g: Array):
    return *backward(*kept, g, rule, interpret), None


_attend.defvjp(_attend_forward, _attend_backward)
