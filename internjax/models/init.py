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
    """The spread of random weights.

    Fields:
      kind: gpt2: 0.02 everywhere, what writes into the residual stream divided by sqrt(2 L);
        internlm2: the same with sqrt(2 l) for layer l = 1..L; internlm: 0.006, edges 0.0052, by
        depth as well (InternEvo's model code for the two generations).
      base_width: a model dim at which the spread is as stated; at another width D, matrices scale
        by sqrt(base / D) and the head by base / D (muP, arXiv:2203.03466, table 8). 0: no scaling.
    """

    kind: Literal["gpt2", "internlm", "internlm2"] = "gpt2"
    base_width: int = 0

    def __post_init__(self):
        if self.kind not in KINDS or self.base_width < 0:
            raise UserError(
                f"init.kind={self.kind!r}, init.base_width={self.base_width}: kinds are"
                f" {', '.join(KINDS)}, a width is positive, or 0 for none."
            )

    @property
    def std(self) -> float:
        """Standard deviation of inner matrices."""
        return 0.006 if self.kind == "internlm" else 0.02

    @property
    def embedding(self) -> float:
        """Standard deviation of the embedding."""
        return 0.0052 if self.kind == "internlm" else 0.02

    def edge(self, D: int) -> Init:
        """Draws the head."""
        return normal(self.embedding * self._ratio(D))

    def inner(self, D: int) -> Init:
        """Draws matrices that read the residual stream."""
        return normal(self.std * math.sqrt(self._ratio(D)))

    def residual(self, D: int, L: int) -> Init:
        """Draws matrices that write into the residual stream."""
        std = self.std * math.sqrt(self._ratio(D))
        if self.kind == "gpt2":
            return normal(std / math.sqrt(2 * L))
        return by_depth(std)

    def _ratio(self, D: int) -> float:
        return self.base_width / D if self.base_width else 1.0


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
