"""Decoding and prefill on this CPU beside llama.cpp and transformers + torch, the same weights.

    .venv/bin/python benchmarks/cpu_decode.py [MODEL] [quick=true]

Ours and llama.cpp take the GGUF file as it is (SmolLM2-135M: Q4_1, embeddings Q8_0), torch the same
numbers in bfloat16. Rounds of all alternate, so that a noisy machine disturbs all alike. A line is

    RATIO name ours theirs ratio [lowest ratio of a round .. highest]

with medians of the rounds, in tokens/s; a ratio below 1 is a loss. BANDWIDTH lines give what share
of the measured read bandwidth (the threads of the kernels, over 100 MB and over 1 GB) decoding at
batch 1 takes, counted as the bytes of all weights a token. Exits with 3 when a peer is missing
(`make peers` builds them); ours is printed all the same. quick=true: fewer tokens and no long
context, under 50 s.
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
from internjax.models.convert import convert
from internjax.models.lm import SamplingParams
from internjax.models.load import Model, load
from internjax.serve.engine import Engine, EngineConfig
from internjax.tree import size_bytes

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-peers" / "bin" / "python"
ROUNDS = 5


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
QUICK = (Case("prefill", 1, 128, 0), Case("decode", 1, 128, 24), Case("decode", 16, 32, 8))


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
        self.there = self.process.stdout.readline().strip() == '"ready"'

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
    """Starts those peers that are installed."""
    if not PEERS.is_file():
        return {}
    convert(path, folder / "hf", to="hf", dtype="bfloat16")
    peers = {"torch": Peer("peer_torch.py", folder / "hf")}
    if path.suffix == ".gguf":
        peers["llama.cpp"] = Peer("peer_llama.py", path)
    return {name: peer for name, peer in peers.items() if peer.there}


def read_bandwidth(size: int) -> float:
    """Returns bytes/s of reading `size` bytes in order with all threads, median of the rounds."""
    native = library.library()
    native.internjax_cpu_sweep.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    native.internjax_cpu_sweep.restype = ctypes.c_int32
    block = np.ones(size, np.uint8)

    def once() -> float:
        start = time.perf_counter()
        native.internjax_cpu_sweep(block.ctypes.data, size)
        return size / (time.perf_counter() - start)

    once()
    return statistics.median(once() for _ in range(ROUNDS))


def show(name: str, ours: list[float], peer: str, theirs: list[float]) -> None:
    """Prints one comparison."""
    here, there = statistics.median(ours), statistics.median(theirs)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    spread = f"[{min(ratios):.2f} .. {max(ratios):.2f}]"
    print(f"RATIO {name}_vs_{peer} {here:.1f} {there:.1f} {here / there:.2f} {spread}", flush=True)


def main(args: list[str]) -> int:
    """Alternates rounds, prints medians and ratios."""
    quick = "quick=true" in args
    names = [a for a in args if "=" not in a]
    enable_compilation_cache()
    model = load(names[0] if names else "smollm2-135m-instruct", packed=True)
    ours = Ours(model)
    cases = QUICK if quick else FULL
    figures: dict[tuple[str, Case], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        peers = start_peers(model.path, Path(folder))
        askers: dict[str, Callable[[Case], float]] = {"ours": ours.ask}
        askers |= {name: peer.ask for name, peer in peers.items()}
        for case in cases:
            for number in range(ROUNDS + 1):  # the first round compiles, fills and warms up
                for name, ask in askers.items():
                    figure = ask(case)
                    if number:
                        figures.setdefault((name, case), []).append(figure)
            mine = figures["ours", case]
            print(f"OURS {case.name} {statistics.median(mine):.1f}", flush=True)
            for name in peers:
                show(case.name, mine, name, figures[name, case])
        for peer in peers.values():
            peer.close()
    show_bandwidth(model, figures, cases)
    missing = {"torch", "llama.cpp"} - peers.keys()
    if missing:
        print(f"missing: {', '.join(sorted(missing))} in {PEERS}; `make peers` builds it")
        return 3
    return 0


def show_bandwidth(model: Model, figures: dict, cases: tuple[Case, ...]) -> None:
    """Prints the share of the read bandwidth that decoding at batch 1 takes."""
    if library.library() is None:
        return
    per_token = size_bytes(jax.tree.leaves(model.params))
    for size in (100 * 10**6, 10**9):
        limit = read_bandwidth(size)
        for case in cases:
            if case.kind == "decode" and case.batch == 1:
                used = per_token * statistics.median(figures["ours", case])
                print(
                    f"BANDWIDTH {case.name} {used / 1e9:.1f} GB/s of {limit / 1e9:.1f} over"
                    f" {size / 1e6:.0f} MB: {used / limit:.0%}"
                )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
