"""Kinds of weights and the one function that tells them apart.

The model calls `einsum(spec, x, w)` and `take(w, ids)`; whether `w` is an array, carries a LoRA
adapter or is quantized is decided here and nowhere else, so the model has no branch for either.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from internjax.collectives import Parallel
from internjax.kernels.cpu import tiles as cpu_tiles
from internjax.kernels.cpu.matmul import quant_matmuls
from internjax.kernels.fp8 import fp8_matmul
from internjax.kernels.platform import choose, not_for_hopper
from internjax.tree import Leaf, wide

GATHERED = "gathered"  # name of weights that ZeRO 3 gathered


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


type Weight = Array | LoraWeight | QuantWeight | TurnedWeight | PackedWeight | Fp8Weight


def dequantize(w: QuantWeight, dtype) -> Array:
    """Expands to a plain array `[..., *in_shape, *out_shape]` of `dtype`."""
    *lead, half, out = w.values.shape
    groups = w.scales.shape[-2]
    nibbles = jnp.stack([w.values & 15, w.values >> 4], axis=-2)  # [..., I/2, 2, O]
    steps = nibbles.reshape(*lead, groups, 2 * half // groups, out).astype(dtype)
    zeros, scales = (z.astype(dtype)[..., None, :] for z in (w.zeros, w.scales))
    return ((steps - zeros) * scales).reshape(*lead, *w.in_shape, *w.out_shape)


def plain(w: Weight, dtype) -> Array:
    """Returns any kind of weight as one array of `dtype`: adapters merged, integers expanded."""
    if isinstance(w, QuantWeight):
        return dequantize(w, dtype)
    if isinstance(w, TurnedWeight):
        return _unturned(w, dtype)
    if isinstance(w, PackedWeight):
        return _unpacked(w, dtype)
    if isinstance(w, LoraWeight):
        return plain(w.base, dtype) + lora_delta(w, dtype)
    return (w.base if isinstance(w, Fp8Weight) else w).astype(dtype)


def lora_delta(w: LoraWeight, dtype) -> Array:
    """Returns scale * a b, shaped as the base weight."""
    lead = w.a.ndim - 1 - _num_in(w)
    a = w.a.astype(dtype).reshape(*w.a.shape[:lead], -1, w.a.shape[-1])
    b = w.b.astype(dtype).reshape(*w.b.shape[: lead + 1], -1)
    shape = (*w.a.shape[:-1], *w.b.shape[lead + 1 :])
    return (a @ b).reshape(shape) * jnp.asarray(w.scale, dtype)


def _num_in(w: LoraWeight) -> int:
    """Returns how many dims are contracted: total dims of base are lead + in + out."""
    if isinstance(w.base, LoraWeight):
        return _num_in(w.base)
    if isinstance(w.base, (QuantWeight, TurnedWeight, PackedWeight)):
        return len(w.base.in_shape)
    # a has lead + in + 1 dims, b lead + 1 + out, base lead + in + out.
    lead = w.a.ndim + w.b.ndim - 2 - w.base.ndim
    return w.a.ndim - 1 - lead


def einsum(spec: str, x: Array, w: Weight, *, widened: bool = False) -> Array:
    """Contracts activations with a weight of any kind, in the dtype of the activations.

    Args:
      spec: as in `jnp.einsum`, for example "BTD,DNH->BTNH"; the letters of `w` that the result
        lacks are its input dims and must come first in it.
      widened: the result keeps the float32 of its sums, as in `wide_matmul`.
    """
    if isinstance(w, LoraWeight):
        return _adapted(spec, x, w, einsum(spec, x, w.base, widened=widened))
    if isinstance(w, PackedWeight):
        (out,) = _packed_einsums((spec,), x, (w,), wide(x.dtype) if widened else x.dtype)
        return out
    if isinstance(w, (QuantWeight, TurnedWeight)) and not widened and on_tensor_cores(x, w):
        # Nothing but `w` is kept for the backward pass: it is turned again there.
        return jax.checkpoint(partial(_turned_einsum, spec))(x, w)
    matmul = fp8_matmul if isinstance(w, Fp8Weight) else wide_matmul if widened else jnp.matmul
    product = lambda x, w: _contract(spec, x, plain(w, x.dtype), matmul)  # noqa: E731
    # Integers are expanded again for the backward pass: a layer's expanded weights, kept from its
    # forward pass, are the largest temporaries of QLoRA.
    expands = isinstance(w, (QuantWeight, TurnedWeight))
    return jax.checkpoint(product)(x, w) if expands else product(x, w)


def einsums(specs: Sequence[str], x: Array, ws: Sequence[Weight]) -> tuple[Array, ...]:
    """Contracts the same activations with several weights; see `einsum`.

    Packed weights that are alike share one call of the CPU kernel: small calls side by side are
    handed from thread to thread, which takes longer than they do.
    """
    if any(isinstance(w, LoraWeight) for w in ws):
        bases = einsums(specs, x, [w.base if isinstance(w, LoraWeight) else w for w in ws])
        return tuple(
            _adapted(spec, x, w, base) if isinstance(w, LoraWeight) else base
            for spec, w, base in zip(specs, ws, bases, strict=True)
        )
    if all(isinstance(w, PackedWeight) for w in ws) and len({_kind(w) for w in ws}) == 1:
        return _packed_einsums(specs, x, ws, x.dtype)
    return tuple(einsum(spec, x, w) for spec, w in zip(specs, ws, strict=True))


def _kind(w: PackedWeight) -> tuple:
    """What packed weights of one call have in common."""
    return w.bits, w.layer, w.activations, w.in_shape, cpu_tiles.group_of(w.tiles, w.bits)


def _adapted(spec: str, x: Array, w: LoraWeight, base: Array) -> Array:
    """Adds the low-rank correction to the product with the base weight."""
    lhs, rhs, result = _split(spec)
    inner = "".join(c for c in rhs if c not in result)
    outer = "".join(c for c in rhs if c in result)
    kept = "".join(c for c in lhs if c not in inner)
    low = jnp.einsum(f"{lhs},{inner}R->{kept}R", x, w.a.astype(x.dtype))
    delta = jnp.einsum(f"{kept}R,R{outer}->{result}", low, w.b.astype(x.dtype))
    return base + (delta * jnp.asarray(w.scale, x.dtype)).astype(base.dtype)


@jax.custom_vjp
def wide_matmul(x: Float[Array, "M D"], w: Float[Array, "D V"]) -> Float[Array, "M V"]:
    """Returns x w in at least float32; its backward products are made in the dtype of `x`.

    Left to itself the transpose of a widening product multiplies in float32, for which XLA holds a
    float32 copy of `w`: 1.4 GiB for InternLM2-7B's head.
    """
    return jnp.matmul(x, w, preferred_element_type=wide(x.dtype))


def _wide_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return wide_matmul(x, w), (x, w)


def _wide_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = kept
    g = g.astype(x.dtype)
    return g @ w.T, (x.T @ g).astype(w.dtype)


wide_matmul.defvjp(_wide_forward, _wide_backward)


def _contract(spec: str, x: Array, w: Array, matmul: Callable[[Array, Array], Array]) -> Array:
    """Multiplies as one plain matrix product.

    XLA's CPU backend takes nearly twice the time for the backward pass of a feed-forward block with
    the rows in two dims (2,048 x 576 x 1,536, float32, 2 cores: 224 ms, flat 126 ms).
    """
    lead, rows = _rows(spec, x)
    out = w.shape[x.ndim - len(lead) :]
    return matmul(rows, w.reshape(rows.shape[1], -1)).reshape(*lead, *out)


def _rows(spec: str, x: Array) -> tuple[tuple[int, ...], Array]:
    """Returns the dims that the product keeps, and x as rows of the contracted ones."""
    lhs, rhs, result = _split(spec)
    num_in = sum(c not in result for c in rhs)
    if lhs[-num_in:] != rhs[:num_in] or result != lhs[:-num_in] + rhs[num_in:]:
        raise ValueError(f"einsum {spec!r}: the input dims come last in x and first in w.")
    lead = x.shape[: x.ndim - num_in]
    return lead, x.reshape(math.prod(lead), -1)


def _split(spec: str) -> tuple[str, str, str]:
    operands, result = spec.split("->")
    lhs, rhs = operands.split(",")
    return lhs, rhs, result


def gather(w: Weight, dim: int, par: Parallel) -> Weight:
    """Gathers a layer's weight whose dim `dim` is cut over `par.fsdp` (ZeRO 3); else returns it.

    The result carries a name, so that a policy can forget it instead of keeping it for the backward
    pass.
    """
    if par.fsdp is None:
        return w
    if isinstance(w, Fp8Weight):
        return Fp8Weight(gather(w.base, dim, par))
    if not isinstance(w, Array):
        raise TypeError(f"ZeRO stage 3 gathers plain arrays, not {type(w).__name__}.")
    return checkpoint_name(lax.all_gather(w, par.fsdp, axis=dim, tiled=True), GATHERED)


def take(w: Weight, ids: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
    """Looks up rows of an embedding `[V, D]`; a packed one lies as its head, D inputs to V."""
    if isinstance(w, PackedWeight):
        return cpu_tiles.columns_of(w.tiles, ids, w.bits, jnp.float32).astype(dtype)
    return w[ids].astype(dtype)


def transposed(w: Weight) -> Weight:
    """Returns an embedding as the head it is where the two are tied."""
    return w if isinstance(w, PackedWeight) else w.T


def _packed_einsums(
    specs: Sequence[str], x: Array, ws: Sequence[PackedWeight], dtype
) -> tuple[Array, ...]:
    lead, rows = _rows(specs[0], x)
    stacks = [w.tiles[None] if w.layer is None else w.tiles for w in ws]
    outs = quant_matmuls(
        rows,
        stacks,
        ws[0].layer or 0,
        bits=ws[0].bits,
        columns=[math.prod(w.out_shape) for w in ws],
        activations=ws[0].activations,
    )
    return tuple(
        out.astype(dtype).reshape(*lead, *w.out_shape) for out, w in zip(outs, ws, strict=True)
    )


def _unpacked(w: PackedWeight, dtype) -> Array:
    """Expands `[*lead, *in_shape, *out_shape]`; one layer of a stack where it is one."""
    tiles = w.tiles if w.layer is None else w.tiles[w.layer]
    lead, flat = tiles.shape[:-3], tiles.reshape(-1, *tiles.shape[-3:])
    each = [cpu_tiles.dequantize(x, w.bits, dtype) for x in flat]
    out = jnp.stack(each)[..., : math.prod(w.out_shape)]
    return out.reshape(*lead, *w.in_shape, *w.out_shape)


def turned(w: QuantWeight | TurnedWeight) -> TurnedWeight:
    """Orders 4-bit integers for Hopper's tensor cores, once; every number stays as it was."""
    if isinstance(w, TurnedWeight):
        return w
    from internjax.kernels.gpu.quant_matmul import from_int4  # a second that only GPUs pay

    factors = (x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in (w.scales, w.zeros))
    return TurnedWeight(*from_int4(w.values, *factors), w.in_shape, w.out_shape)


