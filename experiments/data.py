"""From a folder of documents to clean token shards, with a funnel that says what went where.

`internjax data run input=FOLDER out=FOLDER`; `internjax data check FILE.jsonl` validates documents.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from internjax.data.document import check_file
from internjax.data.executor import DataConfig, DataReport, run
from internjax.data.plant import plant_faults
from internjax.data.render import render_pages
from internjax.data.tokenizer import load_tokenizer
from internjax.errors import UserError
from internjax.experiments.config import build
from internjax.models.load import resolve


@dataclass(frozen=True)
class DataRunConfig:
    """What to do; each key is explained in configs/data.yaml, those of the stage in DataConfig."""

    data: DataConfig
    action: Literal["run", "check"] = "run"
    out: str = ""
    tokenizer: str = "smollm2-135m-instruct"
    render: str = ""
    plant: bool = False


@hydra.main(config_path="../configs", config_name="data", version_base=None)
def main(raw: DictConfig) -> None:
    """Runs the data stage, or validates a file of documents."""
    cfg = build(DataRunConfig, nest(OmegaConf.to_container(raw, resolve=True)))
    console = Console()
    if cfg.action == "check":
        check(console, cfg.data.input)
        return
    if not cfg.out:
        raise UserError("data run needs a folder to write: internjax data run input=DIR out=DIR")
    data = prepare(cfg)
    report = run(data, Path(cfg.out), tokenizer=load_tokenizer(resolve(cfg.tokenizer)))
    show(console, report)


def nest(raw: dict[str, Any]) -> dict[str, Any]:
    """Puts the keys of the stage, which stand at the top for the user, under `data`."""
    stage = {f.name for f in dataclasses.fields(DataConfig)}
    top = {key: value for key, value in raw.items() if key not in stage}
    return {**top, "data": {key: value for key, value in raw.items() if key in stage}}


def prepare(cfg: DataRunConfig) -> DataConfig:
    """Renders pages and plants faults, when asked to; returns the config of the stage."""
    data, beside = cfg.data, Path(f"{cfg.out}.input")
    if cfg.render:
        data = dataclasses.replace(data, input=str(beside / "rendered"))
        render_pages(Path(cfg.render), Path(data.input))
    if cfg.plant:
        ledger = beside / "ledger.json"
        plant_faults(Path(data.input), beside / "planted", ledger, seed=data.seed)
        data = dataclasses.replace(data, input=str(beside / "planted"), ledger=str(ledger))
    return data


def check(console: Console, path: str) -> None:
    """Prints every problem of a jsonl file of documents; any problem is an error."""
    if not path:
        raise UserError("data check needs a file: internjax data check documents.jsonl")
    problems = check_file(Path(path))
    for problem in problems:
        console.print(str(problem), markup=False, highlight=False)
    if problems:
        raise UserError(f"{path} has {len(problems)} problems, listed above.")
    console.print(f"{path}: every line is a valid document", markup=False, highlight=False)


def show(console: Console, report: DataReport) -> None:
    """Prints the funnel, the two parts and the score of planted faults."""
    table = Table("stage", "documents", "tokens", "kB", "dropped", title="data funnel")
    for row in report.funnel:
        counts = [f"{row['in'].get(k, '-')} -> {row['out'][k]}" for k in ("documents", "tokens")]
        size = f"{row['in']['bytes'] / 1e3:,.0f} -> {row['out']['bytes'] / 1e3:,.0f}"
        why = ", ".join(f"{k} {v}" for k, v in {**row["dropped"], **row.get("masked", {})}.items())
        table.add_row(row["stage"], *counts, size, why)
    for name in ("train", "heldout"):
        part = getattr(report, name)
        table.add_row(
            name, f"{part['documents']}", f"{part['tokens']}", f"{part['bytes'] / 1e3:,.0f}"
        )
    console.print(table)
    for kind, entry in report.plants.items():
        if kind == "clean":
            console.print(f"honest documents lost: {len(entry['lost'])} of {entry['documents']}")
        else:
            console.print(f"planted {kind}: found {entry['found']} of {entry['planted']}")


if __name__ == "__main__":  # the same program as `internjax data`
    from internjax.cli import run

    sys.exit(run(["data", *sys.argv[1:]]))
