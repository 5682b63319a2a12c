"""The kinds of weights: trees of arrays that stand where a plain one may stand."""

from collections.abc import Callable

from flax import struct
from jax import Array

from internjax.tree import Leaf


@struct.dataclass
class LoraWeight:
    """A weight with a low-rank correction: x w + scale * (x a) b (arXiv:2106.09685).

    Fields:
      base: array, QuantWeight or another LoraWeight, `[..., in, out]`.
      a: `[..., in, R]`; b: `[..., R, out]`; with in and out the dims of the einsum it serves.
      scale: alpha / rank.
    """

    base: Leaf
    a: Leaf
    b: Leaf
    scale: float = struct.field(pytree_node=False)


@struct.dataclass
class StackedLora:
    """A weight with A low-rank corrections, of which every sequence takes its own or none.

    Fields:
      base: a weight of any kind, `[*in, *out]`.
      a: `[*in, A, R]`; b: `[A, R, *out]`, finite, with the scale of each correction in them; zeros
        behind a smaller rank.
      chosen: int32 `[B]` of the B sequences that are multiplied, or `[]` of all; -1 for none. None
        where no correction is wanted at all.
    """

    base: Leaf
    a: Leaf
    b: Leaf
    chosen: Leaf = None


@struct.dataclass
class QuantWeight:
    """Group-wise asymmetric 4-bit integers: w = (values - zeros) * scales.

    The contracted dims are flattened to I, the others to O; groups of g follow each other in I.

    Fields:
      values: uint8 `[..., I/2, O]`; rows 2i and 2i+1 are the low and high nibble of byte row i.
      scales: `[..., I/g, O]`; zeros: `[..., I/g, O]`, real numbers in units of a step.
      in_shape, out_shape: natural shapes of I and O, for example (D,) and (N, H).
    """

    values: Leaf
    scales: Leaf
    zeros: Leaf
    in_shape: tuple[int, ...] = struct.field(pytree_node=False)
    out_shape: tuple[int, ...] = struct.field(pytree_node=False)


@struct.dataclass
class TurnedWeight:
    """A `QuantWeight` in the order of Hopper's tensor cores (`kernels/gpu/quant_matmul.Matrix`).

    Fields:
      values: int4 `[..., O, I]`, less 8; scales, zeros: `[..., I/g, O]`, as they were.
      in_shape, out_shape: natural shapes of I and O.
    """

    values: Leaf
    scales: Leaf
    zeros: Leaf
    in_shape: tuple[int, ...] = struct.field(pytree_node=False)
    out_shape: tuple[int, ...] = struct.field(pytree_node=False)


@struct.dataclass
class ScaledWeight:
    """8-bit numbers with a scale for each group of inputs: w = values * scales.

    Beside int8 numbers activations are rounded to int8, a scale a row and group, so that products
    are those of integers (W8A8); e4m3 numbers are expanded (weights only).

    Fields:
      values: int8 or float8_e4m3fn `[..., I, O]`; scales: `[..., I/g, O]`.
      in_shape, out_shape: natural shapes of I and O.
    """

    values: Leaf
    scales: Leaf
    in_shape: tuple[int, ...] = struct.field(pytree_node=False)
    out_shape: tuple[int, ...] = struct.field(pytree_node=False)


@struct.dataclass
class WatchedWeight:
    """A weight that shows the activations it is multiplied with to `see`, while tracing.

    Made and used inside one traced function, whose calibration wants to know them.
    """

    base: Leaf
    see: Callable[[Array], None] = struct.field(pytree_node=False)


@struct.dataclass
class Fp8Weight:
    """A plain weight whose products are made in 8-bit floating point (`kernels/fp8.py`)."""

    base: Leaf


@struct.dataclass
class PackedWeight:
    """4- or 8-bit integers in the layout of the CPU kernels: w = values * scales + offsets.

    Fields:
      tiles: uint8 `[L, blocks, G, bytes]` of all layers, or of one without the first dim; see
        `kernels/cpu/tiles.py`.
      bits: 4 or 8; in_shape, out_shape: natural shapes of the inputs and of the outputs.
      layer: the one layer of the stack that this weight is; None where there is no stack.
      activations: "int8", "bf16" or "f32", what products round their activations to.
    """

    tiles: Leaf
    bits: int = struct.field(pytree_node=False)
    in_shape: tuple[int, ...] = struct.field(pytree_node=False)
    out_shape: tuple[int, ...] = struct.field(pytree_node=False)
    layer: int | None = struct.field(pytree_node=False, default=None)
    activations: str = struct.field(pytree_node=False, default="int8")

    def at_layer(self, layer: int) -> "PackedWeight":
        """Returns one layer: the whole stack and an index, so that nothing is copied."""
        return self.replace(layer=layer)


@struct.dataclass
class PackedFloats:
    """Floats in the layout of the CPU kernels, the numbers of the array; activations stay as given.

    Fields:
      strips: float32, bfloat16 or float16 `[L, columns / 16, I, 16]` of all layers, or of one
        without the first dim; see `kernels/cpu/tiles.py`.
      in_shape, out_shape: natural shapes of the inputs and of the outputs.
      layer: the one layer of the stack that this weight is; None where there is no stack.
    """

    strips: Leaf
    in_shape: tuple[int, ...] = struct.field(pytree_node=False)
    out_shape: tuple[int, ...] = struct.field(pytree_node=False)
    layer: int | None = struct.field(pytree_node=False, default=None)

    def at_layer(self, layer: int) -> "PackedFloats":
        """Returns one layer: the whole stack and an index, so that nothing is copied."""
        return self.replace(layer=layer)


PACKED = (PackedWeight, PackedFloats)
"""What the CPU kernels multiply with: no bit of a row's product depends on the other rows."""


type Weight = (
    Array
    | LoraWeight
    | StackedLora
    | QuantWeight
    | ScaledWeight
    | TurnedWeight
    | PackedWeight
    | PackedFloats
    | Fp8Weight
    | WatchedWeight
)
