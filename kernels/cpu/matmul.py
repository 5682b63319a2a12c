"""Activations times a 4- or 8-bit weight on the CPU: the reference and the choice of the kernel.

Per row and group of inputs the activations are rounded to int8, products are summed as integers
inside the group and as float32 across groups, in ascending order and without fused multiply-adds.
So no bit depends on the rows beside a row, on threads, or on the instruction set.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from internjax.kernels.cpu import library, tiles as layout

ACTIVATIONS = ("int8", "bf16", "f32")
SMALLEST = 1e-30  # a group whose largest activation is below counts as zeros


def quant_matmul(
    x: Float[Array, "M I"],
    tiles: UInt8[Array, "L blocks G bytes"],
    layer: Int[Array, ""] | int,
    *,
    bits: int,
    columns: int,
    activations: str = "int8",
    implementation: str | None = None,
    path: str = "",
) -> Float[Array, "M columns"]:
    """Multiplies rows with one layer of a packed weight; see `quant_matmuls`."""
    (out,) = quant_matmuls(
        x,
        (tiles,),
        layer,
        bits=bits,
        columns=(columns,),
        activations=activations,
        implementation=implementation,
        path=path,
    )
    return out


def quant_matmuls(
    x: Float[Array, "M I"],
    weights: Sequence[UInt8[Array, "L _ G bytes"]],
    layer: Int[Array, ""] | int,
    *,
    bits: int,
    columns: Sequence[int],
    activations: str = "int8",
    implementation: str | None = None,
    path: str = "",
) -> tuple[Float[Array, "M _"], ...]:
    """Multiplies rows with one layer of each of some packed weights; the results are float32.

    One call for all: the rows are rounded once, and the threads share the columns of all of them.

    Args:
      weights: packed by `tiles.pack`, all layers of each, with groups of one size; layer: the one
        to multiply with. No layer is ever copied out of a stack by the kernel.
      activations: "int8" rounds by groups, "bf16" to bfloat16, "f32" not at all.
      implementation: "cpu" the kernel, "xla" expands the weight to floats; None takes the kernel
        where it is there.
      path: instruction set, one of `library.PATHS`; "" the fastest that this CPU has.

    Raises:
      ValueError: shapes, bits or a choice that cannot be served.
    """
    for tiles, number in zip(weights, columns, strict=True):
        check(x, tiles, bits, number, activations)
    group = layout.group_of(weights[0], bits)
    if any(layout.group_of(tiles, bits) != group for tiles in weights):
        raise ValueError("weights of one call have groups of one size.")
    native = library.check_choice(implementation, path)
    rows = x.astype(jnp.bfloat16) if activations == "bf16" else x
    rows = rows.astype(jnp.float32)
    if not native:
        plain = lambda tiles, n: layout.dequantize(tiles[layer], bits, jnp.float32)[:, :n]  # noqa: E731
        pairs = zip(weights, columns, strict=True)
        return tuple(jnp.matmul(rows, plain(tiles, n)) for tiles, n in pairs)
    results = [jax.ShapeDtypeStruct((x.shape[0], n), jnp.float32) for n in columns]
    call = jax.ffi.ffi_call("internjax_quant_matmuls", results)
    rounded = activations == "int8"
    layer = jnp.asarray(layer, jnp.int32)
    out = call(rows, layer, *weights, bits=bits, group=group, rounded=rounded, path=path)
    return tuple(out)


def check(x: Array, tiles: Array, bits: int, columns: int, activations: str) -> None:
    """Raises ValueError, with what was given and what is legal, before anything is launched."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations={activations!r}; legal are {', '.join(ACTIVATIONS)}.")
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; legal are floats [rows, inputs].")
    if tiles.ndim != 4 or tiles.dtype != jnp.uint8:
        raise ValueError(
            f"tiles are {tiles.dtype}{list(tiles.shape)}; legal are uint8 [L, blocks, G, bytes]."
        )
    group = layout.group_of(tiles, bits)
    layout.check_layout(bits, group)
    _, blocks, groups, size = tiles.shape
    if size != layout.tile_bytes(bits, group):
        raise ValueError(f"tiles of {size} bytes are no {bits}-bit tiles.")
    if x.shape[1] != groups * group:
        raise ValueError(f"x has {x.shape[1]} inputs, the weight {groups} groups of {group}.")
    if not (blocks - 1) * layout.LANES < columns <= blocks * layout.LANES:
        raise ValueError(f"columns={columns} in {blocks} blocks of {layout.LANES}.")


