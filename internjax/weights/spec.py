"""What the spec of an einsum says of a product with a weight."""

import math

from jax import Array


def rows_of(spec: str, x: Array) -> tuple[tuple[int, ...], Array]:
    """Returns the dims that the product keeps, and x as rows of the contracted ones."""
    lhs, rhs, result = split_spec(spec)
    num_in = sum(c not in result for c in rhs)
    if lhs[-num_in:] != rhs[:num_in] or result != lhs[:-num_in] + rhs[num_in:]:
        raise ValueError(f"einsum {spec!r}: the input dims come last in x and first in w.")
    lead = x.shape[: x.ndim - num_in]
    return lead, x.reshape(math.prod(lead), -1)


def split_spec(spec: str) -> tuple[str, str, str]:
    """Returns the letters of the activations, of the weight and of the result."""
    operands, result = spec.split("->")
    lhs, rhs = operands.split(",")
    return lhs, rhs, result
