"""Perplexity and task scores of every method of `internjax quantize`, beside float32.

    .venv/bin/python benchmarks/quantize_methods.py MODEL [methods=rtn,awq] [group=64] [rows=32]
        [sequences=32] [choices=false] [steps=2000] [work=runs/quantize_methods]

MODEL is a name, a path, or `trained`: a model of 1 million weights that `internjax pretrain` makes
here first, of English books of the catalogue, and that was never quantized. Calibration reads
wiki_demo of the catalogue's raw-web (`trained`: the books it was trained on); perplexity and
top-1 accuracy are those on c4_demo of raw-web (`trained`: chapters it has not seen), in rows of 256
tokens; choices is the accuracy on `retention_choices`. Prints, a method,

    QUANTIZED model method: perplexity (change), top-1 accuracy, choices, bytes, seconds
    RATIO awq: share of rtn's gap to float32 that it closes, its distance from float32

Lines that stand in WORK/rows.jsonl are not computed again, so that a run may be stopped. Goals: awq
closes at least half of rtn's gap and ends within 3% of float32.
"""

import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from internjax.adapt.quantize import CALIBRATED, QuantConfig, quantize, quantize_on
from internjax.adapt.texts import CalibrationConfig, calibration_rows, read_texts, text_path
from internjax.data.executor import document_end
from internjax.data.shards import write_shards
from internjax.data.tokenizer import load_tokenizer
from internjax.data.train_tokenizer import train_tokenizer
from internjax.evals.run import evaluate
from internjax.experiments.compilation_cache import enable_compilation_cache
from internjax.models.load import Model, load
from internjax.models.score import token_logprobs
from internjax.serve.local import LocalLM
from internjax.tree import size_bytes
from internjax.weights import QuantWeight, plain

METHODS = "rtn,awq,awq-clip,gptq,gptq-order,w8a8,fp8"
LENGTH, BATCH = 256, 8
ARCH = {
    "name": "trained-1m",
    "num_layers": 4,
    "d_model": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "d_ff": 384,
    "vocab_size": 2048,
    "max_context": 256,
}


def books(part: str) -> list[str]:
    """Pieces of 6,000 characters; every tenth is held out."""
    texts = [t for t in read_texts(text_path("raw-books-en")) if len(t) > 10_000]
    pieces = [t[i : i + 6000] for t in texts for i in range(0, len(t), 6000)]
    return [p for i, p in enumerate(pieces) if (i % 10 == 9) == (part == "heldout")]


