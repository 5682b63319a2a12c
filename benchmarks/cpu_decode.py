"""Decoding and prefill on this CPU beside llama.cpp and transformers + torch, the same weights.

    .venv/bin/python benchmarks/cpu_decode.py [MODEL] [quick=true]

Ours and llama.cpp take the GGUF file as it is (SmolLM2-135M: Q4_1, embeddings Q8_0), torch the same
numbers in bfloat16. Rounds of all alternate, so that a noisy machine disturbs all alike. A line is

    RATIO name ours theirs ratio [lowest ratio of a round .. highest]

with medians of the rounds, in tokens/s; a ratio below 1 is a loss. BANDWIDTH lines give what share
of the read bandwidth (the threads of the kernels, over 100 MB and over 1 GB, measured in the same
rounds) decoding at batch 1 takes; a token reads all weights and the keys and values of its context.
Exits with 3 when a peer is missing (`make peers` builds them); ours is printed all the same.
quick=true: fewer tokens and no long context, under 50 s.
"""

import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from internjax.experiments.compilation_cache import enable_compilation_cache
from internjax.kernels.cpu import library
from internjax.models.convert import convert, model_path
from internjax.models.lm import SamplingParams
from internjax.models.load import Model, load, resolve
from internjax.serve.engine import Engine, EngineConfig
from internjax.tree import size_bytes

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-peers" / "bin" / "python"
ROUNDS = 5
SWEEPS = {"100 MB": 100 * 10**6, "1 GB": 10**9}


@dataclass(frozen=True)
class Case:
    """One row of the table: a prompt of `context` tokens, or `new` tokens decoded after it."""

    kind: str
    batch: int
    context: int
    new: int

    @property
    def name(self) -> str:
        """As it is printed."""
        return f"{self.kind}_batch{self.batch}_context{self.context}"


FULL = (
    Case("prefill", 1, 512, 0),
    Case("decode", 1, 128, 64),
    Case("decode", 1, 2048, 32),
    Case("decode", 16, 128, 32),
)
QUICK = (Case("prefill", 1, 128, 0), Case("decode", 1, 128, 16), Case("decode", 16, 32, 8))


