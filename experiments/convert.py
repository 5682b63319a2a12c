"""Converts a model between Hugging Face folders, GGUF files and our own folders.

`internjax convert SRC DST`: SRC is a path or a catalogue name, DST a new file or folder.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import hydra
from omegaconf import DictConfig

from internjax.errors import UserError
from internjax.experiments.config import build
from internjax.models.convert import convert, detect
from internjax.models.load import resolve
from internjax.models.safetensors_file import SHARD_BYTES


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert and how; each key is explained in configs/convert.yaml."""

    src: str = ""
    dst: str = ""
    to: str = ""
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
    start = monotonic()
    model = convert(
        cfg.src if "://" in cfg.src else resolve(cfg.src),
        cfg.dst,
        to=cfg.to,
        dtype=cfg.dtype,
        quant=cfg.quant,
        family=cfg.family,
        shard_bytes=cfg.shard_bytes,
        tokenizer=resolve(cfg.tokenizer) if cfg.tokenizer else None,
        step=cfg.step,
    )
    dst = Path(cfg.dst)
    files = [dst] if dst.is_file() else [p for p in dst.iterdir() if p.is_file()]
    size_megabytes = sum(p.stat().st_size for p in files) / 1e6
    print(
        f"{dst}: {detect(dst)} of {model.name} ({model.family}),"
        f" {size_megabytes:,.1f} MB in {len(files)} files, {monotonic() - start:.1f} s"
    )


if __name__ == "__main__":  # the same program as `internjax convert`
    from internjax.cli import run

    sys.exit(run(["convert", *sys.argv[1:]]))
