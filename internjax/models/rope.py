"""Rotary position embedding: the frequencies of every stretching rule, and the rotation itself.

Half-split layout: dimension i turns with dimension i + H/2 (Hugging Face's `rotate_half`).
Interleaved checkpoints are re-ordered when they are imported.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from internjax.models.config import ModelConfig, RopeConfig
from internjax.tree import wide


def inv_freq(cfg: ModelConfig, length: int | None = None) -> np.ndarray:
    """Returns the angular frequencies `[H/2]` (float64) of a model.

    Args:
      length: total tokens that a request may reach. Only "dynamic" looks at it: beyond the trained
        context M the base becomes base * (f*length/M - (f-1)) ** (H/(H-2)) (NTK-aware scaling as
        in InternLM's and Hugging Face's code). Deviation: fixed per request, so that cached keys
        stay valid, where upstream lets the base grow with every token.
    """
    rope, half = cfg.rope, cfg.head_dim // 2
    exponents = np.arange(half, dtype=np.float64) / half
    context = rope.original_context or cfg.max_context
    theta = rope.theta
    if rope.kind == "dynamic" and length is not None and length > context:
        stretch = rope.factor * length / context - (rope.factor - 1)
        theta *= stretch ** (cfg.head_dim / (cfg.head_dim - 2))
    freq = theta**-exponents
    if rope.kind == "linear":
        return freq / rope.factor
    if rope.kind == "llama3":
        return _llama3(freq, rope, context)
    if rope.kind == "yarn":
        return _yarn(freq, rope, context)
    return freq


def _llama3(freq: np.ndarray, rope: RopeConfig, context: int) -> np.ndarray:
    """Slows the long waves by `factor`, keeps the short ones, blends between (Llama 3.1)."""
    rotations = context * freq / (2 * math.pi)
    blend = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * freq / rope.factor + blend * freq


def _yarn(freq: np.ndarray, rope: RopeConfig, context: int) -> np.ndarray:
    """Blends by a ramp over dimensions between beta_fast and beta_slow (arXiv:2309.00071, 3.2)."""
    half = len(freq)

    def dim_of(rotations: float) -> float:
        turns = math.log(context / (rotations * 2 * math.pi))
        return half * turns / math.log(rope.theta)

    low = max(math.floor(dim_of(rope.beta_fast)), 0)
    # 2 * half - 1, not half - 1: the reference code clips at head_dim - 1.
    high = min(math.ceil(dim_of(rope.beta_slow)), 2 * half - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return freq / rope.factor * ramp + freq * (1 - ramp)


def attention_factor(rope: RopeConfig) -> float:
    """Returns the factor on cos and sin: 1, but for YaRN."""
    if rope.kind != "yarn":
        return 1.0
    return rope.attention_factor or (0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0)


def angles(
    positions: Int[Array, "B T"], freq: Float[Array, " half"] | Float[Array, "B half"], dtype
) -> Float[Array, "B T half"]:
    """Returns position times frequency; `freq` may differ by row (dynamic NTK, one base a request).

    Computed in at least float32: bfloat16 cannot tell position 257 from 256.
    """
    wide_dtype = wide(dtype)
    rows = freq[None, None, :] if freq.ndim == 1 else freq[:, None, :]
    return positions.astype(wide_dtype)[..., None] * rows.astype(wide_dtype)


def rotate(
    x: Float[Array, "B T N H"], angle: Float[Array, "B T half"], factor: float
) -> Float[Array, "B T N H"]:
    """Turns each pair (i, i + H/2) of the last dim by its angle."""
    wide_dtype = angle.dtype
    cos, sin = jnp.cos(angle)[:, :, None, :] * factor, jnp.sin(angle)[:, :, None, :] * factor
    first, second = jnp.split(x.astype(wide_dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
