"""Small pure layers shared by every decoder."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from internjax.tree import wide


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """Scales `x` to unit root mean square over D, in at least float32 (arXiv:1910.07467)."""
    wide_dtype = wide(x.dtype)  # float64 stays: the sharding laws run in it
    x_wide = x.astype(wide_dtype)
    inverse_rms = lax.rsqrt(_mean(x_wide * x_wide) + eps)
    scale = scale.astype(wide_dtype).reshape((1,) * (x.ndim - 1) + scale.shape)
    return (x_wide * inverse_rms * scale).astype(x.dtype)


def _mean(x: Float[Array, "*B D"]) -> Float[Array, "*B 1"]:
    """Means over D whose bits do not depend on how many rows there are.

    XLA's CPU backend adds up eight rows side by side, each in order, but fewer rows in parts.
    """
    rows = math.prod(x.shape[:-1])
    if not 0 < rows < 8:
        return jnp.mean(x, axis=-1, keepdims=True)
    padded = jnp.pad(x.reshape(rows, -1), ((0, 8 - rows), (0, 0)))
    return jnp.mean(padded, axis=-1)[:rows].reshape(*x.shape[:-1], 1)


def swiglu(gate: Float[Array, "*B F"], up: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    """Returns silu(gate) * up (arXiv:2002.05202)."""
    return jax.nn.silu(gate) * up
