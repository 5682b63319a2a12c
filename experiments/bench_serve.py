"""`internjax bench serve`: the static and the dynamic table of a served model.

Static: at each concurrency and pair of lengths, so many streams ask, each `rounds` times. Dynamic:
real conversations, each answer as long as its reference, at a concurrency or arriving at random
(a Poisson process). ttft: seconds to the first piece; tpot: seconds a later token; itl: seconds
between pieces; e2e: of whole answers.
"""

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from internjax.errors import UserError
from internjax.experiments.bench_load import Work, conversations, fixed, poisson, sample
from internjax.experiments.bench_rows import Row, peak_memory
from internjax.experiments.bench_targets import Answer, Target, in_process, over_http
from internjax.report import Lines, Section, Table, render

STATIC = {"ttft": ("mean", "min", "max"), "itl": (50, 75, 95, 99)}
DYNAMIC = dict.fromkeys(("ttft", "tpot", "itl", "e2e"), ("mean", 50, 99))

Tick = Callable[[], None]  # called when an answer is whole


@dataclasses.dataclass(frozen=True)
class Case:
    """One column of the table: what names it, its load, and what warms up before it.

    Fields:
      key: names and values, for instance {"concurrency": 16, "prompt": 128, "new": 128}.
      streams: requests under way at most; starts: seconds at which requests begin, or None for as
        soon as a stream is free.
    """

    key: Row
    warm: list[Work]
    works: list[Work]
    streams: int
    starts: Sequence[float] | None = None


@contextlib.contextmanager
def measuring(cfg) -> Iterator[tuple[list[Case], Callable[[Case, Tick], Row]]]:
    """Yields the cases of a `BenchConfig` and a function that measures one of them."""
    cases = static_cases(cfg) if cfg.load == "static" else dynamic_cases(cfg)
    fields = STATIC if cfg.load == "static" else DYNAMIC
    with target(cfg, cases) as ask:

        def measure(case: Case, tick: Tick) -> Row:
            run(ask, case.warm, case.streams, lambda: None)
            answers, seconds = run(ask, case.works, case.streams, tick, case.starts)
            row = case.key | summary(answers, seconds, fields)
            return row if cfg.url else row | {"peak_memory_bytes": peak_memory()}

        yield cases, measure


def static_cases(cfg) -> list[Case]:
    """A case for each pair of lengths and concurrency."""
    vocab = text_of(cfg)[0].vocab_size
    seeds = itertools.count(cfg.seed)
    cases = []
    for (prompt, new), streams in itertools.product(cfg.lengths, cfg.concurrency):
        key = {"concurrency": streams, "prompt": prompt, "new": new}
        warm = fixed(prompt, new, streams * cfg.warmup, vocab, seed=next(seeds))
        works = fixed(prompt, new, streams * cfg.rounds, vocab, seed=next(seeds))
        cases.append(Case(key, warm, works, streams))
    return cases


def dynamic_cases(cfg) -> list[Case]:
    """A case for each rate of arrivals, or else for each concurrency."""
    limits = {"max_prompt": cfg.max_prompt, "max_total": cfg.max_total}
    found = conversations(cfg.data, *text_of(cfg), **limits)
    works = sample(found, cfg.requests, seed=cfg.seed)
    if cfg.rate:
        slots = max(cfg.concurrency)
        starts = {rate: poisson(len(works), rate, seed=cfg.seed).tolist() for rate in cfg.rate}
        return [
            Case({"rate": rate}, works[: slots * cfg.warmup], works, len(works), starts[rate])
            for rate in cfg.rate
        ]
    return [Case({"concurrency": n}, works[: n * cfg.warmup], works, n) for n in cfg.concurrency]


def text_of(cfg):
    """Tokenizer and chat template that count: of `tokenizer`, else of `model`."""
    from internjax.data.chat import template_for
    from internjax.data.tokenizer import load_tokenizer
    from internjax.models.convert import model_path
    from internjax.models.load import resolve

    path = model_path(resolve(cfg.tokenizer or cfg.model))
    tokenizer = load_tokenizer(path)
    return tokenizer, template_for(path, tokenizer)


