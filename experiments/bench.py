"""Measures a model: `decode` the engine in this process, `serve` an OpenAI-compatible server; and
`kernels`, the GPU kernels by themselves (`bench_kernels.py`).

`internjax bench decode smollm2-135m-instruct batch=[1,16] lengths=[[1,128],[128,128]]`
`internjax bench serve smollm2-135m-instruct url=http://127.0.0.1:8000/v1`
`internjax bench kernels selftest=true cases=attention`
Times are in seconds; out=FILE.csv keeps the numbers.
"""

import contextlib
import csv
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import hydra
import numpy as np
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from internjax.errors import GateFailed, UserError
from internjax.experiments.compilation_cache import enable_compilation_cache
from internjax.experiments.config import build

Row = dict[str, float]


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
    url: str = ""
    api_key: str = "none"
    concurrency: tuple[int, ...] = (1, 16)
    requests: int = 32
    max_tokens: int = 64
    selftest: bool = False
    cases: str = ""

    def __post_init__(self):
        sizes = {"batch": self.batch, "lengths": [n for pair in self.lengths for n in pair]}
        sizes |= {"concurrency": self.concurrency, "rounds": [self.rounds]}
        sizes |= {"requests": [self.requests], "max_tokens": [self.max_tokens]}
        for name, values in sizes.items():
            if not values or min(values) < 1:
                raise UserError(f"{name}={getattr(self, name)}: each number must be at least 1.")


@hydra.main(config_path="../configs", config_name="bench", version_base=None)
def main(raw: DictConfig) -> None:
    """Prints a row for each case, and keeps the rows where `out` says."""
    cfg = build(BenchConfig, raw)
    enable_compilation_cache()
    console = Console()
    if cfg.action == "kernels":
        kernels(cfg, console)
        return
    rows = []
    with Console(stderr=True).status("measuring") as status:
        for row in decode_rows(cfg) if cfg.action == "decode" else serve_rows(cfg):
            rows.append(row)
            status.update(f"measuring: {len(rows)} cases done")
    console.print(table(rows))
    if cfg.out:
        write_csv(Path(cfg.out), rows)
        console.print(f"[dim]numbers: {cfg.out}[/]", soft_wrap=True)


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


