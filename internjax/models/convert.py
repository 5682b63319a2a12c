"""Any model format into any other: Hugging Face folder, GGUF file, our own folder.

Checkpoints of a pretraining are read as well, to be written as any of them.

`read_model` is what `load` uses; `convert` is `internjax convert SRC DST`.
"""

import dataclasses
from pathlib import Path
from typing import Any

from internjax.data.tokenizer import load_tokenizer
from internjax.errors import Missing, UserError
from internjax.models.config import FAMILIES, ModelConfig
from internjax.models.folders import carried_files
from internjax.models.gguf import load_gguf
from internjax.models.gguf_file import open_gguf
from internjax.models.hf import load_hf, read_hf_config, save_hf
from internjax.models.native import load_native, read_upstream, save_native
from internjax.models.safetensors_file import SHARD_BYTES
from internjax.models.trained import holds_checkpoints, load_trained
from internjax.tree import Params

FORMATS = ("hf", "gguf", "native")
DTYPES = ("float32", "float16", "bfloat16")
_LOADERS = {"hf": load_hf, "native": load_native}


def detect(path: str | Path) -> str:
    """Tells a model's format from its content: "hf", "gguf", "native" or "checkpoints".

    Raises: Missing when nothing is there, UserError when it is no model that we read.
    """
    if holds_checkpoints(path):
        return "checkpoints"
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        return "gguf"
    if (path / "model.json").is_file():
        return "native"
    if (path / "config.json").is_file():
        return "hf"
    if not path.exists():
        raise Missing(f"{path}: no such file or folder.")
    if (path / "model").is_dir():  # what `quantize` and `tune` write: the model and its card
        raise UserError(f"{path}: the model is the folder model/ in it; give {path / 'model'}.")
    raise UserError(
        f"{path}: is no model; legal are a .gguf file, a folder with config.json (Hugging Face),"
        " one with model.json (ours), or the checkpoints of a pretraining."
    )


def read_model(
    path: str | Path, *, dtype: Any = None, packed: bool = False
) -> tuple[ModelConfig, Params]:
    """Reads a model of any format into NumPy arrays; `dtype` None keeps what is stored.

    Args:
      packed: keeps the integers of a quantized GGUF file, see `load_gguf`.
    """
    path = model_path(path)
    if (source := detect(path)) == "checkpoints":
        raise UserError(
            f"{path}: checkpoints of a training have no tokenizer: make a model of them first, with"
            f" internjax convert {path} NEW tokenizer=MODEL."
        )
    if source == "gguf":
        return load_gguf(path, dtype, packed=packed)
    return _LOADERS[source](path, dtype)


def model_path(path: str | Path) -> Path:
    """Returns the GGUF inside a folder that holds one and no other model; else the path itself."""
    path = Path(path)
    inside = sorted(path.glob("*.gguf")) if path.is_dir() else []
    named = any((path / name).is_file() for name in ("config.json", "model.json"))
    if len(inside) > 1 and not named:
        raise UserError(f"{path}: holds {len(inside)} GGUF files; name one: {inside[0].name} ...")
    return inside[0] if inside and not named else path


def target_format(src_format: str, dst: str | Path) -> str:
    """The format that a target's name asks for: `.gguf`, else the folder that the source is not."""
    if Path(dst).suffix == ".gguf":
        return "gguf"
    return "native" if src_format == "hf" else "hf"


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str = "",
    dtype: str = "",
    quant: str = "",
    family: str = "",
    shard_bytes: int = SHARD_BYTES,
    tokenizer: str | Path | None = None,
    step: int | None = None,
) -> ModelConfig:
    """Converts a model; the target appears whole or not at all. Returns the model's config.

    Args:
      to: target format, one of `FORMATS`; "" lets the target's name decide (`target_format`).
      dtype: float32, float16 or bfloat16 for all weights; "" keeps what is stored.
      quant: of a GGUF, one of `gguf_export.QUANTS`; "" takes the plain one that holds the dtype.
        Of a Hugging Face folder with 4-bit weights, `hf_packed.METHODS`.
      family: layout of a Hugging Face folder: "llama" writes any InternLM so that transformers
        reads it without remote code; "" keeps the model's own.
      shard_bytes: upper bound of a safetensors shard.
      tokenizer: model or folder whose tokenizer goes along; None takes the source's own, which
        checkpoints of a training have not.
      step: of a folder of checkpoints; None takes the newest.

    Raises: Missing, Corrupt, UserError.
    """
    src = src if "://" in str(src) else model_path(src)
    source = detect(src)
    target = to or target_format(source, dst)
    legal = {"to": (target, FORMATS), "family": (family or FAMILIES[0], FAMILIES)}
    for name, (value, names) in (legal | {"dtype": (dtype or DTYPES[0], DTYPES)}).items():
        if value not in names:
            raise UserError(f"{name}={value!r}; legal are {', '.join(names)}.")
    if source == "checkpoints":
        model, params = load_trained(src, dtype or None, step=step)
    elif step is not None:
        raise UserError(f"{src}: has no steps: step= is for a folder of checkpoints.")
    else:
        model, params = read_model(src, dtype=dtype or None)
    words, kind = (src, source) if tokenizer is None else _spoken(tokenizer)
    if family:
        model = dataclasses.replace(model, family=family)
    if target == "gguf":
        _to_gguf(words, kind, dst, model, params, quant)
    else:
        save = {"hf": save_hf, "native": save_native}[target]
        more = {"quant": quant} if target == "hf" else {}
        if quant and not more:
            raise UserError(f"quant={quant!r}: a folder of ours keeps integers as they are.")
        upstream = _upstream(src, source)
        files = _tokenizer(words, kind)
        save(dst, model, params, files, shard_bytes=shard_bytes, upstream=upstream, **more)
    return model


def _spoken(tokenizer: str | Path) -> tuple[Path, str]:
    path = model_path(tokenizer)
    return path, "gguf" if path.suffix == ".gguf" else "folder"


def _to_gguf(src, source, dst, model: ModelConfig, params: Params, quant: str) -> None:
    from internjax.models.gguf_export import save_gguf
    from internjax.models.gguf_tokenizer import metadata_of

    if source == "gguf":
        metadata = {k: v for k, v in open_gguf(src).metadata.items() if k.startswith("tokenizer.")}
    else:
        metadata = metadata_of(src, model.vocab_size) if carried_files(src) else {}
    dtype = str(params["embed"].dtype)
    plain = {"float16": "f16", "bfloat16": "bf16"}.get(dtype, "f32")
    save_gguf(dst, model, params, metadata, quant=quant or plain)


def _tokenizer(src: Path, source: str) -> Any:
    if source == "checkpoints":
        return None
    if source != "gguf":
        return src
    has_tokenizer = "tokenizer.ggml.model" in open_gguf(src).metadata
    return load_tokenizer(src) if has_tokenizer else None


def _upstream(src: Path, source: str) -> dict[str, Any]:
    known = {"hf": read_hf_config, "native": read_upstream}
    return known[source](src) if source in known else {}
