"""LoRA as a transform of the parameter tree (arXiv:2106.09685).

`attach(base, adapter)` gives a tree that the model runs as any other; training differentiates the
adapter alone, so no optimizer state exists for the base. Composes with quantized bases (QLoRA).
"""

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from internjax.errors import UserError
from internjax.models.config import ModelConfig
from internjax.models.decoder import param_table
from internjax.tree import Params, flatten, unflatten
from internjax.weights import LoraWeight, QuantWeight, ScaledWeight, plain

# Input dims of every projection: what the einsum in the decoder contracts.
NUM_IN = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "w_gate": 1, "w_up": 1, "w_down": 1}


@dataclass(frozen=True)
class LoraConfig:
    """Shape of an adapter.

    Fields:
      rank: R of the correction; alpha: its strength, the correction is scaled by alpha / rank.
      targets: names of the projections that carry one.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = tuple(NUM_IN)

    def __post_init__(self):
        unknown = set(self.targets) - set(NUM_IN)
        if unknown or not self.targets:
            raise UserError(
                f"lora.targets={list(self.targets)}: legal names are {', '.join(NUM_IN)}."
            )
        if self.rank < 1:
            raise UserError(f"lora.rank={self.rank}: an adapter has at least rank 1.")


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


def check_targets(targets: Iterable[str], found: Collection[str], what: str) -> None:
    """Refuses projections that a model lacks: not every mixture of experts has a dense block."""
    if missing := [name for name in targets if name not in found]:
        legal = ", ".join(name for name in NUM_IN if name in found)
        raise UserError(f"targets={','.join(missing)}: {what} has none; legal are {legal}.")


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


# PEFT names of the projections, Hugging Face's Llama layout.
_PEFT = {
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj",
    "w_down": "mlp.down_proj",
}


def to_peft(adapter: Params, lora: LoraConfig, base_name: str) -> tuple[dict[str, Array], dict]:
    """Converts to the tensors and the config of a PEFT LoRA folder (Llama-style names).

    lora_A is `[R, in]` and lora_B `[out, R]`, as `torch.nn.Linear` stores them.
    """
    tensors = {}
    for name, ab in adapter["layers"].items():
        L, R = ab["a"].shape[0], ab["a"].shape[-1]
        a = ab["a"].reshape(L, -1, R).swapaxes(1, 2)
        b = ab["b"].reshape(L, R, -1).swapaxes(1, 2)
        for layer in range(L):
            stem = f"base_model.model.model.layers.{layer}.{_PEFT[name]}"
            tensors[f"{stem}.lora_A.weight"] = a[layer]
            tensors[f"{stem}.lora_B.weight"] = b[layer]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": [_PEFT[name].split(".")[1] for name in adapter["layers"]],
    }
    return tensors, config


def from_peft(tensors: dict[str, Any], config: dict, cfg: ModelConfig) -> tuple[Params, LoraConfig]:
    """Inverse of `to_peft`; refuses tensors it does not know."""
    names = {v: k for k, v in _PEFT.items()}
    table, found = param_table(cfg), {}
    pattern = re.compile(r"(?:base_model\.model\.)?model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight")
    for key, tensor in tensors.items():
        match = pattern.fullmatch(key)
        if match is None or match[2] not in names:
            raise UserError(f"adapter tensor {key!r} is no LoRA of a known projection.")
        found.setdefault(names[match[2]], {}).setdefault(match[3], {})[int(match[1])] = tensor
    adapter = {}
    for name, parts in found.items():
        L, *dims = table[f"layers/{name}"].shape
        missing = [f"{ab}{i}" for ab in "AB" for i in range(L) if i not in parts.get(ab, {})]
        if missing:
            raise UserError(f"adapter of {name} lacks {', '.join(missing)}.")
        a = jnp.stack([jnp.asarray(parts["A"][i]).T for i in range(L)])
        b = jnp.stack([jnp.asarray(parts["B"][i]).T for i in range(L)])
        ins, outs = dims[: NUM_IN[name]], dims[NUM_IN[name] :]
        rank = a.shape[-1]
        adapter[name] = {"a": a.reshape(L, *ins, rank), "b": b.reshape(L, rank, *outs)}
    lora = LoraConfig(int(config["r"]), float(config["lora_alpha"]), tuple(adapter))
    return {"layers": adapter}, lora
