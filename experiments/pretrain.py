"""Trains a model on token shards, from its weights or from random ones, on one device or a mesh.

Reads the shards that `internjax data run` made; writes model/ (the trained model), steps.jsonl
(one line an update), report.html and card.json into `out`. The same command goes on where it was
stopped.
"""

import os
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import hydra
import jax
from omegaconf import DictConfig

from internjax.chain.pretraining import PretrainConfig, pretrain, settings_of
from internjax.chain.verbs import produce_at, scratch_of, write_training_page
from internjax.data.mixture import open_sources
from internjax.data.store import is_address
from internjax.errors import UserError
from internjax.experiments.compilation_cache import enable_compilation_cache
from internjax.experiments.config import build, part
from internjax.lineage import is_whole
from internjax.mesh import MeshConfig
from internjax.models.config import ModelConfig
from internjax.models.convert import model_path
from internjax.models.init import InitConfig
from internjax.models.load import Model, load, random_model, resolve
from internjax.models.native import save_native
from internjax.train.launch import detect, first_says, is_worker, joined, supervise
from internjax.train.mup import rescale_start


@dataclass(frozen=True)
class PretrainRun(PretrainConfig):
    """A training and where its things are; each key is explained in configs/pretrain.yaml."""

    model: str = ""
    arch: ModelConfig | None = None
    tokenizer: str = ""
    shards: str = ""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    init: InitConfig = InitConfig()
    restarts: int = 0
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
    """Trains and says how held-out bits per byte changed; one of many processes where it is one."""
    cfg = build(PretrainRun, raw)
    info = detect(os.environ)
    if info is not None and not is_worker():
        sys.exit(supervise(sys.orig_argv, restarts=cfg.restarts))
    with joined(info):
        produce_model(cfg)


def produce_model(cfg: PretrainRun) -> None:
    """Makes the artefact; in a run of several processes the first one writes it."""
    enable_compilation_cache()
    start = model_path(resolve(cfg.tokenizer if cfg.arch else cfg.model))
    train, heldout = (f"{cfg.shards}/{name}" for name in ("train", "heldout"))
    for shards in (train, heldout):
        open_sources(shards)  # what is missing is said before any work is done
    settings = part(PretrainConfig, cfg)

    def trained(scratch: Path) -> tuple[Model, dict]:
        model = random_model(cfg.arch, start, cfg.seed, cfg.init) if cfg.arch else load(cfg.model)
        if cfg.arch and cfg.optim.base_width:
            params = rescale_start(model.params, model.cfg.d_model, cfg.optim.base_width)
            model = replace(model, params=params)
        sources = (open_sources(at, tokenizer_hash=model.tokenizer.hash) for at in (train, heldout))
        return pretrain(model, *sources, settings, scratch, mesh=cfg.mesh)

    def make(folder: Path, scratch: Path) -> dict:
        model, metrics = trained(scratch)
        save_native(folder / "model", model.cfg, model.params, model.tokenizer)
        shutil.copyfile(scratch / "steps.jsonl", folder / "steps.jsonl")
        if cfg.run.keep_every and not cfg.run.checkpoints:  # for good: the scratch space goes
            shutil.copytree(scratch / "checkpoints", folder / "checkpoints")
        write_training_page(folder / "report.html", f"Pretraining of {model.cfg.name}", metrics)
        return metrics

    config = {"settings": settings_of(settings), "arch": cfg.arch, "init": cfg.init}
    inputs = {"tokenizer" if cfg.arch else "model": start}
    if is_address(cfg.shards):  # nothing here to hash: the address itself stands for the shards
        config["shards"] = cfg.shards
    else:
        inputs |= {"train": Path(train), "heldout": Path(heldout)}
    key, scratch = scratch_of(cfg.runs, "pretrain", config=config, inputs=inputs)
    there = first_says(is_whole(Path(cfg.out) if cfg.out else Path(cfg.runs) / "store" / key))
    if jax.process_index():
        if not there:
            trained(scratch)
        return
    done = produce_at(cfg.out, cfg.runs, "pretrain", config=config, inputs=inputs, make=make)
    before, after = (done.metrics[f"heldout_bits_per_byte_{when}"] for when in ("before", "after"))
    print(f"{done.path}: held-out bits per byte {before:.4f} -> {after:.4f}")


if __name__ == "__main__":  # the same program as `internjax pretrain`
    from internjax.cli import run

    sys.exit(run(["pretrain", *sys.argv[1:]]))
