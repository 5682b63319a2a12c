"""What guesses, adapters and small number formats of the cache change: speed, and perplexity.

    .venv/bin/python benchmarks/serve_speed.py [MODEL] [quick=true] [only=guesses,adapters,cache,
        perplexity] [draft=SMALL]

Our engine with a feature against itself without; rounds in turn, medians, tokens/s of whole answers
whose prompts the prefix cache holds. A row of the table each, then

    RATIO measure with without times-better
    GOAL kv_int8_perplexity_change value bound met|missed

guesses: summaries of, and quotes from, paragraphs of xquad (English), greedy to their natural end,
one at a time and 8 at once; 3 guesses of prompt lookup, or of a draft model where one is given (the
catalogue has none that is smaller and of the same vocabulary). Answers must be equal, token for
token. adapters: 16 requests with an adapter of rank 16 each on all projections, against an engine
without places for adapters. cache: 4 requests behind 1,537 tokens of text, by the cache's format.
perplexity: teacher-forced through the engine's cache, in pieces of 128 tokens as it prefills, rows
of 512 tokens of web text, the same weights (float32, and as the server packs them) with every
format; positions read keys and values that were rounded. Goal: int8 within 0.5% of float32.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from internjax import catalog
from internjax.adapt.lora import init_adapter
from internjax.adapt.texts import read_texts, text_path
from internjax.data.chat import encode_prompt
from internjax.experiments.bench_load import find
from internjax.experiments.compilation_cache import enable_compilation_cache
from internjax.models.cache import KVCache, init_cache
from internjax.models.config import ModelConfig
from internjax.models.decoder import decode, unembed
from internjax.models.lm import SamplingParams
from internjax.models.load import Model, load
from internjax.models.peft import LoraConfig
from internjax.serve.config import KV_DTYPES
from internjax.serve.engine import Engine, EngineConfig
from internjax.serve.prepare import prepare_params
from internjax.tree import Params

BOUND = 0.005
GUESSES = 3  # with the token before them 4 rows: a size that steps are compiled for
ASKED = ("Summarize the text:\n\n{text}", "{question} Quote the sentence that says it.\n\n{text}")
LENGTH, PIECE = 512, 128  # of a row of perplexity, of what is run at once
LONG = 24 * 64 + 1  # whole blocks, and the token that the first step feeds

type Job = tuple[Sequence[int], str]
"""Ids of a prompt, and the name of its adapter."""


def answer(engine: Engine, jobs: Sequence[Job], new: int, **params) -> tuple[list, float]:
    """Answers all at once; returns their ids, and tokens a second."""
    asked = SamplingParams(max_tokens=new, **params)
    started = time.perf_counter()
    requests = [engine.submit(p, asked, lambda _: None, adapter=name) for p, name in jobs]
    while engine.step():
        pass
    seconds = time.perf_counter() - started
    assert not any(r.finish_reason == "error" for r in requests)
    return [r.output for r in requests], sum(len(r.output) for r in requests) / seconds


def in_turn(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Returns the median of every way, after a round that compiles and fills the cache."""
    rates = [{name: way() for name, way in ways.items()} for _ in range(rounds + 1)]
    return {name: statistics.median(r[name] for r in rates[1:]) for name in ways}


def ratio(name: str, ours: float, other: float) -> str:
    """A line of speeds: above 1 the first is faster."""
    return f"RATIO {name} {ours:.1f} {other:.1f} {ours / other:.2f}"


def quotes(model: Model, count: int) -> list[Job]:
    """Returns prompts whose answers use the words of the text they are given."""
    data = json.loads(find("xquad/xquad.en.json").read_text("utf-8"))["data"]
    texts = [p for article in data for p in article["paragraphs"][:1]][:count]
    jobs = []
    for at, paragraph in enumerate(texts):
        words = {"text": paragraph["context"], "question": paragraph["qas"][0]["question"]}
        asked = [{"role": "user", "content": ASKED[at % len(ASKED)].format(**words)}]
        jobs.append((encode_prompt(model.tokenizer, model.template, asked), ""))
    return jobs


def guesses(model: Model, rounds: int, scale: int, draft: Model | None) -> Iterator[str]:
    """Measures prompt lookup, and a draft model if there is one."""
    jobs, new = quotes(model, 4 * scale), 48 * scale
    plain = EngineConfig(slots=8, context=1024)
    guessing = replace(plain, speculate=GUESSES)
    engines = {"none": Engine(model, plain), "lookup": Engine(model, guessing)}
    if draft is not None:
        engines["draft"] = Engine(model, guessing, draft=draft)
    else:
        names = ", ".join(entry.name for entry in catalog.search("", kind="model"))
        yield f"no draft model: give draft=SMALL (the catalogue has {names})"
    said: dict[str, list] = {}

    def alone(name: str) -> float:
        started, tokens = time.perf_counter(), 0
        said[name] = [answer(engines[name], [job], new)[0][0] for job in jobs]
        tokens = sum(map(len, said[name]))
        return tokens / (time.perf_counter() - started)

    def together(name: str) -> float:
        heard, rate = answer(engines[name], jobs, new)
        assert heard == said[name] == said["none"], f"{name}: guesses changed an answer"
        return rate

    for way, ask in (("alone", alone), ("at_once", together)):
        found = in_turn({name: partial(ask, name) for name in engines}, rounds)
        for name in [x for x in engines if x != "none"]:
            stats = engines[name].stats
            yield (
                f"guesses {name} {way}: {found[name]:.1f} tokens/s, {found['none']:.1f} without;"
                f" {stats.accepted} of {stats.guessed} guesses right so far"
            )
            yield ratio(f"guesses_{name}_{way}", found[name], found["none"])


