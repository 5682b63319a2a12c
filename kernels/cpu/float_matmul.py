"""Activations times weights of floats on the CPU: the reference and the choice of the kernel.

Nothing is rounded before a product: weights are the numbers of their array, activations float32.
Products are summed as float32 in ascending order, inside pieces of 256 inputs and then over these,
without fused multiply-adds. So no bit depends on the rows beside a row, on threads, or on the
instruction set.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from internjax.kernels.cpu import library, tiles as layout

DTYPES = ("float32", "bfloat16", "float16")


def float_matmuls(
    xs: Sequence[Float[Array, "_ _"]],
    weights: Sequence[Float[Array, "L _ _ 16"]],
    layer: Int[Array, ""] | int,
    *,
    columns: Sequence[int],
    implementation: str | None = None,
    path: str = "",
) -> tuple[Float[Array, "_ _"], ...]:
    """Multiplies rows with one layer of each of some weights; the results are float32.

    One call for all, whose columns the threads share.

    Args:
      xs: rows for each weight, or one for all of them.
      weights: in strips of 16 columns as `tiles.strips` makes them, all layers of each; layer: the
        one to multiply with. No layer is ever copied out of a stack by the kernel.
      implementation: "cpu" the kernel, "xla" one of XLA's products; None takes the kernel where it
        is there.
      path: instruction set, one of `library.PATHS`; "" the fastest that this CPU has.

    Raises:
      ValueError: shapes, dtypes or a choice that cannot be served.
    """
    if len(xs) not in (1, len(weights)):
        raise ValueError(f"{len(xs)} activations for {len(weights)} weights: give one or as many.")
    rows = [x.astype(jnp.float32) for x in xs]
    each = rows * len(weights) if len(rows) == 1 else rows
    for x, weight, number in zip(each, weights, columns, strict=True):
        check(x, weight, number)
    if not library.check_choice(implementation, path):
        return tuple(
            jnp.matmul(x, layout.columns_side_by_side(weight[layer])[:, :n].astype(jnp.float32))
            for x, weight, n in zip(each, weights, columns, strict=True)
        )
    results = [
        jax.ShapeDtypeStruct((len(x), n), jnp.float32) for x, n in zip(each, columns, strict=True)
    ]
    call = jax.ffi.ffi_call("internjax_float_matmuls", results)
    return tuple(call(jnp.asarray(layer, jnp.int32), *rows, *weights, path=path))


def check(x: Array, weight: Array, columns: int) -> None:
    """Raises ValueError, with what was given and what is legal, before anything is launched."""
    if x.ndim != 2:
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; legal are floats [rows, inputs].")
    if weight.dtype.name not in DTYPES or weight.ndim != 4 or weight.shape[3] != layout.LANES:
        raise ValueError(
            f"a weight is {weight.dtype}{list(weight.shape)}; legal are {', '.join(DTYPES)}"
            f" [L, strips, inputs, {layout.LANES}]."
        )
    _, strips, inputs, _ = weight.shape
    if x.shape[1] != inputs:
        raise ValueError(f"x has {x.shape[1]} inputs, the weight {inputs}.")
    if not (strips - 1) * layout.LANES < columns <= strips * layout.LANES:
        raise ValueError(f"columns={columns} in {strips} strips of {layout.LANES}.")