def train(work: Path, steps: str) -> Path:
    """Makes tokenizer, shards and model of the books; goes on where it was stopped."""
    made = work / "trained"
    if made.is_dir():
        return made / "model"
    words = work / "tokenizer"
    if not words.is_dir():
        train_tokenizer(books("train"), words, vocab_size=ARCH["vocab_size"])
    tokenizer = load_tokenizer(words)
    for part in ("train", "heldout"):
        if (work / "shards" / part).is_dir():
            continue
        rows = [
            (str(i), np.asarray([*tokenizer.encode(t), *document_end(tokenizer)]), len(t.encode()))
            for i, t in enumerate(books(part))
        ]
        size = {"tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
        write_shards(work / "shards" / part, rows, **size)
    (work / "books.jsonl").write_text(
        "\n".join(json.dumps({"content": t}) for t in books("train")), "utf-8"
    )
    keys = [f"arch.{key}={value}" for key, value in ARCH.items()]
    keys += [f"tokenizer={words}", f"shards={work / 'shards'}", f"out={made}", f"runs={work}"]
    keys += ["length=128", "batch_size=16", "optim.lr=4e-3", f"run.steps={steps}"]
    keys += ["run.save_every=50", "remat.policy=none", "arch=smoke-5m"]
    subprocess.run([sys.executable, "-m", "internjax.cli", "pretrain", *keys], check=True)
    return made / "model"


def heldout_rows(model: Model, name: str, number: int) -> np.ndarray:
    """Returns `[number, LENGTH]` ids that neither training nor calibration has seen."""
    texts = books("heldout") if name == "trained" else read_texts(text_path("raw-web:c4_demo"))
    ids: list[int] = []
    for text in texts:
        ids += model.tokenizer.encode(text)
        if len(ids) >= number * LENGTH:
            break
    return np.asarray(ids[: number * LENGTH], np.int32).reshape(number, LENGTH)


def measure(model: Model, rows: np.ndarray, limit: int, *, choices: bool) -> dict:
    """Returns perplexity, top-1 accuracy and, of a model that knows English, choices."""
    # Integers are expanded once: the same numbers as expanding them in every product.
    expand = lambda w: plain(w, jnp.float32) if _expands(w) else w  # noqa: E731
    is_weight = lambda w: hasattr(w, "in_shape") or hasattr(w, "base")  # noqa: E731
    model = replace(model, params=jax.tree.map(expand, model.params, is_leaf=is_weight))
    run = jax.jit(partial(token_logprobs, cfg=model.cfg))
    scores = [run(model.params, rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    found = {
        "perplexity": float(np.exp(-np.mean([x.mean() for x, _ in scores]))),
        "top1": float(np.mean([greedy.mean() for _, greedy in scores])),
    }
    if choices:
        (score, *_) = evaluate(LocalLM(model), ["retention_choices"], limit=limit).scores
        found["choices"] = score.value
    return found


def _expands(w) -> bool:
    scaled = hasattr(w, "in_shape") and w.values.dtype != jnp.int8
    return isinstance(w, QuantWeight) or scaled or hasattr(w, "base")


def config_of(method: str, group: int | None) -> QuantConfig:
    """The method's settings; gptq-order is gptq with act_order, awq-clip awq with clip."""
    method, _, more = method.partition("-")
    cfg = QuantConfig(method=method, group=None if method in ("w8a8", "fp8") else group)
    awq, gptq = replace(cfg.awq, clip=more == "clip"), replace(cfg.gptq, act_order=more == "order")
    return replace(cfg, awq=awq, gptq=gptq)


def main(args: list[str]) -> int:
    """Measures what is missing, then prints everything that is there."""
    options = dict(a.split("=", 1) for a in args if "=" in a)
    name = next((a for a in args if "=" not in a), "smollm2-135m-instruct")
    work = Path(options.get("work", "runs/quantize_methods"))
    work.mkdir(parents=True, exist_ok=True)
    enable_compilation_cache()
    trained = name == "trained"
    model = load(train(work, options.get("steps", "2000")) if trained else name)
    group = int(options["group"]) if options.get("group") else None
    rows = heldout_rows(model, name, int(options.get("rows", 32)))
    text = str(work / "books.jsonl") if trained else "raw-web:wiki_demo"
    sequences = int(options.get("sequences", 32))
    calibration = CalibrationConfig(text=text, sequences=sequences, tokens=LENGTH)
    facts = {"model": name, "group": group, "rows": len(rows), "sequences": sequences}
    store = work / "rows.jsonl"
    for method in ["float32", *options.get("methods", METHODS).split(",")]:
        row = facts | {"method": method} | ({"group": None} if method == "float32" else {})
        if any(row.items() <= known.items() for known in _read(store)):
            continue
        started = time.monotonic()
        params = model.params
        if method != "float32":
            cfg = config_of(method, group)
            if cfg.method in CALIBRATED:
                params = quantize_on(model, cfg, calibration_rows(model, calibration))
            else:
                params = quantize(model.params, cfg)
        jax.block_until_ready(params)
        row |= {"seconds": round(time.monotonic() - started, 1), "bytes": size_bytes(params)}
        limit = int(options.get("limit", 60))
        choices = not trained and options.get("choices", "true") == "true"
        row |= measure(replace(model, params=params), rows, limit, choices=choices)
        with store.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    show([x for x in _read(store) if x["model"] == name and x["rows"] == len(rows)], group)
    return 0


def _read(store: Path) -> list[dict]:
    return [json.loads(x) for x in store.read_text().splitlines()] if store.is_file() else []


def show(found: list[dict], group: int | None) -> None:
    """Prints the table of one group size and the ratios."""
    found = [x for x in found if x["group"] == group or x["method"] == "float32"]
    exact = next(x["perplexity"] for x in found if x["method"] == "float32")
    for x in found:
        change = f"{x['perplexity'] / exact - 1:+.2%}"
        choices = f"{x['choices']:.1%}" if "choices" in x else "-"
        print(
            f"QUANTIZED {x['model']} {x['method']:10} {x['perplexity']:.3f} ({change})"
            f" {x['top1']:.2%} {choices} {x['bytes'] / 1e6:.1f} MB {x['seconds']:.0f} s"
        )
    by = {x["method"]: x["perplexity"] for x in found}
    for method in ("awq", "awq-clip", "gptq", "gptq-order"):
        if method in by and "rtn" in by:
            gap = by["rtn"] - exact
            closed = f"{1 - (by[method] - exact) / gap:.0%}" if gap > 1e-3 * exact else "(none)"
            print(f"RATIO {method}: closes {closed} of rtn's gap, {by[method] / exact - 1:+.2%}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
