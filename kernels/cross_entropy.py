"""Cross-entropy of a linear head by chunks of positions: `[B, T, V]` logits are never held.

Each chunk is recomputed in the backward pass. Knows nothing of batches or masks of a data set.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def chunked_cross_entropy(
    unembed: Callable[[Float[Array, "B S D"]], Float[Array, "B S V"]],
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    chunk: int = 128,
) -> Float[Array, "B T"]:
    """Returns -log softmax(unembed(x))[target] at every position, natural, in the logits' dtype.

    Args:
      unembed: states to logits; it may close over sharded weights.
      chunk: positions of a row whose logits exist at one time.
    """

    @jax.checkpoint
    def piece(x: Array, targets: Array) -> Array:
        logits = unembed(x)
        # A masked sum instead of a gather: it stays local where the vocabulary is sharded.
        vocabulary = jnp.arange(logits.shape[-1], dtype=targets.dtype)
        hit = vocabulary[None, None, :] == targets[..., None]
        at_target = jnp.sum(logits * hit.astype(logits.dtype), axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - at_target

    T = x.shape[1]
    if chunk >= T:
        return piece(x, targets)
    pad = -T % chunk
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)))
    starts = jnp.arange(0, T + pad, chunk)

    def step(_: None, start: Array) -> tuple[None, Array]:
        cut = lambda y: lax.dynamic_slice_in_dim(y, start, chunk, axis=1)  # noqa: E731
        return None, piece(cut(x), cut(targets))

    _, losses = lax.scan(step, None, starts)  # [chunks, B, chunk]
    return losses.swapaxes(0, 1).reshape(x.shape[0], -1)[:, :T]
