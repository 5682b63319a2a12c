"""Our server beside vLLM on CPU and llama.cpp's, under the same load from vLLM's own client.

    .venv/bin/python benchmarks/serve_peers.py [MODEL] [quick=true] [rounds=3] [only=ours,llama.cpp]
        [requests=4]

`vllm bench serve` (an outsider's client) sends random prompts of 128 tokens, 64 tokens come back,
over HTTP, greedy, streamed: at concurrency 1, and 32 requests at concurrency 16. Servers start one
after the other; while one is measured the others are held still. Rounds go through all of them in
turn, and no two runs of a round share a prompt. Ours takes the GGUF file as it is (4 bits) and, as
servers of their own, the same numbers in bfloat16 and float32; llama.cpp the same file; vLLM the
bfloat16 numbers (full mode: float32 too). Prints medians of the rounds:

    FIGURE server measure value
    RATIO measure_vs_peer ours theirs times-better
    GOAL name value bound met|missed

For times (ttft, tpot) times-better is theirs over ours, so above 1 is always a win. Exits with 3
when a peer is missing (`make serve-peers` builds them); what is there is compared all the same.
requests=4 sends so few (at 16 too) that only the script itself is tried.
quick=true: one round, fewer prompts, no float32 of vLLM; at most 5 minutes on two cores.
transformers has a server too; it knows no `ignore_eos`, by which the client makes answers equal.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peer_servers import MODEL, PEERS, VLLM, Running, Server, llama, ours, running, vllm

from internjax.models.convert import convert, model_path
from internjax.models.load import resolve

PROMPT, NEW = 128, 64
MEASURES = {  # name: the client's field, its unit in ours, whether more is better
    "output_tokens_per_second": ("output_throughput", 1.0, True),
    "ttft_p50_seconds": ("median_ttft_ms", 1e-3, False),
    "tpot_p50_seconds": ("median_tpot_ms", 1e-3, False),
}
OURS, FLOATS = "ours", ("ours-bfloat16", "ours-float32")

Figures = dict[tuple[str, int, str], list[float]]  # (server, concurrency, measure): rounds


@dataclass(frozen=True)
class Plan:
    """How much is measured: requests at concurrency 1 and 16."""

    rounds: int
    requests: dict[int, int]


FULL = Plan(3, {1: 8, 16: 32})
QUICK = Plan(1, {1: 3, 16: 32})


def servers(name: str, folder: Path, quick: bool) -> list[Server]:
    """Ours at three precisions, and the peers, on the same numbers."""
    path = model_path(resolve(name))
    hf = folder / "hf"
    convert(path, hf, to="hf", dtype="bfloat16")
    found = [ours(OURS, name), ours(FLOATS[0], hf, "bfloat16", "bfloat16")]
    found += [ours(FLOATS[1], hf), vllm("bfloat16", hf)]
    found += [] if quick else [vllm("float32", hf)]
    return found + ([llama(path)] if path.suffix == ".gguf" else [])


def client(server: Running, folder: Path, concurrency: int, requests: int, seed: int) -> dict:
    """Runs `vllm bench serve` against a server; returns what it wrote down.

    A peer that lost requests is asked once more, with other prompts, and that is said: llama.cpp's
    server now and then closes a connection that the client is about to use again.
    """
    name = server.server.name
    for again in range(1 if name.startswith(OURS) else 2):
        found, said = _client(server, folder, concurrency, requests, seed + 50 * again)
        wanted = requests * NEW
        if found["completed"] == requests and found["total_output_tokens"] >= 0.98 * wanted:
            return found
        print(f"LOST {name} answered {found['completed']} of {requests} requests", flush=True)
    sys.exit(f"{name} gave {found['total_output_tokens']} tokens of {wanted}:\n{said}")


def _client(
    server: Running, folder: Path, concurrency: int, requests: int, seed: int
) -> tuple[dict, str]:
    words = ["bench", "serve", "--backend", "openai", "--endpoint", "/v1/completions"]
    words += ["--base-url", server.url, "--model", MODEL, "--tokenizer", folder / "hf"]
    words += ["--dataset-name", "random", "--random-input-len", PROMPT]
    words += ["--random-output-len", NEW, "--num-prompts", requests, "--seed", seed]
    words += ["--max-concurrency", concurrency, "--ignore-eos", "--temperature", 0]
    words += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm"]
    words += ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    done = subprocess.run(
        [PEERS / "vllm", *map(str, words)],
        env=os.environ | VLLM,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode or not result.is_file():
        sys.exit(f"vllm bench serve failed against {server.server.name}:\n{done.stdout[-3000:]}")
    return json.loads(result.read_text()), done.stdout[-3000:]


def measure(started: dict[str, Running], folder: Path, plan: Plan) -> Figures:
    """Rounds in turn; the client itself sends one request ahead of those that it times."""
    figures: Figures = {}
    for turn in range(plan.rounds):
        for name, server in started.items():
            server.resume()
            for concurrency, requests in plan.requests.items():
                seed = 100 * turn + concurrency  # new prompts: a prefix cache gains nothing
                found = client(server, folder, concurrency, requests, seed)
                values = {m: unit * found[field] for m, (field, unit, _) in MEASURES.items()}
                for measure, value in values.items():
                    figures.setdefault((name, concurrency, measure), []).append(value)
                said = ", ".join(f"{measure} {value:.4g}" for measure, value in values.items())
                print(f"ROUND {turn + 1} {name} concurrency {concurrency}: {said}", flush=True)
            server.pause()
    return figures


def report(figures: Figures, names: list[str]) -> None:
    """Prints figures, ratios and goals."""
    middle = {key: statistics.median(values) for key, values in figures.items()}
    for (name, concurrency, measure), value in middle.items():
        print(f"FIGURE {name} {measure}_c{concurrency} {value:.4g}")
    for name in names:
        for (server, concurrency, measure), here in middle.items():
            if server == OURS != name:
                there = middle[name, concurrency, measure]
                better = here / there if MEASURES[measure][2] else there / here
                print(
                    f"RATIO {measure}_c{concurrency}_vs_{name} {here:.4g} {there:.4g} {better:.2f}"
                )
    for name, value, bound in goals(middle, names):
        print(f"GOAL {name} {value:.2f} {bound:.2f} {'met' if value >= bound else 'missed'}")


def goals(middle: dict, names: list[str]) -> list[tuple[str, float, float]]:
    """Goals as (name, how many times better, at least)."""
    if OURS not in names:
        return []
    rate, ttft = "output_tokens_per_second", "ttft_p50_seconds"
    peers = [name for name in names if name not in (OURS, *FLOATS)]
    floats = [name for name in names if name in FLOATS]
    found = []
    if peers:
        best = max(middle[name, 16, rate] for name in peers)
        found.append(("output_c16_vs_best_peer", middle[OURS, 16, rate] / best, 1.5))
        best = min(middle[name, 16, ttft] for name in peers)
        found.append(("ttft_p50_c16_vs_best_peer", best / middle[OURS, 16, ttft], 1.0))
    for concurrency, bound in ((1, 2.0), (16, 1.3)) if floats else ():
        best = max(middle[name, concurrency, rate] for name in floats)
        ratio = middle[OURS, concurrency, rate] / best
        found.append((f"w4_vs_float_c{concurrency}", ratio, bound))
    return found


def main(args: list[str]) -> int:
    """Starts, measures, reports."""
    options = dict(arg.split("=", 1) for arg in args if "=" in arg)
    if unknown := options.keys() - {"quick", "rounds", "only", "requests"}:
        sys.exit(f"unknown option {', '.join(unknown)}: legal are quick, rounds, only, requests")
    name = next((arg for arg in args if "=" not in arg), "smollm2-135m-instruct")
    quick = options.get("quick") == "true"
    plan = QUICK if quick else FULL
    few = int(options.get("requests", 32))
    requests = {n: min(few, most) for n, most in plan.requests.items()}
    plan = Plan(int(options.get("rounds", plan.rounds)), requests)
    if not (PEERS / "vllm").is_file():
        print(f"missing: the client {PEERS / 'vllm'}; `make serve-peers` builds it")
        return 3
    with tempfile.TemporaryDirectory() as folder:
        asked = servers(name, Path(folder), quick)
        if "only" in options:
            asked = [server for server in asked if server.name in options["only"].split(",")]
        with running(asked, Path(folder)) as started:
            report(measure(started, Path(folder), plan), list(started))
    return 0 if len(started) == len(asked) else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
