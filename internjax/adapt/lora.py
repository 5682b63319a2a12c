"""LoRA as a transform of the parameter tree (arXiv:2106.09685).

`attach(base, adapter)` gives a tree that the model runs as any other; training differentiates the
adapter alone, so no optimizer state exists for the base. Composes with quantized bases (QLoRA).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from internjax.models.config import ModelConfig
from internjax.models.decoder import param_table
from internjax.models.peft import NUM_IN, LoraConfig, check_targets
from internjax.tree import Params, flatten, unflatten
from internjax.weights import LoraWeight, QuantWeight, ScaledWeight, plain


def init_adapter(cfg: ModelConfig, lora: LoraConfig, key: Array, dtype=jnp.float32) -> Params:
    """Draws an adapter that changes nothing yet: a ~ U(+-1/sqrt(in)), b = 0.

    Returns: `{"layers": {name: {"a": [L, *in, R], "b": [L, R, *out]}}}`.
    """
    table, adapter = param_table(cfg), {}
    check_targets(lora.targets, [path.removeprefix("layers/") for path in table], cfg.name)
    for i, name in enumerate(lora.targets):
        L, *dims = table[f"layers/{name}"].shape
        ins, outs = dims[: NUM_IN[name]], dims[NUM_IN[name] :]
        bound = 1.0 / math.sqrt(math.prod(ins))
        a = jax.random.uniform(
            jax.random.fold_in(key, i), (L, *ins, lora.rank), dtype, -bound, bound
        )
        adapter[name] = {"a": a, "b": jnp.zeros((L, lora.rank, *outs), dtype)}
    return {"layers": adapter}


def attach(base: Params, adapter: Params, lora: LoraConfig) -> Params:
    """Returns the base tree with `LoraWeight`s where the adapter has a correction."""
    scale = lora.alpha / lora.rank
    layers = dict(base["layers"])
    for name, ab in adapter["layers"].items():
        layers[name] = LoraWeight(layers[name], ab["a"], ab["b"], scale)
    return {**base, "layers": layers}


def merge(params: Params) -> Params:
    """Folds every adapter into its base weight; a quantized base comes out as a plain array."""

    def fold(w):
        if not isinstance(w, LoraWeight):
            return w
        base = w.base
        while isinstance(base, LoraWeight):
            base = base.base
        dtype = w.a.dtype if isinstance(base, (QuantWeight, ScaledWeight)) else base.dtype
        return plain(w, jnp.promote_types(dtype, w.a.dtype)).astype(dtype)

    return unflatten({path: fold(w) for path, w in flatten(params).items()})