def adapters(model: Model, rounds: int, scale: int) -> Iterator[str]:
    """Measures a full batch in which each request has an adapter of its own."""
    lora, count, new = LoraConfig(rank=16), 16, 16 * scale
    plain = EngineConfig(slots=count, context=256)
    held = Engine(model, replace(plain, adapters=count, adapter_rank=lora.rank))
    for i in range(count):
        drawn = init_adapter(model.cfg, lora, jax.random.key(i))
        noise = np.random.default_rng(i)  # b = 0 would change nothing
        drawn = jax.tree.map(lambda x, r=noise: r.normal(0, 0.01, x.shape), drawn)
        held.adapters.add(f"a{i}", drawn, lora)
    ids = np.random.default_rng(0).integers(0, model.cfg.vocab_size, (count, 65)).tolist()
    unnamed, named = [(p, "") for p in ids], [(p, f"a{i}") for i, p in enumerate(ids)]
    cases = {"no places": (Engine(model, plain), unnamed), "places, none used": (held, unnamed)}
    cases["an adapter each"] = held, named
    ask = lambda case: answer(*case, new, ignore_eos=True)[1]  # noqa: E731
    found = in_turn({name: partial(ask, case) for name, case in cases.items()}, rounds)
    yield "adapters: " + ", ".join(f"{name} {rate:.1f} tokens/s" for name, rate in found.items())
    yield ratio("adapters_16_of_rank_16", found["an adapter each"], found["no places"])


def rows_of(model: Model, count: int, length: int) -> np.ndarray:
    """Returns `[count, length]` ids of web text that nothing was calibrated on."""
    ids: list[int] = []
    for text in read_texts(text_path("raw-web:c4_demo")):
        ids += model.tokenizer.encode(text)
        if len(ids) >= count * length:
            break
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)


def cache(model: Model, rounds: int, scale: int) -> Iterator[str]:
    """Measures decoding behind long prompts by the number format of keys and values."""
    jobs = [(row, "") for row in rows_of(model, 4, LONG).tolist()]
    configs = {kv: EngineConfig(slots=4, context=2048, kv_dtype=kv) for kv in KV_DTYPES}
    engines = {kv: Engine(model, config) for kv, config in configs.items()}
    ask = lambda engine: answer(engine, jobs, 16 * scale, ignore_eos=True)[1]  # noqa: E731
    found = in_turn({kv: partial(ask, engine) for kv, engine in engines.items()}, rounds)
    yield "cache: " + ", ".join(f"{kv} {rate:.1f} tokens/s" for kv, rate in found.items())
    for kv in KV_DTYPES[1:]:
        yield ratio(f"kv_{kv}_behind_{LONG}", found[kv], found["float32"])


@partial(jax.jit, static_argnames="cfg", donate_argnames="cache")
def _piece(
    params: Params,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    start: Int[Array, " B"],
    cfg: ModelConfig,
) -> tuple[Array, KVCache]:
    """Returns -log p of the targets `[B, T]`, of queries that read what the cache gives back."""
    states, cache = decode(params, tokens, cache, start, cfg, attend=LENGTH)
    logits = unembed(params, states, cfg)
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - at_target, cache


def perplexity_of(params: Params, cfg: ModelConfig, rows: np.ndarray, kv_dtype: str) -> float:
    """Returns the perplexity of rows `[B, LENGTH]`, their first tokens given."""
    total = 0.0
    for row in rows:
        store = init_cache(cfg, 1, LENGTH, kv_dtype)
        following = np.append(row[1:], 0)
        for at in range(0, LENGTH, PIECE):
            part = slice(at, at + PIECE)
            here = row[None, part], following[None, part], np.asarray([at], np.int32)
            loss, store = _piece(params, store, *here, cfg=cfg)
            total += float(np.asarray(loss)[0, : min(PIECE, LENGTH - 1 - at)].sum())
    return float(np.exp(total / (len(rows) * (LENGTH - 1))))


def perplexity(model: Model, _: int, scale: int) -> Iterator[str]:
    """Measures what rounding keys and values costs, weights and activations being the same."""
    rows = rows_of(model, 4 * scale, LENGTH)
    for kind, weights in (("packed", "auto"), ("float32", "expand")):
        params = prepare_params(model.params, EngineConfig(weights=weights), model.cfg.dtype)
        found = {kv: perplexity_of(params, model.cfg, rows, kv) for kv in KV_DTYPES}
        exact = found["float32"]
        words = (f"{kv} {value:.3f} ({value / exact - 1:+.3%})" for kv, value in found.items())
        yield f"perplexity, {kind} weights, {rows.size} tokens: " + ", ".join(words)
        for kv in ("int8", "int4"):
            values = f"{found[kv]:.3f} {exact:.3f} {exact / found[kv]:.4f}"
            yield f"RATIO kv_{kv}_perplexity_{kind} {values}"
        change = found["int8"] / exact - 1
        verdict = "met" if change <= BOUND else "missed"
        yield f"GOAL kv_int8_perplexity_change_{kind} {change:.5f} {BOUND} {verdict}"


def main(args: list[str]) -> int:
    """Runs the parts asked for and prints their lines as they come."""
    options = dict(a.split("=", 1) for a in args if "=" in a)
    name = next((a for a in args if "=" not in a), "smollm2-135m-instruct")
    rounds, scale = (3, 1) if options.get("quick") == "true" else (5, 2)
    enable_compilation_cache()
    model = load(name, packed=True)
    draft = load(options["draft"], packed=True) if "draft" in options else None
    parts = {"guesses": partial(guesses, draft=draft), "adapters": adapters}
    parts |= {"cache": cache, "perplexity": perplexity}
    for part in options.get("only", ",".join(parts)).split(","):
        for line in parts[part](model, rounds, scale):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
