"""Makes a model's projections smaller by one of six methods; the embedding and the head stay.

Writes model/ (a model folder that every verb takes) and card.json into `out`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import hydra
from omegaconf import DictConfig

from internjax.adapt.quantize import CALIBRATED, QuantConfig, compress
from internjax.adapt.texts import text_path
from internjax.chain.verbs import produce_at
from internjax.experiments.config import build, part
from internjax.models.convert import model_path
from internjax.models.load import load, resolve
from internjax.models.native import save_native
from internjax.tree import size_bytes


@dataclass(frozen=True)
class QuantizeRun(QuantConfig):
    """A rounding and where its things are; each key is explained in configs/quantize.yaml."""

    model: str = "smollm2-135m-instruct"
    out: str = ""
    runs: str = "runs"


@hydra.main(config_path="../configs", config_name="quantize", version_base=None)
def main(raw: DictConfig) -> None:
    """Rounds and says how much smaller the model became."""
    cfg = build(QuantizeRun, raw)
    settings = part(QuantConfig, cfg)
    inputs = {"model": model_path(resolve(cfg.model))}
    if settings.method in CALIBRATED and settings.calibration.text:
        inputs["calibration"] = text_path(settings.calibration.text)

    def make(folder: Path, scratch: Path) -> dict:
        model = load(cfg.model)
        params = compress(model, settings)
        save_native(folder / "model", model.cfg, params, model.tokenizer)
        return {"bytes_before": size_bytes(model.params), "bytes": size_bytes(params)}

    done = produce_at(cfg.out, cfg.runs, "quantize", config=settings, inputs=inputs, make=make)
    before, after = done.metrics["bytes_before"] / 1e6, done.metrics["bytes"] / 1e6
    print(f"{done.path / 'model'}: weights of {before:,.1f} MB became {after:,.1f} MB")


if __name__ == "__main__":  # the same program as `internjax quantize`
    from internjax.cli import run

    sys.exit(run(["quantize", *sys.argv[1:]]))