@contextlib.contextmanager
def target(cfg, cases: Sequence[Case]) -> Iterator[Target]:
    """Whom `cfg` asks: the server at `url`, or a model of this process, behind HTTP or not."""
    if cfg.url:
        yield over_http(cfg.url, cfg.model, cfg.api_key)
        return
    from internjax.models.load import load
    from internjax.serve.engine import Engine, EngineConfig
    from internjax.serve.server import serving
    from internjax.serve.thread import EngineThread

    model = load(cfg.model, dtype=cfg.dtype, packed=True)
    longest = max(map(sum, cfg.lengths)) if cfg.load == "static" else cfg.max_total
    if longest > model.cfg.max_context:
        raise UserError(
            f"{longest} tokens of prompt and answer are more than the {model.cfg.max_context} of"
            f" {cfg.model}: change lengths or max_total."
        )
    most = max(len(case.works) for case in cases)
    engine = EngineConfig(
        slots=max(cfg.concurrency),
        context=min(-(-longest // 128) * 128, model.cfg.max_context),
        kv_dtype=cfg.kv_dtype,
        max_waiting=most,
    )
    if cfg.over == "http":
        with serving(model, name=cfg.model, engine=engine) as url:
            yield over_http(url, cfg.model, cfg.api_key)
        return
    worker = EngineThread(Engine(model, engine))
    try:
        yield in_process(worker, model)
    finally:
        worker.close()


def run(
    ask: Target,
    works: Sequence[Work],
    streams: int,
    tick: Tick,
    starts: Sequence[float] | None = None,
) -> tuple[list[Answer], float]:
    """Asks all; returns the answers in order and the seconds from the first to the last.

    An error, or Ctrl-C, does not wait for the answers under way: who leaves `target` ends them.
    """
    begin, left = time.perf_counter(), threading.Event()

    def one(work: Work, start: float) -> Answer:
        if left.wait(max(0.0, begin + start - time.perf_counter())):
            raise CancelledError
        answer = ask(work)
        tick()
        return answer

    pool = ThreadPoolExecutor(streams)
    try:
        answers = list(pool.map(one, works, [0.0] * len(works) if starts is None else starts))
    finally:
        left.set()
        pool.shutdown(wait=False, cancel_futures=True)
    return answers, time.perf_counter() - begin


def summary(answers: Sequence[Answer], seconds: float, fields: dict[str, tuple]) -> Row:
    """Sums up answers that took `seconds` together: rates, then the asked times' statistics."""
    tokens = sum(a.tokens for a in answers)
    times = {
        "ttft": [a.ttft for a in answers],
        "tpot": [a.tpot for a in answers if a.tokens > 1],
        "itl": [gap for a in answers for gap in np.diff(a.times).tolist()],
        "e2e": [a.seconds for a in answers],
    }
    row = {
        "requests": len(answers),
        "requests_per_second": len(answers) / seconds,
        "requests_per_minute": 60 * len(answers) / seconds,
        "tokens_per_second": tokens / seconds,
        "total_tokens_per_second": (tokens + sum(a.prompt_tokens for a in answers)) / seconds,
    }
    for name, wanted in fields.items():
        row |= {
            f"{name}_{_word(which)}_seconds": _statistic(times[name], which)
            for which in wanted
            if len(times[name])
        }
    return row


def _word(which: str | int) -> str:
    return which if isinstance(which, str) else f"p{which}"


def _statistic(values: Sequence[float], which: str | int) -> float:
    if isinstance(which, str):
        return float({"mean": np.mean, "min": np.min, "max": np.max}[which](values))
    return float(np.percentile(values, which))


def plot(path: Path, rows: Sequence[Row], title: str) -> Path:
    """Writes a page of curves over the load: rates, and times in milliseconds."""
    x = "rate" if "rate" in rows[0] else "concurrency"
    lengths = {(row.get("prompt"), row.get("new")): "" for row in rows}
    if len(lengths) > 1:
        lengths = {(p, n): f" {p}/{n}" for p, n in lengths}

    def curves(names: Sequence[str], factor: float) -> dict[str, list]:
        return {
            name.removesuffix("_seconds") + label: [
                (row[x], factor * row[name])
                for row in rows
                if (row.get("prompt"), row.get("new")) == key and name in row
            ]
            for name in names
            for key, label in lengths.items()
        }

    label = "requests a second" if x == "rate" else "concurrency"
    first = [
        n for n in ("ttft_mean_seconds", "ttft_p50_seconds", "ttft_p99_seconds") if n in rows[0]
    ]
    later = [n for n in rows[0] if n.startswith(("tpot_p", "itl_p50", "itl_p99"))]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    blocks = [
        Lines("Output tokens a second", curves(["tokens_per_second"], 1), label, "tokens/s"),
        Lines("Time to the first token", curves(first, 1e3), label, "ms"),
        Lines("Time a later token", curves(later, 1e3), label, "ms"),
        Table(columns, [[row.get(name) for name in columns] for row in rows], "All figures"),
    ]
    return render(title, [Section("Load", blocks)], path)
