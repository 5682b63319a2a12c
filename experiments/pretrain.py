"""Trains a model on token shards, from its weights or from random ones, on one device or a mesh.

Reads the shards that `internjax data run` made; writes model/ (the trained model), steps.jsonl
(one line an update), report.html and card.json into `out`. The same command goes on where it was
stopped.
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from omegaconf import DictConfig

from internjax.chain.pretraining import PretrainConfig, pretrain
from internjax.chain.verbs import produce_at, write_training_page
from internjax.data.shards import TokenShards
from internjax.errors import UserError
from internjax.experiments.compilation_cache import enable_compilation_cache
from internjax.experiments.config import build, part
from internjax.mesh import MeshConfig
from internjax.models.config import ModelConfig
from internjax.models.convert import model_path
from internjax.models.load import load, random_model, resolve
from internjax.models.native import save_native


@dataclass(frozen=True)
class PretrainRun(PretrainConfig):
    """A training and where its things are; each key is explained in configs/pretrain.yaml."""

    model: str = ""
    arch: ModelConfig | None = None
    tokenizer: str = ""
    shards: str = ""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    out: str = ""
    runs: str = "runs"

    def __post_init__(self):
        super().__post_init__()
        if bool(self.model) == bool(self.arch):
            raise UserError(
                "pretrain takes either a model to go on with or an arch= to start from."
            )
        if bool(self.arch) != bool(self.tokenizer):
            raise UserError("arch= needs tokenizer=, the one of the shards; a model has its own.")


@hydra.main(config_path="../configs", config_name="pretrain", version_base=None)
def main(raw: DictConfig) -> None:
    """Trains and says how held-out bits per byte changed."""
    cfg = build(PretrainRun, raw)
    enable_compilation_cache()
    start = model_path(resolve(cfg.tokenizer if cfg.arch else cfg.model))
    shards = {name: Path(cfg.shards) / name for name in ("train", "heldout")}
    for path in shards.values():
        TokenShards(path)  # what is missing is said before any work is done
    settings = part(PretrainConfig, cfg)

    def make(folder: Path, scratch: Path) -> dict:
        model = random_model(cfg.arch, start, cfg.seed) if cfg.arch else load(cfg.model)
        train, heldout = (
            TokenShards(shards[n], tokenizer_hash=model.tokenizer.hash) for n in shards
        )
        trained, metrics = pretrain(model, train, heldout, settings, scratch, mesh=cfg.mesh)
        save_native(folder / "model", trained.cfg, trained.params, model.tokenizer)
        shutil.copyfile(scratch / "steps.jsonl", folder / "steps.jsonl")
        write_training_page(folder / "report.html", f"Pretraining of {model.cfg.name}", metrics)
        return metrics

    done = produce_at(
        cfg.out,
        cfg.runs,
        "pretrain",
        config={"settings": settings, "arch": cfg.arch},
        inputs={"tokenizer" if cfg.arch else "model": start} | shards,
        make=make,
    )
    before, after = (done.metrics[f"heldout_bits_per_byte_{when}"] for when in ("before", "after"))
    print(f"{done.path}: held-out bits per byte {before:.4f} -> {after:.4f}")


if __name__ == "__main__":  # the same program as `internjax pretrain`
    from internjax.cli import run

    sys.exit(run(["pretrain", *sys.argv[1:]]))
