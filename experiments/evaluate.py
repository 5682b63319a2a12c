"""Scores a model, or a running server, on tasks; prints every score with its uncertainty.

`internjax evaluate smollm2-135m-instruct tasks=[retention,svamp] limit=100`
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from internjax.data.identity import Identity
from internjax.errors import UserError
from internjax.evals.core import Results, Task, load_results
from internjax.evals.identity import for_identity
from internjax.evals.report import comparison_table, score_table
from internjax.evals.run import compare, evaluate
from internjax.evals.tasks import load_task, task_names
from internjax.experiments.config import build
from internjax.models.lm import LM


@dataclass(frozen=True)
class EvaluateConfig:
    """What to score; each key is explained in configs/evaluate.yaml."""

    model: str = ""
    tasks: tuple[str, ...] = ("retention",)
    limit: int | dict[str, int] | None = None
    seed: int = 0
    out: Path | None = None
    against: Path | None = None
    base_url: str = ""
    api_key: str = "none"
    bos: str = ""
    identity: Identity = field(default_factory=Identity)
    list: bool = False


@hydra.main(config_path="../configs", config_name="evaluate", version_base=None)
def main(raw: DictConfig) -> None:
    """Asks, scores, prints; compares with earlier results when there are some."""
    cfg = build(EvaluateConfig, raw)
    console = Console()
    if cfg.list:
        console.print(task_table(map(load_task, task_names())))
        return
    earlier = load_results(cfg.against) if cfg.against else None
    tasks = for_identity(cfg.tasks, cfg.identity)
    results = run(open_lm(cfg), tasks, cfg)
    console.print(score_table(results))
    if earlier:
        console.print(comparison_table(compare(earlier, results), earlier.model, results.model))
    if cfg.out:
        console.print(f"[dim]answers and scores: {cfg.out}[/]")


def run(lm: LM, tasks: list[Task], cfg: EvaluateConfig) -> Results:
    """Evaluates under a progress bar (on standard error)."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    quiet = not console.is_terminal
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=quiet) as bar:
        bars = {task.name: bar.add_task(task.name, total=None) for task in tasks}
        show = lambda name, done, total: bar.update(bars[name], completed=done, total=total)  # noqa: E731
        return evaluate(lm, tasks, limit=cfg.limit, seed=cfg.seed, out=cfg.out, progress=show)


def open_lm(cfg: EvaluateConfig) -> LM:
    """The server at `base_url`, or the model in this process."""
    if cfg.base_url:
        from internjax.evals.http_lm import HttpLM

        return HttpLM(cfg.base_url, cfg.model, cfg.api_key, bos=cfg.bos)
    if not cfg.model:
        raise UserError("evaluate needs a model: a name of the catalogue, a path, or base_url=.")
    from internjax.models.load import load
    from internjax.serve.local import LocalLM

    return LocalLM(load(cfg.model))


def task_table(tasks: Iterable[Task]) -> Table:
    """One line a task: what `tasks=[...]` may name, tags included."""
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("task", "tags", "dimension", "kind", "metric", "rows"):
        table.add_column(name, no_wrap=True)
    for task in tasks:
        rows = "shipped" if task.source[0] == "package" else "catalogue"
        table.add_row(
            task.name, " ".join(task.tags), task.dimension, task.kind, task.metrics[0], rows
        )
    return table


if __name__ == "__main__":  # the same program as `internjax evaluate`
    from internjax.cli import run

    sys.exit(run(["evaluate", *sys.argv[1:]]))