class Ours:
    """Our engine, one for every shape of batch and context."""

    def __init__(self, model: Model):
        self.model = model
        self.engines: dict[tuple[int, int], Engine] = {}

    def ask(self, case: Case) -> float:
        """Runs one case; returns tokens/s."""
        context = max(256, -(-(case.context + case.new + 1) // 128) * 128)
        key = case.batch, context
        if key not in self.engines:
            # The whole batch is prefilled before it decodes, as the peers do it.
            config = EngineConfig(
                slots=case.batch, context=context, prefill_tokens=case.batch * context
            )
            self.engines[key] = Engine(self.model, config)
        return _run(self.engines[key], case)


def _run(engine: Engine, case: Case) -> float:
    prompts = [[5 + (7 * i + j) % 900 for j in range(case.context)] for i in range(case.batch)]
    params = SamplingParams(max_tokens=max(case.new, 1), ignore_eos=True)
    start = time.perf_counter()
    requests = [engine.submit(p, params, lambda _: None) for p in prompts]
    while not all(r.first_token_seconds for r in requests):
        engine.step()
    filled, early = time.perf_counter(), sum(len(r.output) for r in requests)
    while engine.step():
        pass
    if case.kind == "prefill":
        return case.batch * case.context / (filled - start)
    return (case.batch * case.new - early) / (time.perf_counter() - filled)


class Peer:
    """Another program in a process of its own; a line asks, a line answers."""

    def __init__(self, script: str, model: Path):
        command = [PEERS, ROOT / "benchmarks" / script, model]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def there(self) -> bool:
        """Waits until it has loaded; False where it is not installed."""
        return self.process.stdout.readline().strip() == '"ready"'

    def ask(self, case: Case) -> float:
        """Runs one case; returns tokens/s."""
        line = json.dumps([case.kind, case.batch, case.context, case.new])
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def start_peers(path: Path, folder: Path) -> dict[str, Peer]:
    """Starts the peers; they load while we do."""
    if not PEERS.is_file():
        return {}
    convert(path, folder / "hf", to="hf", dtype="bfloat16")
    peers = {"torch": Peer("peer_torch.py", folder / "hf")}
    if path.suffix == ".gguf":
        peers["llama.cpp"] = Peer("peer_llama.py", path)
    return peers


class Memory:
    """The yardstick: how fast the kernels' threads read a block of memory in order."""

    def __init__(self, size: int):
        self.block = np.ones(size, np.uint8)
        self.native = library.library()
        self.native.internjax_cpu_sweep.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self.native.internjax_cpu_sweep.restype = ctypes.c_int32

    def ask(self, _: Case) -> float:
        """Returns bytes/s, the best of three passes."""
        return max(self.once() for _ in range(3))

    def once(self) -> float:
        start = time.perf_counter()
        self.native.internjax_cpu_sweep(self.block.ctypes.data, self.block.size)
        return self.block.size / (time.perf_counter() - start)


def show(name: str, ours: list[float], peer: str, theirs: list[float]) -> None:
    """Prints one comparison."""
    here, there = statistics.median(ours), statistics.median(theirs)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    spread = f"[{min(ratios):.2f} .. {max(ratios):.2f}]"
    print(f"RATIO {name}_vs_{peer} {here:.1f} {there:.1f} {here / there:.2f} {spread}", flush=True)


def measure(case: Case, askers: dict[str, Callable[[Case], float]]) -> dict[str, list[float]]:
    """Runs a case in rounds; the first one compiles, fills and warms up."""
    at_limit = case.kind == "decode" and case.batch == 1
    askers = {name: ask for name, ask in askers.items() if at_limit or name not in SWEEPS}
    rounds = [{name: ask(case) for name, ask in askers.items()} for _ in range(ROUNDS + 1)]
    return {name: [r[name] for r in rounds[1:]] for name in askers}


def main(args: list[str]) -> int:
    """Alternates rounds, prints medians and ratios."""
    quick = "quick=true" in args
    names = [a for a in args if "=" not in a]
    enable_compilation_cache()
    name = names[0] if names else "smollm2-135m-instruct"
    cases = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        started = start_peers(model_path(resolve(name)), Path(folder))
        model = load(name, packed=True)
        ours = Ours(model)
        peers = {name: peer for name, peer in started.items() if peer.there()}
        askers: dict[str, Callable[[Case], float]] = {"ours": ours.ask}
        askers |= {name: peer.ask for name, peer in peers.items()}
        if library.library() is not None:
            askers |= {name: Memory(size).ask for name, size in SWEEPS.items()}
        for case in cases:
            figures = measure(case, askers)
            print(f"OURS {case.name} {statistics.median(figures['ours']):.1f}", flush=True)
            for name in peers:
                show(case.name, figures["ours"], name, figures[name])
            if figures.keys() >= SWEEPS.keys():
                show_bandwidth(model, figures, case)
        for peer in peers.values():
            peer.close()
    missing = {"torch", "llama.cpp"} - peers.keys()
    if missing:
        print(f"missing: {', '.join(sorted(missing))} in {PEERS}; `make peers` builds it")
        return 3
    return 0


def show_bandwidth(model: Model, figures: dict[str, list[float]], case: Case) -> None:
    """Prints the share of the read bandwidth that decoding at batch 1 takes."""
    cfg = model.cfg
    kept = 2 * 4 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim  # float32, of a position
    per_token = size_bytes(jax.tree.leaves(model.params)) + kept * (case.context + case.new // 2)
    used = [per_token * x for x in figures["ours"]]
    for name in SWEEPS:
        limits = figures[name]
        shares = [a / b for a, b in zip(used, limits, strict=True)]
        print(
            f"BANDWIDTH {case.name} {statistics.median(used) / 1e9:.1f} GB/s of"
            f" {statistics.median(limits) / 1e9:.1f} over {name}: {statistics.median(shares):.0%}"
            f" [{min(shares):.0%} .. {max(shares):.0%}]",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
