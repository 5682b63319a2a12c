"""Clients that others wrote drive `internjax serve` as they are: openai, vLLM's benchmark, lm-eval.

    .venv/bin/python benchmarks/outside_clients.py [MODEL] [rows=143] [only=openai,vllm,lm-eval]

Serves MODEL once and lets each client at it; prints `CLIENT name ok`, or `CLIENT name: why not`.

openai     lists the models, streams a chat with usage, reads log-probabilities and an echoed prompt
vllm       `vllm bench serve`, 4 random prompts: every request answered with all of its tokens
lm-eval    `local-completions` (token-id prompts, echo) on the task retention_choices: acc and
           acc_norm are those of `internjax evaluate` on the same rows

Exits with 1 when a client fails, with 3 when one is not installed (`make serve-peers`).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import yaml
from peer_servers import MODEL, OFFLINE, PEERS, ROOT, Running, ours, running
from serve_peers import client as vllm_bench

from internjax.agents.loop import connect
from internjax.evals.tasks import FOLDER
from internjax.models.convert import convert, model_path
from internjax.models.load import resolve

TASK = "retention_choices"


def try_openai(server: Running, folder: Path, name: str, rows: int) -> str:
    """Talks to it through the openai package; returns what was wrong."""
    client = connect(f"{server.url}/v1")
    if MODEL not in [model.id for model in client.models.list()]:
        return f"{MODEL} is not listed"
    messages = [{"role": "user", "content": "Name three colours."}]
    usage = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=16, stream=True, stream_options=usage
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    if not text or chunks[-1].usage is None or not 0 < chunks[-1].usage.completion_tokens <= 16:
        return f"the streamed chat gave {text!r} and usage {chunks[-1].usage}"
    said = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=16, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    if any(entry.logprob > 0 or len(entry.top_logprobs) != 2 for entry in said.logprobs.content):
        return "a log-probability above 0, or other than two alternatives"
    ids = [504, 2060, 314]
    echoed = client.completions.create(
        model=MODEL, prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True
    ).choices[0]
    scores = echoed.logprobs.token_logprobs
    if len(scores) != len(ids) + 1 or scores[0] is not None or max(scores[1:]) > 0:
        return f"the echoed prompt of {len(ids)} tokens has the log-probabilities {scores}"
    return ""


def try_vllm(server: Running, folder: Path, name: str, rows: int) -> str:
    """Runs `vllm bench serve`, which exits by itself on a request that fails."""
    found = vllm_bench(server, folder, concurrency=2, requests=4, seed=0)
    return "" if found["median_ttft_ms"] > 0 else f"no first token was timed: {found}"


def try_lm_eval(server: Running, folder: Path, name: str, rows: int) -> str:
    """Scores a task from outside and with our own evaluation; returns how they differ."""
    (folder / "tasks").mkdir()
    data = (FOLDER / "data" / f"{TASK}.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "rows.jsonl").write_text("\n".join(data[:rows]) + "\n", encoding="utf-8")
    task = yaml.safe_load((FOLDER / "tasks" / f"{TASK}.yaml").read_text(encoding="utf-8"))
    task["task"] = "outside"
    task["dataset_kwargs"] = {"data_files": {"test": str(folder / "rows.jsonl")}}
    task["metadata"]["source"] = "package"  # an absolute path stays what it is
    file = folder / "tasks" / "outside.yaml"
    file.write_text(yaml.safe_dump(task), encoding="utf-8")
    theirs = lm_eval(server, folder)
    words = ["evaluate", name, f"tasks=[{file}]", f"out={folder / 'ours'}"]
    run([sys.executable, "-m", "internjax.cli", *words], {"PYTHONPATH": str(ROOT)})
    scores = json.loads((folder / "ours" / "results.json").read_text())["scores"]
    here = {s["metric"]: s["value"] for s in scores if s["metric"] in ("acc", "acc_norm")}
    there = {metric: theirs[f"{metric},none"] for metric in here}
    print(f"SCORES lm-eval {there} internjax {here} on {len(data[:rows])} rows", flush=True)
    alike = len(here) == 2 and all(abs(here[m] - there[m]) < 1e-9 for m in here)
    return "" if alike else "the scores differ"


def lm_eval(server: Running, folder: Path) -> dict[str, float]:
    """Runs the harness's command against the server; returns its metrics."""
    args = f"model={MODEL},base_url={server.url}/v1/completions,tokenizer={folder / 'hf'}"
    words = ["--model", "local-completions", "--tasks", "outside", "--include_path"]
    words += [folder / "tasks", "--output_path", folder / "theirs", "--model_args"]
    words += [f"{args},tokenized_requests=True,num_concurrent=8,max_length=1024"]
    run([PEERS / "lm_eval", *words], OFFLINE | {"HF_DATASETS_OFFLINE": "1"})
    (result,) = (folder / "theirs").rglob("results_*.json")
    return json.loads(result.read_text())["results"]["outside"]


def run(words: list, env: dict[str, str]) -> None:
    """Runs a command; its output is shown only when it fails."""
    done = subprocess.run(
        [str(word) for word in words],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{words[0]} failed:\n{done.stdout[-3000:]}")


CLIENTS: dict[str, Callable[[Running, Path, str, int], str]] = {
    "openai": try_openai,
    "vllm": try_vllm,
    "lm-eval": try_lm_eval,
}
PROGRAMS = {"vllm": PEERS / "vllm", "lm-eval": PEERS / "lm_eval"}


def main(args: list[str]) -> int:
    """Serves, then one client after the other."""
    options = dict(arg.split("=", 1) for arg in args if "=" in arg)
    if unknown := options.keys() - {"rows", "only"}:
        sys.exit(f"unknown option {', '.join(unknown)}: legal are rows, only")
    name = next((arg for arg in args if "=" not in arg), "smollm2-135m-instruct")
    asked = options.get("only", ",".join(CLIENTS)).split(",")
    missing = [c for c in asked if c in PROGRAMS and not PROGRAMS[c].is_file()]
    said = {c: f"{PROGRAMS[c]} is not there; `make serve-peers`" for c in missing}
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        convert(model_path(resolve(name)), folder / "hf", to="hf", dtype="bfloat16")
        # `internjax evaluate` does not round activations, so the server that must agree does not.
        exact = ours("ours", name, "float32", "float32", "serve.engine.activations=f32")
        with running([exact], folder) as started:
            if not started:
                return 1
            started["ours"].resume()
            for one in [c for c in asked if c not in missing]:
                said[one] = CLIENTS[one](
                    started["ours"], folder, name, int(options.get("rows", 143))
                )
    for one, why in said.items():
        print(f"CLIENT {one} ok" if not why else f"CLIENT {one}: {why}")
    if any(why for one, why in said.items() if one not in missing):
        return 1
    return 3 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
