"""How weights start."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from internjax.errors import UserError

type Init = Callable[[Array, tuple[int, ...], jnp.dtype], Array]
KINDS = ("gpt2", "internlm", "internlm2")


@dataclass(frozen=True)
class InitConfig:
    """The spread of random weights; how it follows the width is `train/mup.py`'s.

    Fields:
      kind: gpt2: 0.02 everywhere, what writes into the residual stream divided by sqrt(2 L);
        internlm2: the same with sqrt(2 l) for layer l = 1..L; internlm: 0.006, edges 0.0052, by
        depth as well (InternEvo's model code for the two generations).
    """

    kind: Literal["gpt2", "internlm", "internlm2"] = "gpt2"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"init.kind={self.kind!r}: kinds are {', '.join(KINDS)}.")

    @property
    def edge(self) -> Init:
        """Draws the embedding and the head."""
        return normal(0.0052 if self.kind == "internlm" else 0.02)

    @property
    def inner(self) -> Init:
        """Draws matrices that read the residual stream."""
        return normal(self._std)

    def residual(self, L: int) -> Init:
        """Draws matrices that write into the residual stream."""
        return normal(self._std / math.sqrt(2 * L)) if self.kind == "gpt2" else by_depth(self._std)

    @property
    def _std(self) -> float:
        return 0.006 if self.kind == "internlm" else 0.02


def normal(std: float) -> Init:
    """Makes an initializer drawing from N(0, std^2)."""

    def init(key: Array, shape: tuple[int, ...], dtype) -> Array:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)

    return init


def by_depth(std: float) -> Init:
    """Makes an initializer of stacked layers: layer l = 1..L from N(0, std^2 / (2 l))."""

    def init(key: Array, shape: tuple[int, ...], dtype) -> Array:
        depth = jnp.arange(1, shape[0] + 1, dtype=dtype).reshape(-1, *(1,) * (len(shape) - 1))
        return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype) * (2 * depth) ** -0.5

    return init


def ones(key: Array, shape: tuple[int, ...], dtype) -> Array:
    """Starts norms at one."""
    return jnp.ones(shape, dtype)


def zeros(key: Array, shape: tuple[int, ...], dtype) -> Array:
    """Starts biases at zero."""
    return jnp.zeros(shape, dtype)