def on_tensor_cores(x: Float[Array, "*B"], w: Weight) -> bool:
    """Whether Hopper's kernel multiplies x by 4-bit integers as they are; said in the log once."""
    legal = {"xla": None, "pallas": not_for_hopper() or _not_served(x, w)}
    best = "xla" if legal["pallas"] else "pallas"
    return choose("4-bit weights", None, legal, best=best) == "pallas"


def _not_served(x: Array, w: QuantWeight | TurnedWeight) -> str | None:
    from internjax.kernels.gpu.quant_matmul import why_not

    return why_not(x, as_matrix(jax.eval_shape(turned, w)))


def as_matrix(w: QuantWeight | TurnedWeight):
    """Returns a 4-bit weight as the GPU kernels take it, `quant_matmul.Matrix`."""
    from internjax.kernels.gpu.quant_matmul import Matrix

    w = turned(w)
    return Matrix(w.values, w.scales, w.zeros)


def _turned_einsum(spec: str, x: Array, w: QuantWeight | TurnedWeight) -> Array:
    from internjax.kernels.gpu.quant_matmul import quant_matmul

    lead, rows = _rows(spec, x)
    y = quant_matmul(rows, as_matrix(w), implementation="pallas")
    return y.reshape(*lead, *w.out_shape)


def _unturned(w: TurnedWeight, dtype) -> Array:
    from internjax.kernels.gpu.quant_matmul import expand

    *lead, _, _ = w.values.shape
    return expand(as_matrix(w), dtype).reshape(*lead, *w.in_shape, *w.out_shape)


