"""Writes GGUF files that llama.cpp and others read: F32, F16, BF16, Q8_0, Q4_1."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize

from internjax.errors import UserError
from internjax.models.config import ModelConfig
from internjax.models.folders import whole
from internjax.models.gguf import ARCHITECTURES, OWN_KEY, rope_stretch
from internjax.models.layouts import Tensor, checkpoint_tensors, gguf_layout
from internjax.tree import Params

# quant -> block format of matrices, of embedding and head, the file's type in its header.
QUANTS = {
    "f32": ("F32", "F32", LlamaFileType.ALL_F32),
    "f16": ("F16", "F16", LlamaFileType.MOSTLY_F16),
    "bf16": ("BF16", "BF16", LlamaFileType.MOSTLY_BF16),
    "q8_0": ("Q8_0", "Q8_0", LlamaFileType.MOSTLY_Q8_0),
    "q4_1": ("Q4_1", "Q8_0", LlamaFileType.MOSTLY_Q4_1),
}
_LOSSLESS = {"f32": ("float32", "float16", "bfloat16"), "f16": ("float16",), "bf16": ("bfloat16",)}
_BLOCK = 32
_TINY = 1e-30


def save_gguf(
    path: str | Path,
    cfg: ModelConfig,
    params: Params,
    tokenizer_metadata: dict[str, Any] | None = None,
    *,
    quant: str = "f16",
) -> None:
    """Writes a GGUF file, whole or not at all.

    Vectors stay F32, as every reader expects; matrices whose rows are no multiple of 32 are F16
    in a quantized file.

    Args:
      tokenizer_metadata: `tokenizer.*` keys (see `gguf_tokenizer.metadata_of`).
      quant: one of `QUANTS`.

    Raises: UserError for an unknown quant, or a model that the architecture cannot hold.
    """
    if quant not in QUANTS:
        raise UserError(f"quant={quant!r}; legal are {', '.join(QUANTS)}.")
    arch = architecture(cfg)
    tensors = checkpoint_tensors(gguf_layout(ARCHITECTURES[arch]), cfg, params)
    stored = {str(t.dtype) for t in tensors}
    keep = stored.pop() if len(stored) == 1 else None
    own = {"config": dataclasses.asdict(cfg)}
    if keep in _LOSSLESS.get(quant, ()):
        own["stored_dtype"] = keep
    if cfg.rope.kind == "llama3":
        freqs = rope_stretch(cfg).astype(np.float32)
        tensors.append(Tensor("rope_freqs.weight", freqs.shape, freqs.dtype, lambda: freqs))
    with whole(path) as partial:
        writer = GGUFWriter(partial, arch)
        meta = _metadata(cfg, arch, quant) | {OWN_KEY: json.dumps(own)}
        for key, value in (meta | (tokenizer_metadata or {})).items():
            _add(writer, key, value)
        try:
            _write(writer, tensors, quant)
        finally:
            writer.close()


def architecture(cfg: ModelConfig) -> str:
    """Returns the GGUF architecture that computes what our decoder does for this model."""
    arch = cfg.family if cfg.family in ARCHITECTURES else "llama"
    if cfg.qk_norm != (arch == "qwen3"):
        raise UserError(f"qk_norm={cfg.qk_norm} does not fit GGUF's architecture {arch}.")
    return arch


def _metadata(cfg: ModelConfig, arch: str, quant: str) -> dict[str, Any]:
    general = {
        "general.name": cfg.name,
        "general.basename": cfg.family,
        "general.file_type": int(QUANTS[quant][2]),
        "general.quantization_version": 2,
    }
    shape = {
        "block_count": cfg.num_layers,
        "context_length": cfg.max_context,
        "embedding_length": cfg.d_model,
        "feed_forward_length": cfg.d_ff,
        "attention.head_count": cfg.num_heads,
        "attention.head_count_kv": cfg.num_kv_heads,
        "attention.key_length": cfg.head_dim,
        "attention.value_length": cfg.head_dim,
        "attention.layer_norm_rms_epsilon": cfg.norm_eps,
        "rope.dimension_count": cfg.head_dim,
        "rope.freq_base": cfg.rope.theta,
        "vocab_size": cfg.vocab_size,
    }
    if cfg.rope.kind in ("linear", "yarn"):
        shape |= {"rope.scaling.type": cfg.rope.kind, "rope.scaling.factor": cfg.rope.factor}
    if cfg.rope.kind == "yarn":
        context = cfg.rope.original_context or cfg.max_context
        shape["rope.scaling.original_context_length"] = context
    return general | {f"{arch}.{key}": value for key, value in shape.items()}


def _add(writer: GGUFWriter, key: str, value: bool | int | float | str | list) -> None:
    """Adds one key in the type that readers expect of it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _write(writer: GGUFWriter, tensors: list[Tensor], quant: str) -> None:
    """Writes header and tensors; each is built, encoded and written before the next."""
    kinds = [_kind(t, quant) for t in tensors]
    for t, kind in zip(tensors, kinds, strict=True):
        num_bytes = int(np.prod(quant_shape_to_byte_shape(t.shape, kind), dtype=np.int64))
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), num_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t, kind in zip(tensors, kinds, strict=True):
        writer.write_tensor_data(_encode(t.make(), kind))


def _kind(t: Tensor, quant: str) -> GGMLQuantizationType:
    matrix, outer, _ = QUANTS[quant]
    if len(t.shape) == 1:
        return GGMLQuantizationType.F32
    name = outer if t.name in ("token_embd.weight", "output.weight") else matrix
    if name.startswith("Q") and t.shape[-1] % _BLOCK:
        name = "F16"
    return GGMLQuantizationType[name]


def _encode(x: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    if kind == GGMLQuantizationType.F16:
        return x.astype(np.float16)
    x = x.astype(np.float32)
    if kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1):
        # Far below float16's smallest step, yet 1 / step would overflow in the encoder.
        x = np.where(np.abs(x) < _TINY, np.float32(0), x)
    return quantize(np.ascontiguousarray(x), kind)
