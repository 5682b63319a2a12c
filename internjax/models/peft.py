"""LoRA adapters: what they correct, and their folders in the layout of PEFT.

https://github.com/huggingface/peft: adapter_config.json and adapter_model.safetensors.
"""

import json
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors.numpy import save_file

from internjax.errors import Missing, UserError
from internjax.models.config import ModelConfig
from internjax.models.decoder import param_table
from internjax.models.safetensors_file import read_header, read_json
from internjax.tree import Params

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


def check_targets(targets: Iterable[str], found: Collection[str], what: str) -> None:
    """Refuses projections that a model lacks: not every mixture of experts has a dense block."""
    if missing := [name for name in targets if name not in found]:
        legal = ", ".join(name for name in NUM_IN if name in found)
        raise UserError(f"targets={','.join(missing)}: {what} has none; legal are {legal}.")


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
    """Inverse of `to_peft`.

    Raises:
      UserError: tensors that it does not know, that are missing, or that do not fit the model;
        kinds of adapters that would be computed in another way.
    """
    names = {v: k for k, v in _PEFT.items()}
    table, found = param_table(cfg), {}
    rank, alpha = _strength(config)
    pattern = re.compile(r"(?:base_model\.model\.)?model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight")
    for key, tensor in tensors.items():
        match = pattern.fullmatch(key)
        if match is None or match[2] not in names:
            raise UserError(f"adapter tensor {key!r} is no LoRA of a known projection.")
        found.setdefault(names[match[2]], {})[match[3] + match[1]] = tensor
    check_targets(found, [path.removeprefix("layers/") for path in table], cfg.name)
    adapter = {}
    for name, parts in found.items():
        L, *dims = table[f"layers/{name}"].shape
        ins, outs = dims[: NUM_IN[name]], dims[NUM_IN[name] :]
        shapes = {"A": (rank, math.prod(ins)), "B": (math.prod(outs), rank)}
        a, b = (_stacked(name, parts, ab, L, shapes[ab]) for ab in "AB")
        adapter[name] = {"a": a.reshape(L, *ins, rank), "b": b.reshape(L, rank, *outs)}
        if beyond := set(parts) - {f"{ab}{i}" for ab in "AB" for i in range(L)}:
            raise UserError(f"adapter of {name} has {', '.join(sorted(beyond))}: {L} layers exist.")
    return {"layers": adapter}, LoraConfig(rank, alpha, tuple(adapter))


def _strength(config: dict) -> tuple[int, float]:
    """Returns rank and alpha; refuses what a plain low-rank correction is not."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"adapter peft_type={config.get('peft_type')!r}: legal is LORA.")
    plain = {"bias": "none", "use_dora": False, "fan_in_fan_out": False}
    plain |= {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
    for key, value in plain.items():
        if config.get(key, value) not in (value, None):
            raise UserError(f"adapter {key}={config[key]!r}: only {value!r} is computed here.")
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError("adapter: its config gives no numbers for r and lora_alpha.") from error
    if rank < 1:
        raise UserError(f"adapter r={rank}: it must be at least 1.")
    # Rank-stabilized adapters are scaled by alpha / sqrt(rank) (arXiv:2312.03732).
    return rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _stacked(name: str, parts: dict[str, Any], ab: str, layers: int, shape: tuple) -> Array:
    """Returns one factor of all layers `[L, *shape reversed]`."""
    if missing := [f"{ab}{i}" for i in range(layers) if f"{ab}{i}" not in parts]:
        raise UserError(f"adapter of {name} lacks {', '.join(missing)}.")
    for i in range(layers):
        if (given := tuple(parts[f"{ab}{i}"].shape)) != shape:
            raise UserError(
                f"adapter of {name}: lora_{ab} of layer {i} is {list(given)}, but rank and model "
                f"want {list(shape)}."
            )
    return jnp.stack([jnp.asarray(parts[f"{ab}{i}"]).T for i in range(layers)])


def save_adapter(folder: Path, adapter: Params, lora: LoraConfig, base_name: str) -> None:
    """Writes a PEFT folder: adapter_model.safetensors and adapter_config.json."""
    tensors, config = to_peft(adapter, lora, base_name)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(arrays, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def load_adapter(folder: Path, cfg: ModelConfig) -> tuple[Params, LoraConfig]:
    """Reads a PEFT folder.

    Raises:
      Missing: no such folder. Corrupt: its files cannot be read.
      UserError: the adapter does not fit the model.
    """
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config, weights):
        if not path.is_file():
            raise Missing(f"{path}: not there, so {folder} is no PEFT adapter.")
    settings, stored = read_json(config), read_header(weights)
    return from_peft({name: tensor.read() for name, tensor in stored.items()}, settings, cfg)
