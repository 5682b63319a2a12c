"""Round-to-nearest int4 of a parameter tree, group-wise along the contracted dims."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from internjax.adapt.lora import NUM_IN
from internjax.errors import UserError
from internjax.tree import Params
from internjax.weights import LoraWeight, QuantWeight, dequantize

STEPS = 15


@dataclass(frozen=True)
class QuantConfig:
    """How weights are rounded.

    Fields:
      group: weights that share a scale and a zero, along the contracted dims.
      targets: projections that are rounded; embedding, head and norms stay.
    """

    group: int = 32
    targets: tuple[str, ...] = tuple(NUM_IN)


def quantize_array(w: Float[Array, "*S"], num_in: int, group: int, *, lead: int = 0) -> QuantWeight:
    """Rounds `[*lead, *in, *out]` to 16 steps between the minimum and maximum of every group."""
    dims = w.shape[lead:]
    ins, outs = dims[:num_in], dims[num_in:]
    flat = w.reshape(*w.shape[:lead], _product(ins), _product(outs)).astype(jnp.float32)
    rows, columns = flat.shape[-2:]
    if rows % group or group % 2:
        raise UserError(
            f"group={group} does not cut the {rows} inputs of a weight {tuple(dims)} evenly (and"
            " must be even): choose a divisor, for example 32 or 64."
        )
    groups = flat.reshape(*flat.shape[:-2], rows // group, group, columns)
    low, high = groups.min(axis=-2), groups.max(axis=-2)
    scales = jnp.maximum((high - low) / STEPS, 1e-8)
    zeros = -low / scales
    steps = jnp.clip(jnp.round(groups / scales[..., None, :] + zeros[..., None, :]), 0, STEPS)
    steps = steps.astype(jnp.uint8).reshape(*flat.shape[:-2], rows // 2, 2, columns)
    values = steps[..., 0, :] | (steps[..., 1, :] << 4)
    return QuantWeight(values, scales, zeros, tuple(ins), tuple(outs))


def quantize(params: Params, cfg: QuantConfig) -> Params:
    """Returns the tree with `QuantWeight`s for the target projections of stacked layers."""
    layers = dict(params["layers"])
    for name in cfg.targets:
        if isinstance(layers[name], (LoraWeight, QuantWeight)):
            raise UserError(f"layers/{name} is no plain array: merge adapters before quantizing.")
        layers[name] = quantize_array(layers[name], NUM_IN[name], cfg.group, lead=1)
    return {**params, "layers": layers}


def expand(params: Params, dtype=jnp.float32) -> Params:
    """Returns the tree with every `QuantWeight` as a plain array of `dtype`."""

    def plain(w):
        return dequantize(w, dtype) if isinstance(w, QuantWeight) else w

    def over(layer: Params) -> Params:
        return {name: plain(w) for name, w in layer.items()}

    layers = params["layers"]
    layers = tuple(map(over, layers)) if isinstance(layers, tuple) else over(layers)
    return {**params, "layers": layers}


def _product(dims: tuple[int, ...]) -> int:
    total = 1
    for dim in dims:
        total *= dim
    return total