def packed(w: Weight, activations: str, dtype) -> Weight:
    """Returns a weight as decoding on a CPU wants it: integers packed, adapters in `dtype`.

    4-bit integers in groups that the kernels do not serve are expanded, as plain arrays.
    """
    if isinstance(w, PackedWeight):
        return w.replace(activations=activations)
    if isinstance(w, QuantWeight):
        group = math.prod(w.in_shape) // w.scales.shape[-2]
        return plain(w, dtype) if group % cpu_tiles.LANES else pack(w, activations)
    if isinstance(w, LoraWeight):
        base = packed(w.base, activations, dtype)
        return w.replace(base=base, a=w.a.astype(dtype), b=w.b.astype(dtype))
    return w


def pack(w: QuantWeight, activations: str = "int8") -> PackedWeight:
    """Lays a 4-bit weight out for the CPU kernels; scales and offsets become float16.

    Raises:
      ValueError: the kernels do not serve the group size, or an offset is beyond float16.
    """
    lead, shape = w.values.shape[:-2], (-1, *w.values.shape[-2:])
    columns = w.values.shape[-1]
    values, scales, zeros = (np.asarray(x) for x in (w.values, w.scales, w.zeros))
    groups = scales.shape[-2]
    layers = []
    for codes, steps, zero in zip(
        values.reshape(shape),
        scales.reshape(-1, groups, columns).astype(np.float32),
        zeros.reshape(-1, groups, columns).astype(np.float32),
        strict=True,
    ):
        nibbles = np.stack([codes.T & 15, codes.T >> 4], axis=-1).reshape(columns, -1)
        layers.append(cpu_tiles.pack(nibbles, steps.T, (-zero * steps).T))
    tiles = jnp.asarray(np.stack(layers).reshape(*lead, *layers[0].shape))
    return PackedWeight(tiles, 4, w.in_shape, w.out_shape, None, activations)


def num_weights(w: Weight) -> int:
    """Counts the numbers that a weight stands for (adapters apart)."""
    if isinstance(w, LoraWeight):
        return num_weights(w.base)
    if isinstance(w, QuantWeight):
        return 2 * math.prod(w.values.shape)
    if isinstance(w, TurnedWeight):
        return math.prod(w.values.shape)
    if isinstance(w, PackedWeight):
        layers = w.tiles.shape[0] if w.tiles.ndim == 4 and w.layer is None else 1
        return layers * math.prod(w.in_shape) * math.prod(w.out_shape)
    return math.prod(w.shape)
