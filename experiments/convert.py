"""Converts a model between Hugging Face folders, GGUF files and our own folders.

`internjax convert SRC DST`: SRC is a path or a catalogue name, DST a new file or folder. With
`layout=triton` DST is a Triton model repository that the model is added to.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import hydra
from omegaconf import DictConfig

from internjax.errors import UserError
from internjax.experiments.config import build
from internjax.models.convert import convert, detect, model_path
from internjax.models.load import resolve
from internjax.models.safetensors_file import SHARD_BYTES


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert and how; each key is explained in configs/convert.yaml."""

    src: str = ""
    dst: str = ""
    to: str = ""
    layout: str = ""
    dtype: str = ""
    quant: str = ""
    family: str = ""
    shard_bytes: int = SHARD_BYTES
    tokenizer: str = ""
    step: int | None = None


@hydra.main(config_path="../configs", config_name="convert", version_base=None)
def main(raw: DictConfig) -> None:
    """Converts one model and says what was written."""
    cfg = build(ConvertConfig, raw)
    if not cfg.src or not cfg.dst:
        raise UserError("convert needs SRC and DST: internjax convert model.gguf model-folder")
    if cfg.layout not in ("", "triton"):
        raise UserError(f"layout={cfg.layout!r}; legal are triton and nothing.")
    start = monotonic()
    src = cfg.src if "://" in cfg.src else resolve(cfg.src)
    print(
        f"{_add_to_triton(cfg, src) if cfg.layout else _plain(cfg, src, cfg.dst, cfg.to)},"
        f" {monotonic() - start:.1f} s"
    )


def _plain(cfg: ConvertConfig, src: str | Path, dst: str | Path, to: str) -> str:
    """Converts a model; returns what was written."""
    model = convert(
        src,
        dst,
        to=to,
        dtype=cfg.dtype,
        quant=cfg.quant,
        family=cfg.family,
        shard_bytes=cfg.shard_bytes,
        tokenizer=resolve(cfg.tokenizer) if cfg.tokenizer else None,
        step=cfg.step,
    )
    return f"{dst}: {detect(dst)} of {model.name} ({model.family}), {_size(Path(dst))}"


def _add_to_triton(cfg: ConvertConfig, src: str | Path) -> str:
    """Adds a model to a Triton repository; returns what was written.

    A GGUF file of which nothing else is asked stays as it is: converting would expand its integers.
    """
    from internjax.serve.grpc.repository import model_name, triton_model

    path = Path(cfg.src)
    name = model_name(cfg.src if not path.exists() else path.stem if path.is_file() else path.name)
    with triton_model(cfg.dst, name) as weights:
        source = detect(src if "://" in str(src) else model_path(src))
        to = cfg.to or (source if source in ("hf", "gguf") else "native")
        changes = cfg.dtype or cfg.quant or cfg.family or cfg.tokenizer or cfg.step is not None
        if source == to == "gguf" and not changes:
            weights.mkdir()
            shutil.copyfile(model_path(src), weights / f"{name}.gguf")
        elif to == "gguf":
            weights.mkdir()
            _plain(cfg, src, weights / f"{name}.gguf", to)
        else:
            _plain(cfg, src, weights, to)
    folder = Path(cfg.dst) / name
    return f"{folder}: Triton model {name} ({to}), {_size(folder)}"


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return f"{sum(p.stat().st_size for p in files) / 1e6:,.1f} MB in {len(files)} files"


if __name__ == "__main__":  # the same program as `internjax convert`
    from internjax.cli import run

    sys.exit(run(["convert", *sys.argv[1:]]))
