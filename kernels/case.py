"""What is known of one kernel at one shape, for whoever compiles, checks or times it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

type Arrays = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Fields:
      run: the public function of the kernel with implementation="pallas", of what `draw` returns.
      draw: key -> arguments (arrays or trees of arrays).
      reference: the same in plain jnp; of the same arguments, with the same results.
      flops: useful FLOPs; num_bytes: bytes that must pass through HBM, each once.
      peers: name -> the same by other means ("xla", "cudnn", "tokamax").
      tolerance: norm of the error over the norm of the reference that is allowed, of each result.
      needs: what the compiled code must have: "wgmma" where matrices are multiplied, "tma".
      rate: of the tensor cores for its types, against bfloat16.
      work: gives kernel name -> FLOPs that it carries out, also in vain and again; without it the
        predicted times take `flops` for all of them together.
      why: what is to be said of spills, where there are any.
    """

    run: Callable
    draw: Callable[[jax.Array], Arrays]
    reference: Callable
    flops: float
    num_bytes: float
    peers: Mapping[str, Callable] = field(default_factory=dict)
    tolerance: float = 0.02
    needs: tuple[str, ...] = ("wgmma", "tma")
    rate: int = 1
    work: Callable[[], Mapping[str, float]] | None = None
    why: str = ""

    def shapes(self) -> Arrays:
        """Returns the arguments as shapes; nothing is computed."""
        return jax.eval_shape(self.draw, jax.random.key(0))


def array_bytes(*trees: Any) -> int:
    """Sums the bytes of arrays or shapes; int4 counts half a byte."""
    bits = lambda x: math.prod(x.shape) * jax.dtypes.itemsize_bits(x.dtype)  # noqa: E731
    return sum(bits(x) for x in jax.tree.leaves(trees)) // 8
