"""Fine-tunes a model on chats with LoRA; only the assistant's answers are learned.

Writes adapter/ (a PEFT folder), model/ (the merged model), steps.jsonl (one line an update),
report.html and card.json into `out`. The same command goes on where it was stopped.
"""

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from omegaconf import DictConfig

from internjax.chain.tuning import TuneConfig, merged, tune
from internjax.chain.verbs import produce_at, write_training_page
from internjax.data.chat_samples import read_chats
from internjax.data.identity import Identity, identity_samples
from internjax.data.templates import Message
from internjax.experiments.compilation_cache import enable_compilation_cache
from internjax.experiments.config import build, part
from internjax.models.convert import model_path
from internjax.models.load import load, resolve
from internjax.models.native import save_native
from internjax.models.peft import save_adapter


@dataclass(frozen=True)
class TuneRun(TuneConfig):
    """A tuning and where its things are; each key is explained in configs/tune.yaml."""

    model: str = "smollm2-135m-instruct"
    data: str = "identity"
    form: str = "auto"
    identity: Identity = field(default_factory=Identity)
    samples: int = 300
    out: str = ""
    merge: bool = True
    runs: str = "runs"


@hydra.main(config_path="../configs", config_name="tune", version_base=None)
def main(raw: DictConfig) -> None:
    """Tunes and says how the loss changed."""
    cfg = build(TuneRun, raw)
    enable_compilation_cache()
    generated = cfg.data == "identity"
    chats = read(cfg)
    settings = part(TuneConfig, cfg)
    config = {"settings": settings, "merge": cfg.merge}
    config |= {"identity": cfg.identity, "samples": cfg.samples} if generated else {}
    inputs = {"model": model_path(resolve(cfg.model))}
    inputs |= {} if generated else {"chats": Path(cfg.data)}

    def make(folder: Path, scratch: Path) -> dict:
        model = load(cfg.model)
        adapter, metrics = tune(model, chats, settings, scratch)
        save_adapter(folder / "adapter", adapter, cfg.lora, cfg.model)
        if cfg.merge:
            params = merged(model, adapter, cfg.lora)
            save_native(folder / "model", model.cfg, params, model.tokenizer)
        shutil.copyfile(scratch / "steps.jsonl", folder / "steps.jsonl")
        write_training_page(folder / "report.html", f"Tuning of {model.cfg.name}", metrics)
        return metrics

    done = produce_at(cfg.out, cfg.runs, "tune", config=config, inputs=inputs, make=make)
    loss = done.metrics["loss"]
    print(f"{done.path}: loss {loss[0]:.3f} -> {loss[-1]:.3f} in {len(loss)} updates")


def read(cfg: TuneRun) -> list[list[Message]]:
    """The chats to learn from: generated ones or those of a file."""
    if cfg.data == "identity":
        who = cfg.identity
        return identity_samples(who.name, who.maker, who.purpose, cfg.samples, cfg.seed)
    return read_chats(Path(cfg.data), form=cfg.form)


if __name__ == "__main__":  # the same program as `internjax tune`
    from internjax.cli import run

    sys.exit(run(["tune", *sys.argv[1:]]))