def decode_rows(cfg: BenchConfig) -> Iterator[Row]:
    """Yields a row for each batch and pair of lengths: all requests arrive together."""
    from internjax.models.load import load
    from internjax.serve.engine import Engine, EngineConfig

    model = load(cfg.model, dtype=cfg.dtype, packed=True)
    longest = max(prompt + new for prompt, new in cfg.lengths)
    if longest > model.cfg.max_context:
        raise UserError(
            f"lengths={cfg.lengths}: {longest} tokens are more than the {model.cfg.max_context} of"
            f" {cfg.model}."
        )
    context = min(-(-longest // 128) * 128, model.cfg.max_context)
    for batch in cfg.batch:
        # The whole batch is prefilled before it decodes: first tokens wait, but for no one's turn.
        prefill = batch * max(prompt for prompt, _ in cfg.lengths)
        engine = Engine(
            model,
            EngineConfig(batch, context, cfg.kv_dtype, max_waiting=batch, prefill_tokens=prefill),
        )
        for prompt, new in cfg.lengths:
            for _ in range(cfg.warmup):
                decode_round(engine, batch, prompt, new)
            rounds = [decode_round(engine, batch, prompt, new) for _ in range(cfg.rounds)]
            yield {"batch": batch, "prompt": prompt, "new": new} | decode_row(rounds)


def decode_round(engine, batch: int, prompt: int, new: int) -> np.ndarray:
    """Runs one batch to its end; returns when each token came, [batch, new] seconds."""
    from internjax.models.lm import SamplingParams

    params = SamplingParams(max_tokens=new, ignore_eos=True)
    ids = np.random.default_rng(0).integers(0, engine.cfg.vocab_size, (batch, prompt)).tolist()
    times: list[list[float]] = [[] for _ in range(batch)]
    begin = time.perf_counter()
    for row, came in zip(ids, times, strict=True):

        def emit(news, came=came) -> None:
            came.extend([time.perf_counter() - begin] * len(news.tokens))

        engine.submit(row, params, emit)
    while engine.step():
        pass
    return np.array(times)


def decode_row(rounds: list[np.ndarray]) -> Row:
    """Sums up rounds: rate of all tokens, seconds to the first one and between the others."""
    firsts = np.concatenate([times[:, 0] for times in rounds])
    gaps = np.concatenate([np.diff(times, axis=1).ravel() for times in rounds])
    row = {
        "tokens_per_second": sum(t.size for t in rounds) / sum(t.max() for t in rounds),
        "first_token_mean_seconds": firsts.mean(),
        "first_token_min_seconds": firsts.min(),
        "first_token_max_seconds": firsts.max(),
    }
    row |= percentiles("token", gaps)
    return row | {"peak_memory_bytes": peak_memory()}


def serve_rows(cfg: BenchConfig) -> Iterator[Row]:
    """Yields a row for each number of concurrent streams."""
    from openai import APIConnectionError, APIStatusError

    from internjax.agents.loop import connect
    from internjax.chain.online import QUESTIONS, stream_once

    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(cfg.requests)]
    with endpoint(cfg) as url:
        client = connect(url, api_key=cfg.api_key)

        def one(question: str):
            return stream_once(client, cfg.model, question, cfg.max_tokens)

        try:
            for streams in cfg.concurrency:
                with ThreadPoolExecutor(streams) as pool:
                    list(pool.map(one, questions[: cfg.warmup * streams]))
                    begin = time.perf_counter()
                    done = list(pool.map(one, questions))
                    seconds = time.perf_counter() - begin
                yield {"concurrency": streams, "requests": cfg.requests} | serve_row(done, seconds)
        except APIConnectionError as error:
            raise UserError(f"url={url}: no server answers there ({error}).") from error
        except APIStatusError as error:
            raise UserError(f"{url} refused the request: {error.message}") from error


def serve_row(done: list, seconds: float) -> Row:
    """Sums up streams that took `seconds` together: rates, TTFT, time a later token, whole time."""
    later = [(s.seconds - s.first_seconds) / max(1, s.tokens - 1) for s in done]
    row = {
        "requests_per_second": len(done) / seconds,
        "tokens_per_second": sum(s.tokens for s in done) / seconds,
        "first_token_mean_seconds": statistics.mean(s.first_seconds for s in done),
    }
    row |= percentiles("first_token", [s.first_seconds for s in done])
    return row | percentiles("token", later) | percentiles("answer", [s.seconds for s in done])


@contextlib.contextmanager
def endpoint(cfg: BenchConfig) -> Iterator[str]:
    """The server at `cfg.url`, or one of our own on loopback while the block runs."""
    if cfg.url:
        yield cfg.url
        return
    from internjax.models.load import load
    from internjax.serve.engine import EngineConfig
    from internjax.serve.server import serving

    engine = EngineConfig(slots=max(cfg.concurrency), kv_dtype=cfg.kv_dtype)
    model = load(cfg.model, dtype=cfg.dtype, packed=True)
    with serving(model, name=cfg.model, engine=engine) as url:
        yield url


def percentiles(name: str, seconds: Any) -> Row:
    """The usual percentiles of some times; none where there are no times."""
    values = np.asarray(seconds)
    if not values.size:
        return {}
    return {f"{name}_p{p}_seconds": float(np.percentile(values, p)) for p in (50, 75, 95, 99)}


def peak_memory() -> int:
    """Most bytes held so far: of the device where it counts them, else of this process."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or peak_process_bytes()


def peak_process_bytes() -> int:
    """Peak resident memory; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def table(rows: list[Row]) -> Table:
    """A column for each case, a line for each quantity."""
    shown = Table(box=None, show_header=False, pad_edge=False)
    for name in _columns(rows):
        shown.add_row(f"[dim]{name}[/]", *(_cell(row.get(name)) for row in rows))
    for column in shown.columns[1:]:
        column.justify = "right"
    return shown


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def write_csv(path: Path, rows: list[Row]) -> None:
    """Writes a line for each case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def _columns(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


if __name__ == "__main__":  # the same program as `internjax bench`
    from internjax.cli import run

    sys.exit(run(["bench", *sys.argv[1:]]))
