"""Hugging Face checkpoint folders in and out: safetensors, `config.json`, tokenizer files."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from internjax.data.tokenizer import load_tokenizer
from internjax.errors import Missing, UserError
from internjax.models.config import ModelConfig
from internjax.models.folders import save_tokenizer, whole
from internjax.models.hf_config import LAYOUTS, config_from_hf, config_to_hf
from internjax.models.hf_packed import (
    config_of,
    is_part,
    packed_tensors,
    packing_of,
    read_packed,
)
from internjax.models.layouts import Tensor, checkpoint_tensors, read_params
from internjax.models.safetensors_file import (
    SHARD_BYTES,
    open_tensors,
    read_json,
    write_tensors,
)
from internjax.tree import Params, flatten, stack_layers, unflatten
from internjax.weights import QuantWeight


def load_hf(path: str | Path, dtype: Any = None) -> tuple[ModelConfig, Params]:
    """Reads a checkpoint folder into our tree of NumPy arrays, one tensor at a time.

    4-bit weights of AWQ and GPTQ checkpoints stay the integers that they are.

    Args:
      dtype: of every plain leaf; None keeps what is stored.

    Raises: Missing, Corrupt; UserError for an unknown family, another quantization or pickled
      weights.
    """
    folder = Path(path)
    raw = read_hf_config(folder)
    if _only_pickle(folder):
        raise UserError(
            f"{folder}: holds pickled weights (.bin) only, and unpickling runs any code in them;"
            " save them as safetensors first."
        )
    packing = packing_of(raw, str(folder))
    tensors = open_tensors(folder, "model")
    cfg = config_from_hf(raw, tensors, where=str(folder))
    layout, read = LAYOUTS[cfg.family], lambda name: tensors[name].read()
    special = read_packed(layout, cfg, tensors, read, packing, str(folder)) if packing else {}
    stems = {e.source for e in layout if e.paths[0] in special}
    params = read_params(
        [entry for entry in layout if entry.source not in stems],
        cfg,
        tensors,
        read,
        where=str(folder),
        dtype=None if dtype is None else np.dtype(dtype),
        ignore=lambda name: _derived(name, cfg) or (bool(special) and _packed_of(name, stems)),
    )
    return cfg, unflatten(flatten(params) | special)


def save_hf(
    path: str | Path,
    cfg: ModelConfig,
    params: Params,
    tokenizer: Any = None,
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
    upstream: dict[str, Any] | None = None,
    quant: str = "",
) -> None:
    """Writes a checkpoint folder in the layout of `cfg.family`, whole or not at all.

    With `dataclasses.replace(cfg, family="llama")` any InternLM becomes a Llama checkpoint, which
    transformers reads without remote code.

    Args:
      tokenizer: folder whose tokenizer files are copied byte for byte, or a Tokenizer to save.
      dtype: of every tensor; None keeps that of the leaves.
      shard_bytes: upper bound of a shard; one file when all fits.
      upstream: `config.json` that the model came with; keys that we do not know are kept.
      quant: layout of 4-bit weights, awq or gptq.

    Raises: UserError when the family cannot hold the model, or the folder is there already.
    """
    dtype = None if dtype is None else np.dtype(dtype)
    layout, leaves = LAYOUTS[cfg.family], flatten(stack_layers(params))
    integers = {path: w for path, w in leaves.items() if isinstance(w, QuantWeight)}
    if bool(integers) != bool(quant):
        raise UserError(
            "the model has 4-bit weights: say how a checkpoint shall hold them, quant=awq or gptq."
            if integers
            else f"quant={quant!r}: the model has no 4-bit weights; internjax quantize makes them."
        )
    rest = [entry for entry in layout if not set(entry.paths) & set(integers)]
    tensors = checkpoint_tensors(rest, cfg, params, dtype)
    raw = _merge(upstream or {}, config_to_hf(cfg, _main_dtype(tensors)))
    raw.pop("quantization_config", None)
    if integers:
        more, packing = packed_tensors(layout, cfg, integers, quant)
        tensors, raw["quantization_config"] = tensors + more, config_of(packing)
    with whole(path) as folder:
        folder.mkdir()
        save_tokenizer(tokenizer, folder)
        raw = _token_ids(folder) | raw
        write_tensors(folder, "model", tensors, shard_bytes)
        text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Parses `config.json` of a checkpoint folder."""
    if not (folder / "config.json").is_file():
        raise Missing(f"{folder}: has no config.json, so it is no checkpoint folder.")
    return read_json(folder / "config.json")


def _merge(upstream: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Keeps upstream's other keys when the family stayed; ours win, stale rope forms go."""
    if upstream.get("model_type") != ours["model_type"]:
        return ours
    stale = {"rope_parameters", "dtype", "rotary"}
    return {k: v for k, v in upstream.items() if k not in stale} | ours


def _token_ids(folder: Path) -> dict[str, Any]:
    """Returns the ids that `config.json` repeats of the tokenizer; generation defaults beside it.

    A checkpoint without generation_config.json gets one, so that its chat ends where it should.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return {}
    tokenizer = load_tokenizer(folder)
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    generation = folder / "generation_config.json"
    if not generation.is_file():
        text = json.dumps(ids | {"eos_token_id": list(tokenizer.eos_ids)}, indent=2) + "\n"
        generation.write_text(text, encoding="utf-8")
    return ids | {"eos_token_id": tokenizer.eos_id}


def _main_dtype(tensors: list[Tensor]) -> np.dtype:
    sizes: Counter[np.dtype] = Counter()
    for t in tensors:
        sizes[t.dtype] += int(np.prod(t.shape, dtype=np.int64))
    return sizes.most_common(1)[0][0]


def _derived(name: str, cfg: ModelConfig) -> bool:
    """Tensors that older exporters wrote although they follow from the others."""
    tied_head = cfg.tie_embeddings and name in ("lm_head.weight", "output.weight")
    return tied_head or name.endswith("rotary_emb.inv_freq")


def _packed_of(name: str, stems: set[str]) -> bool:
    """Whether a tensor is a part of a quantized matrix that was read already."""
    place = re.sub(r"\.\d+\.", ".{i}.", name.rpartition(".")[0], count=1)
    return is_part(name) and f"{place}.weight" in stems


def _only_pickle(folder: Path) -> bool:
    return any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))
