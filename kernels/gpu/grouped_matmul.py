"""Matrix products of blocks of rows, each by the weight of its expert, on Hopper GPUs.

The rows come as `models/moe.py` lays them: blocks of equal size with one expert each, of which the
first `used` count. Weights are plain (bfloat16, `[E, I, O]`) or quantized (`quant_matmul.Matrix`).
Letters beside the usual: M blocks, R rows of a block, I inputs, O outputs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from internjax.kernels.gpu.quant_matmul import (
    Matrix,
    activation_scales,
    expand,
    why_not as matrix_why_not,
)
from internjax.kernels.gpu.scaled_matmul import (
    Scaling,
    Tiles,
    choose_tiles,
    group_sums,
    scaled_matmul,
)
from internjax.kernels.platform import choose, not_for_hopper

ROWS = (8, 16, 32, 64, 128, 256, 512)  # of a block


def grouped_matmul(
    rows: Float[Array, "M R I"],
    w: Float[Array, "E I O"] | Matrix,
    owner: Int[Array, " M"],
    used: Int[Array, ""],
    *,
    implementation: str | None = None,
    interpret: Any = None,
) -> Float[Array, "M R O"]:
    """Multiplies the first `used` blocks, each by the weight of its expert; the others give 0.

    Differentiable in the rows, and in plain weights.

    Args:
      owner: expert of every block.
      implementation: None, "xla" or "pallas".
      interpret: `plgpu.InterpretGPUParams`, to run the Hopper kernel on a CPU.
    """
    I = w.values.shape[-1] if isinstance(w, Matrix) else w.shape[1]
    if rows.shape[-1] != I or len(owner) != len(rows):
        raise ValueError(
            f"grouped_matmul: rows {rows.shape}, {I} inputs of the weights, owners {owner.shape};"
            " legal are [M, R, I], I and [M]."
        )
    served = {"xla": None, "pallas": why_not(rows, w) or not_for_hopper(interpret)}
    best = "xla" if served["pallas"] else "pallas"
    chosen = choose("grouped_matmul", implementation, served, best=best)
    if chosen == "xla" or not len(rows):
        return reference(rows, w, owner, used)
    if isinstance(w, Matrix):
        return _quantized(rows, w, owner, used, interpret)
    return _plain(rows, w, owner, used, interpret)


def why_not(rows: Array, w: Array | Matrix) -> str | None:
    """Says what the Hopper kernel does not serve in these arrays, or None."""
    if rows.shape[1] not in ROWS:
        return f"blocks of {rows.shape[1]} rows; legal are {ROWS}."
    if isinstance(w, Matrix):
        return matrix_why_not(rows, w)
    I, O = w.shape[1:]
    if rows.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
        return f"rows of {rows.dtype} and weights of {w.dtype}; legal is bfloat16."
    if I % 64 or O % 64:
        return f"{I} inputs and {O} outputs; legal are multiples of 64."
    return None


def reference(
    rows: Float[Array, "M R I"],
    w: Float[Array, "E I O"] | Matrix,
    owner: Int[Array, " M"],
    used: Int[Array, ""],
) -> Float[Array, "M R O"]:
    """Says in plain jnp what `grouped_matmul` computes; reads a weight for every block."""
    if isinstance(w, Matrix) and w.values.dtype == jnp.float8_e4m3fn:
        values, scale = activation_scales(rows, w.scales.shape[-2], w.values.dtype)
        size = rows.shape[-1] // w.scales.shape[-2]
        x = values.astype(jnp.float32) * jnp.repeat(scale, size, axis=-1)
        plain = expand(w, jnp.float32)
    else:
        x, plain = rows, expand(w, rows.dtype) if isinstance(w, Matrix) else w
    y = jnp.einsum("MRI,MIO->MRO", x, plain[owner], preferred_element_type=jnp.float32)
    live = jnp.arange(len(rows)) < used
    return jnp.where(live[:, None, None], y, 0.0).astype(rows.dtype)


def _blocks(rows: Array, owner: Array, used: Array, tiles: Tiles) -> tuple[Array, Array, Array]:
    """Rows in one dim, the expert of every tile of them, and the tiles in use `[1]`."""
    M, R, I = rows.shape
    per_block = R // tiles.tokens
    owner = jnp.repeat(owner.astype(jnp.int32), per_block)
    return rows.reshape(M * R, I), owner, (used.astype(jnp.int32) * per_block).reshape(1)


def _multiply(
    rows: Array, w: Array, owner: Array, used: Array, input_major: bool, interpret: Any
) -> Array:
    """Returns the products with plain weights, `[E, I, O]` or, not input_major, `[E, O, I]`."""
    M, R, I = rows.shape
    O = w.shape[2 if input_major else 1]
    tiles = choose_tiles(R, O, I, bits=(16, 16), promotes=False, blocks=M)
    x, owner, used = _blocks(rows, owner, used, tiles)
    y = scaled_matmul(
        x,
        w,
        Scaling(),
        owner=owner,
        used=used,
        input_major=input_major,
        out_dtype=rows.dtype,
        tiles=tiles,
        name=f"grouped_matmul{'' if input_major else '_turned'}",
        interpret=interpret,
    )
    return y.reshape(M, R, O)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _plain(rows: Array, w: Array, owner: Array, used: Array, interpret: Any) -> Array:
    return _multiply(rows, w, owner, used, True, interpret)


def _plain_forward(rows: Array, w: Array, owner: Array, used: Array, interpret: Any):
    return _plain(rows, w, owner, used, interpret), (rows, w, owner, used)


def _plain_backward(interpret: Any, kept: tuple, g: Array):
    """The rows' gradient by the same kernel; the weights' one block after the other, in float32.

    A block's outer product is large enough to fill a GPU by itself, and adding in place to the
    weights of its expert needs no copies (as `models/moe.py` has it).
    """
    rows, w, owner, used = kept
    g_rows = _multiply(g, w, owner, used, False, interpret)

    def add(i: Array, total: Array) -> Array:
        part = jnp.matmul(rows[i].T, g[i], preferred_element_type=jnp.float32)
        return total.at[owner[i]].add(part)

    g_w = lax.fori_loop(jnp.zeros_like(used), used, add, jnp.zeros(w.shape, jnp.float32))
    return g_rows, g_w.astype(w.dtype), None, None


_plain.defvjp(_plain_forward, _plain_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _quantized(rows: Array, w: Matrix, owner: Array, used: Array, interpret: Any) -> Array:
    M, R, I = rows.shape
    O, T = w.values.shape[-2], w.scales.shape[-2]
    fp8 = w.values.dtype == jnp.float8_e4m3fn
    bits = (8 if fp8 else 16, jax.dtypes.itemsize_bits(w.values.dtype))
    tiles = choose_tiles(R, O, I, bits=bits, promotes=fp8, blocks=M)
    x, owner, used = _blocks(rows, owner, used, tiles)
    col = sums = None
    if fp8:
        x, scale = activation_scales(x, T, w.values.dtype)
        col = scale.T
    elif w.zeros is not None and (tiles.warpgroups == 1 or T == 1):
        sums = group_sums(x, T, tiles)
    y = scaled_matmul(
        x,
        w.values,
        Scaling(w.scales, w.zeros, col, sums),
        owner=owner,
        used=used,
        out_dtype=rows.dtype,
        tiles=tiles,
        name=f"grouped_matmul_{w.values.dtype}",
        interpret=interpret,
    )
    return y.reshape(M, R, O)


def _quantized_forward(rows: Array, w: Matrix, owner: Array, used: Array, interpret: Any):
    return _quantized(rows, w, owner, used, interpret), (w, owner, used)


def _quantized_backward(interpret: Any, kept: tuple, g: Array):
    w, owner, used = kept
    plain = expand(w, g.dtype)
    return _multiply(g, plain, owner, used, False, interpret), None, None, None


_quantized.defvjp(_quantized_forward, _quantized_backward)
