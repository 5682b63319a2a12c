"""The tree that decoding wants: packed, turned or expanded weights, a dict a layer."""

import logging

import jax
import jax.numpy as jnp
import numpy as np

from internjax.kernels.cpu.library import available
from internjax.kernels.platform import not_for_hopper, target
from internjax.models.peft import NUM_IN
from internjax.serve.config import EngineConfig
from internjax.tree import Params, unstack_layers
from internjax.weights import (
    PACKED,
    QuantWeight,
    fits_kernels,
    pack_embedding,
    pack_floats,
    packed,
    plain,
    stands_alone,
    turned,
)

log = logging.getLogger(__name__)


def prepare_params(params: Params, config: EngineConfig, dtype: str) -> Params:
    """Returns the tree that decoding wants, its weights packed or expanded as `config` says.

    Layers become one dict each; packed weights stay one stack that the dicts share.
    """
    how = config.weights
    if how == "auto" and config.tensor > 1:  # no kernel runs there, see `tensor.py`
        how = "expand"
    if how == "auto" and target().platform == "cpu":
        how = "pack" if available() else "expand"
    if how == "auto" and not_for_hopper() is None:
        how = "turn"
    if how == "expand":
        special = [x for x in jax.tree.leaves(params, is_leaf=_is_weight) if _is_weight(x)]
        if special:
            log.info("expanding %d packed or adapted weights to %s", len(special), dtype)
        expand = lambda x: plain(x, jnp.dtype(dtype)) if _is_weight(x) else x  # noqa: E731
        lies_as_head = isinstance(params["embed"], PACKED)  # see `weights.take`
        params = jax.tree.map(expand, params, is_leaf=_is_weight)
        if lies_as_head:
            params = {**params, "embed": params["embed"].T}
    elif how == "pack":
        fit = lambda x: packed(x, config.activations, dtype) if _is_weight(x) else x  # noqa: E731
        params = jax.tree.map(fit, params, is_leaf=_is_weight)
        params = _floats_beside(params, asked=config.weights == "pack")
    elif how == "turn":
        integers = lambda x: isinstance(x, QuantWeight)  # noqa: E731
        turn = jax.jit(turned)  # in passing: the nibbles by themselves are four times as much
        fit = lambda x: turn(x) if integers(x) else x  # noqa: E731
        params = jax.tree.map(fit, params, is_leaf=integers)
    return unstack_layers(params)


def _is_weight(x) -> bool:
    return not isinstance(x, (dict, tuple, jax.Array, np.ndarray))


def _floats_beside(params: Params, asked: bool) -> Params:
    """Packs the arrays that are multiplied beside packed weights, so that all rows stand alone.

    Without packed weights there, arrays of 16 bits are packed too: XLA computes with those at less
    than half the speed in steps of a few rows, and hardly faster in prompts. Of float32 it
    multiplies long prompts a third faster than the kernels, which fuse no product with a sum: such
    a tree is packed where that is `asked` for. Experts have no such kernel and stay as they are.
    """
    products = _products(params)
    narrow = all(fits_kernels(x) and x.dtype.itemsize == 2 for x in products)
    stacked = isinstance(params["layers"], dict)
    layers = (params["layers"],) if stacked else params["layers"]
    if "router" in layers[0] or not (asked or narrow or any(map(stands_alone, products))):
        return params
    own = lambda name, x: _floats(name, x, int(stacked))  # noqa: E731
    layers = tuple({name: own(name, x) for name, x in layer.items()} for layer in layers)
    edges = {name: _floats(name, params[name], 0) for name in ("embed", "head") if name in params}
    return {**params, **edges, "layers": layers[0] if stacked else layers}


def _floats(name: str, w, lead: int):
    if not fits_kernels(w) or name not in {*NUM_IN, "embed", "head"}:
        return w
    return pack_embedding(w) if name == "embed" else pack_floats(w, NUM_IN.get(name, 1), lead=lead)


def rows_stand_alone(params: Params) -> bool:
    """Whether no bit of a row depends on the number of rows.

    The CPU kernels see to it for products. XLA's sums over fewer than 512 numbers (those of a norm)
    are made in another order for some numbers of rows (seen with 32 to 320, jaxlib 0.12.0.1, not
    with 512 to 6,144).
    """
    alone = all(map(stands_alone, _products(params)))
    return alone and params["final_norm"].shape[-1] >= 512


def _products(params: Params) -> list:
    """Lists what activations are multiplied with, of stacked layers or of single ones."""
    stacked = isinstance(params["layers"], dict)
    layers = (params["layers"],) if stacked else params["layers"]
    products = [v for layer in layers for k, v in layer.items() if _multiplies(k)]
    return products + [params[name] for name in ("embed", "head") if name in params]


def _multiplies(name: str) -> bool:
    return name.startswith("w") or "expert" in name or "router" in name
