"""Measures a model: `decode` the engine by itself, `serve` under load; `kernels` GPU kernels.

The load goes over HTTP or to the engine in this process; `bench_kernels.py` has the kernels.

`internjax bench decode smollm2-135m-instruct batch=[1,16] lengths=[[1,128],[128,128]]`
`internjax bench serve smollm2-135m-instruct load=dynamic concurrency=[16] plot=load.html`
`internjax bench kernels selftest=true cases=attention`
Times are in seconds; out=FILE.csv keeps the numbers.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from internjax.errors import GateFailed, UserError
from internjax.experiments.bench_rows import Row, check_writable, table, write_csv
from internjax.experiments.compilation_cache import enable_compilation_cache
from internjax.experiments.config import build

# Conversations with reference answers in the catalogue's tuning sets, English and Chinese.
DATA = (
    "sft-llamafactory/alpaca_en_demo.json",
    "sft-llamafactory/alpaca_zh_demo.json",
    "sft-llamafactory/glaive_toolcall_en_demo.json",
    "sft-llamafactory/glaive_toolcall_zh_demo.json",
    "sft-xtuner/openai_sft.jsonl",
)


@dataclass(frozen=True)
class BenchConfig:
    """What is measured; each key is explained in configs/bench.yaml."""

    action: Literal["decode", "serve", "kernels"] = "decode"
    model: str = "smollm2-135m-instruct"
    dtype: str = "float32"
    kv_dtype: str = "float32"
    warmup: int = 1
    out: str = ""
    batch: tuple[int, ...] = (1, 16)
    lengths: tuple[tuple[int, int], ...] = ((1, 128), (128, 128))
    rounds: int = 3
    load: Literal["static", "dynamic"] = "static"
    over: Literal["http", "python"] = "http"
    url: str = ""
    api_key: str = "none"
    tokenizer: str = ""
    concurrency: tuple[int, ...] = (1, 16)
    rate: tuple[float, ...] = ()
    requests: int = 32
    data: tuple[str, ...] = DATA
    max_prompt: int = 1024
    max_total: int = 2048
    seed: int = 0
    plot: str = ""
    selftest: bool = False
    cases: str = ""

    def __post_init__(self):
        sizes = {"batch": self.batch, "lengths": [n for pair in self.lengths for n in pair]}
        sizes |= {"concurrency": self.concurrency, "rounds": [self.rounds]}
        sizes |= {"requests": [self.requests]}
        for name, values in sizes.items():
            if not values or min(values) < 1:
                raise UserError(f"{name}={getattr(self, name)}: each number must be at least 1.")
        if self.rate and min(self.rate) <= 0:
            raise UserError(f"rate={self.rate}: each must be above 0 requests a second.")
        if self.rate and self.load == "static":
            raise UserError(f"rate={self.rate} is for load=dynamic; load=static has concurrency.")
        if self.url and self.over == "python":
            raise UserError(f"over=python measures this process: leave out url={self.url}.")
        if self.plot and Path(self.plot).suffix != ".html":
            raise UserError(f"plot={self.plot}: it is a page, give FILE.html.")


@hydra.main(config_path="../configs", config_name="bench", version_base=None)
def main(raw: DictConfig) -> None:
    """Prints a row for each case, and keeps the rows where `out` says."""
    cfg = build(BenchConfig, raw)
    for key in ("out", "plot"):
        if getattr(cfg, key):
            check_writable(key, Path(getattr(cfg, key)))
    enable_compilation_cache()
    console = Console()
    if cfg.action == "kernels":
        kernels(cfg, console)
        return
    rows = decode(cfg) if cfg.action == "decode" else serve(cfg)
    console.print(table(rows))
    if cfg.out:
        write_csv(Path(cfg.out), rows)
        console.print(f"[dim]numbers: {cfg.out}[/]", soft_wrap=True)
    if cfg.plot and cfg.action == "serve":
        from internjax.experiments.bench_serve import plot

        page = plot(Path(cfg.plot), rows, f"{cfg.model}: {cfg.load} load")
        console.print(f"[dim]curves: {page}[/]", soft_wrap=True)


def decode(cfg: BenchConfig) -> list[Row]:
    """Measures the engine by itself."""
    from internjax.experiments.bench_decode import decode_rows

    rows = []
    with Console(stderr=True).status("measuring") as status:
        for row in decode_rows(cfg):
            rows.append(row)
            status.update(f"measuring: {len(rows)} cases done")
    return rows


def serve(cfg: BenchConfig) -> list[Row]:
    """Measures a served model, with a bar of the answers that are whole."""
    from internjax.experiments.bench_serve import measuring

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
    rows = []
    with measuring(cfg) as (cases, measure), bar:
        for case in cases:
            name = ", ".join(f"{key} {value:g}" for key, value in case.key.items())
            task = bar.add_task(name, total=len(case.works))
            rows.append(measure(case, lambda task=task: bar.advance(task)))
    return rows


def kernels(cfg: BenchConfig, console: Console) -> None:
    """Prints a line for each kernel: predicted, or checked and measured."""
    from internjax.experiments import bench_kernels as bench

    gpu = bench.this_gpu() if cfg.selftest else None
    cases = bench.chosen(cfg.cases)
    if gpu is not None:
        rows, title = bench.measured_rows(cases, gpu), f"Measured on {gpu.device_name}:"
    else:
        rows = bench.predicted_rows(cases)
        title = "Predicted for one H100 from the compiled code; nothing was run:"
    done = []
    with Console(stderr=True).status("kernels") as status:
        for row in rows:
            done.append(row)
            status.update(f"kernels: {len(done)} of {len(cases)} done")
    console.print(title)
    for line in bench.lines(done):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if cfg.out:
        write_csv(Path(cfg.out), done)
    if wrong := [row["case"] for row in done if not row.get("ok", True)]:
        raise GateFailed(f"values differ from the reference: {'; '.join(wrong)}.")


if __name__ == "__main__":  # the same program as `internjax bench`
    from internjax.cli import run

    sys.exit(run(["bench", *sys.argv[1:]]))
