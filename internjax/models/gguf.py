"""GGUF models in and out: metadata <-> ModelConfig, tensors <-> our tree.

Files of ours carry one extra key, `internjax.config`: GGUF has no word for some of what a
ModelConfig says (dynamic rope, the family behind architecture "llama").
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from internjax.errors import Corrupt, UserError
from internjax.models import rope
from internjax.models.config import ModelConfig, RopeConfig
from internjax.models.gguf_file import GgufFile, open_gguf
from internjax.models.gguf_packed import read_packed
from internjax.models.layouts import gguf_layout, read_params, sources_of
from internjax.models.native import config_from_json
from internjax.tree import Params, flatten, unflatten

# architecture -> are the rows of q and k interleaved for the rotation?
ARCHITECTURES = {"llama": True, "internlm2": True, "qwen2": False, "qwen3": False}
OWN_KEY = "internjax.config"


def load_gguf(
    path: str | Path, dtype: Any = None, *, packed: bool = False
) -> tuple[ModelConfig, Params]:
    """Reads a GGUF model: quantized tensors are dequantized, q and k rows put back half-split.

    Args:
      dtype: of the returned NumPy arrays; None gives what the model had before its export where
        the file holds that without loss, else plain tensors as stored and float32 for the others.
      packed: keeps tensors of Q4_0, Q4_1 and Q8_0 as integers, for the CPU kernels.

    Raises: Missing, Corrupt; UserError for an architecture that the decoder does not have.
    """
    file = open_gguf(path)
    cfg = config_from_gguf(file)
    dtype = dtype or _own(file).get("stored_dtype")
    layout = gguf_layout(ARCHITECTURES[file.metadata["general.architecture"]])
    special = read_packed(file, layout, cfg) if packed else {}
    done = {name for e in layout if e.paths[0] in special for name in sources_of(e, cfg)}
    params = read_params(
        [e for e in layout if e.paths[0] not in special],
        cfg,
        file.tensors,
        file.read,
        where=str(path),
        dtype=None if dtype is None else np.dtype(dtype),
        ignore=lambda name: name in done or name == "rope_freqs.weight",  # read by _llama3
    )
    return cfg, unflatten(flatten(params) | special)


def config_from_gguf(file: GgufFile) -> ModelConfig:
    """Reads the model's shape from a GGUF header; biases and norms from the tensors there are."""
    arch = file.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UserError(
            f"{file.path}: architecture {arch!r}; legal are {', '.join(ARCHITECTURES)}."
        )
    try:
        if OWN_KEY in file.metadata:
            return config_from_json(_own(file)["config"], where=str(file.path))
        return _config(file, f"{arch}.")
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise Corrupt(f"{file.path}: metadata is damaged or lacks {error}.") from error


def _own(file: GgufFile) -> dict[str, Any]:
    """What our own exporter wrote beside GGUF's standard keys; {} in files of others."""
    return json.loads(file.metadata.get(OWN_KEY, "{}"))


def _config(file: GgufFile, prefix: str) -> ModelConfig:
    meta, names = file.metadata, file.tensors
    count = functools.partial(_count, meta, prefix)
    d_model, num_heads = count("embedding_length"), count("attention.head_count")
    cfg = ModelConfig(
        name=str(meta.get("general.name", file.path.stem)),
        family=_family(meta, names),
        num_layers=count("block_count"),
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=count("attention.head_count_kv", num_heads),
        head_dim=count("attention.key_length", d_model // num_heads),
        d_ff=count("feed_forward_length"),
        vocab_size=names["token_embd.weight"].shape[0],
        max_context=count("context_length"),
        norm_eps=_shortest(meta[prefix + "attention.layer_norm_rms_epsilon"]),
        rope=_rope(file, prefix),
        qkv_bias="blk.0.attn_q.bias" in names,
        output_bias="blk.0.attn_output.bias" in names,
        qk_norm="blk.0.attn_q_norm.weight" in names,
        tie_embeddings="output.weight" not in names,
    )
    if "rope_freqs.weight" in names:
        return dataclasses.replace(cfg, rope=_llama3(cfg, file))
    return cfg


def _count(meta: dict[str, Any], prefix: str, key: str, default: int | None = None) -> int:
    """Returns a whole number of the metadata, which a damaged type may have turned into another."""
    value = meta[prefix + key] if default is None else meta.get(prefix + key, default)
    if type(value) is not int:
        raise TypeError(f"a whole number at {prefix + key} (it is {value!r})")
    return value


def _family(meta, names) -> str:
    arch = meta["general.architecture"]
    if arch != "llama":
        return arch
    if "smollm2" in f"{meta.get('general.basename', '')} {meta.get('general.name', '')}".lower():
        return "smollm2"
    return "internlm" if "blk.0.attn_output.bias" in names else "llama"


def _rope(file: GgufFile, prefix: str) -> RopeConfig:
    meta = file.metadata
    kind = meta.get(prefix + "rope.scaling.type", "none")
    theta = _shortest(meta.get(prefix + "rope.freq_base", 10000.0))
    if kind == "none":
        return RopeConfig(theta=theta)
    if kind not in ("linear", "yarn"):
        raise UserError(f"{file.path}: rope scaling {kind!r}; legal are none, linear, yarn.")
    factor = _shortest(meta[prefix + "rope.scaling.factor"])
    context = _count(meta, prefix, "rope.scaling.original_context_length", 0)
    return RopeConfig(kind=kind, theta=theta, factor=factor, original_context=context)


def _llama3(cfg: ModelConfig, file: GgufFile) -> RopeConfig:
    """Finds Llama 3's scaling behind `rope_freqs.weight`, which holds only what it comes to.

    Published Llama 3.x models share the band limits 1 and 4 and the context 8192; the factor is
    the largest entry. Another rule than theirs is refused rather than approximated.
    """
    stretch = file.read("rope_freqs.weight").astype(np.float64)
    guess = dataclasses.replace(
        cfg.rope, kind="llama3", factor=_shortest(stretch.max()), original_context=8192
    )
    ours = rope_stretch(dataclasses.replace(cfg, rope=guess))
    if stretch.shape != ours.shape or not np.allclose(stretch, ours, rtol=1e-5):
        raise UserError(
            f"{file.path}: rope_freqs.weight follows no rule of the Llama 3 line; import the"
            " model from its Hugging Face folder."
        )
    return guess


def rope_stretch(cfg: ModelConfig) -> np.ndarray:
    """Returns by how much each of the [H/2] frequencies is slowed, as GGUF stores it."""
    plain = dataclasses.replace(cfg, rope=RopeConfig(theta=cfg.rope.theta))
    return rope.inv_freq(plain) / rope.inv_freq(cfg)


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: 1e-05, where the nearest double is 9.99999974e-06."""
    return float(str(np.float32(value)))
