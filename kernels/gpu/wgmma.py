"""What every kernel here says about tensor cores: layouts, swizzled tiles, sums of products.

PTX ISA 9.7.15 describes the instructions, jax's `docs/pallas/gpu/reference.md` the layouts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

MATRIX = plgpu.Layout.WGMMA  # an accumulator, 64 rows a warpgroup
ROWS = MATRIX.reduce(1)  # one number a row of it
COLUMNS = MATRIX.reduce(0)  # one number a column
MULTIPROCESSORS = 132  # of an H100 SXM


def bits(x: Any) -> int:
    """Bits of an element."""
    return jax.dtypes.itemsize_bits(x.dtype)


def swizzled(bits: int, columns: int) -> tuple:
    """The transforms of a shared tile with `columns` of `bits`: wgmma reads no others."""
    swizzle = plgpu.find_swizzle(columns * bits)
    return (plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle))


def filled(value: float, shape: tuple[int, ...], layout: Any = MATRIX, dtype=jnp.float32) -> Array:
    """A constant in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def down(values: Array, columns: int) -> Array:
    """Repeats one number a row over columns."""
    return lax.broadcast_in_dim(values, (values.shape[0], columns), (0,))


def across(values: Array, rows: int) -> Array:
    """Repeats one number a column over rows."""
    return lax.broadcast_in_dim(values, (rows, values.shape[0]), (1,))


def add_products(
    total: Array, terms: Sequence[tuple[Callable[[], Any], Any]], *, interpreted: bool
) -> Array:
    """Returns total + a() @ b of all terms, which are under way at one time.

    Args:
      terms: `a` gives registers or shared memory, `b` is shared memory.
      interpreted: an interpreter's accumulators start from nothing only, so what is added to
        `total` is added here. The compiled lines next to it run on a GPU only.
    """
    if not interpreted:

        def run(acc: Any) -> None:
            for a, b in terms:
                plgpu.wgmma(acc, a(), b)

        return pl.run_state(run)(plgpu.ACC.init(total))

    def product(acc: Any, a: Callable[[], Any], b: Any) -> Array:
        plgpu.wgmma(acc, a(), b)
        return acc[...]

    for a, b in terms:
        total += pl.run_scoped(partial(product, a=a, b=b), plgpu.ACC(total.shape, total.dtype))
    return total
