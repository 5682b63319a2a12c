"""Matrix products in 8-bit floating point, for training on GPUs that have them (H100 and later).

The two formats and their use are those of arXiv:2209.05433: e4m3 (more digits) forward, e5m2 (more
range) for gradients. Each tensor is scaled by its own largest value at the moment ("current
scaling"), so there is no history to keep; on a mesh a device scales its own shard.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


@jax.custom_vjp
def fp8_matmul(x: Float[Array, "M K"], w: Float[Array, "K N"]) -> Float[Array, "M N"]:
    """Returns x w with both factors rounded to e4m3, added up in float32, in the dtype of x."""
    return _forward(x, w)[0]


def _forward(x: Array, w: Array):
    x8, w8 = to_fp8(x, E4M3), to_fp8(w, E4M3)
    return _dot(x8, w8, x.dtype), (x8, w8, jnp.zeros((), x.dtype), jnp.zeros((), w.dtype))


def _backward(kept, g: Array):
    (x, x_scale), (w, w_scale), x_like, w_like = kept
    g8 = to_fp8(g, E5M2)
    return _dot(g8, (w.T, w_scale), x_like.dtype), _dot((x.T, x_scale), g8, w_like.dtype)


fp8_matmul.defvjp(_forward, _backward)


def to_fp8(x: Float[Array, "*S"], dtype) -> tuple[Array, Float[Array, ""]]:
    """Rounds to 8 bits; returns the values and the factor that brings them back, float32."""
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest / jnp.finfo(dtype).max.astype(jnp.float32), 1.0)
    return (x.astype(jnp.float32) / scale).astype(dtype), scale


def _dot(a: tuple[Array, Array], b: tuple[Array, Array], dtype) -> Array:
    product = jnp.matmul(a[0], b[0], preferred_element_type=jnp.float32)
    return (product * (a[1] * b[1])).astype(dtype)
