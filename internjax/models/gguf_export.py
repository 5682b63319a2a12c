"""Writes GGUF files that llama.cpp and others read: F32, F16, BF16, Q8_0, Q4_1."""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from internjax.errors import UserError
from internjax.models.config import ModelConfig
from internjax.models.folders import whole
from internjax.models.gguf import ARCHITECTURES, OWN_KEY, rope_stretch
from internjax.models.gguf_blocks import BLOCKS, encode, num_bytes
from internjax.models.layouts import Tensor, checkpoint_tensors, gguf_layout
from internjax.tree import Params

# quant -> block format of matrices, of embedding and head, llama.cpp's number for such a file.
QUANTS = {
    "f32": ("F32", "F32", 0),
    "f16": ("F16", "F16", 1),
    "bf16": ("BF16", "BF16", 32),
    "q8_0": ("Q8_0", "Q8_0", 7),
    "q4_1": ("Q4_1", "Q8_0", 3),
}
_LOSSLESS = {"f32": ("float32", "float16", "bfloat16"), "f16": ("float16",), "bf16": ("bfloat16",)}
_ALIGNMENT = 32  # bytes; what a reader assumes where the header names none
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9  # types of metadata values


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
    meta = {"general.architecture": arch} | _metadata(cfg, arch, quant)
    meta |= {OWN_KEY: json.dumps(own)} | (tokenizer_metadata or {})
    with whole(path) as partial, partial.open("wb") as file:
        _write(file, meta, tensors, quant)


def architecture(cfg: ModelConfig) -> str:
    """Returns the GGUF architecture that computes what our decoder does for this model."""
    arch = cfg.family if cfg.family in ARCHITECTURES else "llama"
    if cfg.num_experts:
        raise UserError(
            f"{cfg.name} is a mixture of {cfg.num_experts} experts, which our GGUF writer does not"
            " know: keep it in our own folder."
        )
    if cfg.qk_norm != (arch == "qwen3"):
        raise UserError(f"qk_norm={cfg.qk_norm} does not fit GGUF's architecture {arch}.")
    return arch


def _metadata(cfg: ModelConfig, arch: str, quant: str) -> dict[str, Any]:
    general = {
        "general.name": cfg.name,
        "general.basename": cfg.family,
        "general.file_type": QUANTS[quant][2],
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


def _write(file: BinaryIO, meta: dict[str, Any], tensors: list[Tensor], quant: str) -> None:
    """Writes header and tensors; each is built, encoded and written before the next."""
    kinds = [_kind(t, quant) for t in tensors]
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(meta))]
    head += [_string(key) + _typed(value) for key, value in meta.items()]
    offset = 0
    for t, kind in zip(tensors, kinds, strict=True):
        dims = struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *t.shape[::-1])
        head.append(_string(t.name) + dims + struct.pack("<IQ", BLOCKS[kind].number, offset))
        offset += _padded(num_bytes(kind, t.shape))
    file.write(b"".join(head))
    file.write(bytes(_padded(file.tell()) - file.tell()))
    for t, kind in zip(tensors, kinds, strict=True):
        data = encode(kind, t.make())
        file.write(np.ascontiguousarray(data).view(np.uint8).data)
        file.write(bytes(_padded(data.nbytes) - data.nbytes))


def _kind(t: Tensor, quant: str) -> str:
    matrix, outer, _ = QUANTS[quant]
    if len(t.shape) == 1:
        return "F32"
    kind = outer if t.name in ("token_embd.weight", "output.weight") else matrix
    return "F16" if t.shape[-1] % BLOCKS[kind].values else kind


def _typed(value: bool | int | float | str | list) -> bytes:
    """A metadata value behind its type, in the types that readers expect of our keys."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    return struct.pack("<I", _ARRAY) + _items(value)


def _items(values: list) -> bytes:
    """An array behind the type of its items and their number: all text, all int or all float."""
    if not values or isinstance(values[0], str):
        kind, data = _STRING, b"".join(map(_string, values))
    elif isinstance(values[0], int):
        kind, data = _INT32, np.asarray(values, "<i4").tobytes()
    else:
        kind, data = _FLOAT32, np.asarray(values, "<f4").tobytes()
    return struct.pack("<IQ", kind, len(values)) + data


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
