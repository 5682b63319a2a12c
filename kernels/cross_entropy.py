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
    axis: str | None = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns three values at every position, in the logits' dtype and natural logarithms.

    What is minimised; -log softmax(unembed(x))[target], which differs from it by smoothing and
    z-loss only; and whether no other token has a higher logit than the target, 1 or 0.

    Args:
      unembed: states to logits; it may close over sharded weights.
      chunk: positions of a row whose logits exist at one time.
      axis: mesh axis over which the vocabulary is cut; logits are this device's part of it.
      smoothing: share of the target's probability that is spread evenly (arXiv:1512.00567).
      z_loss: weight of log^2 of the softmax's normaliser, which keeps logits small
        (arXiv:2204.02311).
    """

    @jax.checkpoint
    def piece(x: Array, targets: Array) -> Array:
        logits = unembed(x)
        normaliser, at_target, mean, top = _over_vocabulary(logits, targets, axis)
        nll = normaliser - at_target
        aim = nll
        if smoothing:
            aim = normaliser - (1 - smoothing) * at_target - smoothing * mean
        if z_loss:
            aim = aim + z_loss * normaliser**2
        return jnp.stack([aim, nll, (at_target >= top).astype(nll.dtype)])

    T = x.shape[1]
    if chunk >= T:
        return tuple(piece(x, targets))
    pad = -T % chunk
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)))
    starts = jnp.arange(0, T + pad, chunk)

    def step(_: None, start: Array) -> tuple[None, Array]:
        cut = lambda y: lax.dynamic_slice_in_dim(y, start, chunk, axis=1)  # noqa: E731
        return None, piece(cut(x), cut(targets))

    _, losses = lax.scan(step, None, starts)  # [chunks, 3, B, chunk]
    losses = jnp.moveaxis(losses, 0, 2).reshape(3, x.shape[0], -1)[:, :, :T]
    return tuple(losses)


def _over_vocabulary(
    logits: Array, targets: Array, axis: str | None
) -> tuple[Array, Array, Array, Array]:
    """Returns log sum exp, the target's, the mean and the highest logit, each `[B, S]`."""
    V = logits.shape[-1]
    first = 0 if axis is None else lax.axis_index(axis) * V
    hit = (jnp.arange(V, dtype=targets.dtype) + first)[None, None, :] == targets[..., None]
    at_target = jnp.sum(logits * hit.astype(logits.dtype), axis=-1)
    total = jnp.sum(logits, axis=-1)
    top = lax.stop_gradient(logits).max(axis=-1)
    if axis is not None:
        top = lax.pmax(top, axis)
    exponents = jnp.exp(logits - top[..., None]).sum(axis=-1)
    if axis is not None:
        exponents, at_target, total = lax.psum((exponents, at_target, total), axis)
        V = V * lax.axis_size(axis)
    return jnp.log(exponents) + top, at_target, total / V, top