def round_rows(x: Float[Array, "*rows g"]) -> tuple[Array, Array]:
    """Returns int8 values and a float32 scale a group; one that is not finite is 0 x NaN."""
    top = jnp.abs(x).max(axis=-1)
    finite = jnp.isfinite(x).all(axis=-1)
    some = finite & (top >= SMALLEST)
    inverse = jnp.where(
        some, jnp.float32(127) / jnp.where(some, top, jnp.float32(1)), jnp.float32(0)
    )
    scales = jnp.where(some, top * jnp.float32(1 / 127), jnp.float32(0))
    values = jnp.round(jnp.where(finite[..., None], x, jnp.float32(0)) * inverse[..., None])
    return values.astype(jnp.int8), jnp.where(finite, scales, jnp.float32(jnp.nan))


def emulated(
    x: Float[Array, "M I"],
    tiles: UInt8[Array, "blocks G bytes"],
    *,
    bits: int,
    columns: int,
    activations: str = "int8",
) -> Float[Array, "M columns"]:
    """Does in plain jnp what the kernel does, to the last bit; slow."""
    zero = jnp.zeros((), jnp.int32)
    return _emulated(x, tiles, zero, bits=bits, rounding=activations)[:, :columns]


@partial(jax.jit, static_argnames=("bits", "rounding"))
def _emulated(x: Array, tiles: Array, zero: Array, *, bits: int, rounding: str) -> Array:
    def alone(product: Array) -> Array:
        """Keeps a product a rounding of its own: the compiler cannot know that `zero` is 0."""
        bits_of = lax.bitcast_convert_type(product, jnp.int32)
        return lax.bitcast_convert_type(bits_of ^ zero, jnp.float32)

    values, scales, offsets = layout.unpack(tiles, bits)
    groups, group, _ = values.shape
    x = x.astype(jnp.bfloat16) if rounding == "bf16" else x
    rows = x.astype(jnp.float32).reshape(len(x), groups, group).swapaxes(0, 1)  # [G, M, g]
    if rounding == "int8":
        q, steps = round_rows(rows)
        dots = jnp.einsum("GMi,GiO->GMO", q.astype(jnp.int32), values.astype(jnp.int32))
        sums = steps * q.astype(jnp.int32).sum(axis=-1).astype(jnp.float32)
    else:
        dots = jnp.zeros((groups, len(x), values.shape[-1]), jnp.float32)
        for i in range(group):
            dots = dots + alone(rows[:, :, i, None] * values[:, i, None].astype(jnp.float32))
        sums, steps = _lane_sums(rows), None
    out = jnp.zeros(dots.shape[1:], jnp.float32)
    for g in range(groups):
        factor = scales[g].astype(jnp.float32)[None]
        factor = factor if steps is None else factor * steps[g][:, None]
        out = out + alone(factor * dots[g].astype(jnp.float32))
        if offsets is not None:
            out = out + alone(offsets[g].astype(jnp.float32)[None] * sums[g][:, None])
    return out


def _lane_sums(rows: Float[Array, "G M g"]) -> Float[Array, "G M"]:
    """Sums the inputs of a group as 16 lanes do: lane i + lane i + 8, then + 4, + 2, + 1."""
    lanes = jnp.zeros((*rows.shape[:2], layout.LANES), jnp.float32)
    for i in range(0, rows.shape[2], layout.LANES):
        lanes = lanes + rows[:, :, i : i + layout.LANES]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]
