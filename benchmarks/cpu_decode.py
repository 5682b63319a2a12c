"""Decode and prefill tokens/s of our engine beside transformers + torch, same weights, one run.

    .venv/bin/python benchmarks/cpu_decode.py [MODEL]

The weights are exported once to a Hugging Face folder (float32), which the peer's environment
(.venv-peers, `make peers`) loads. Rounds of ours and theirs alternate and the best of each counts,
so a noisy machine disturbs both alike. Prints `RATIO name ours theirs ratio` lines. Exits with 3
when the peer is missing (ours is printed all the same).
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from internjax.experiments.compilation_cache import enable_compilation_cache
from internjax.models.lm import SamplingParams
from internjax.models.load import load
from internjax.serve.engine import Engine, EngineConfig

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / ".venv-peers" / "bin" / "python"
ROUNDS, PROMPT, NEW, BATCH = 3, 128, 32, 16

# Runs in the peer's environment; answers one line of JSON for each line on standard input.
PEER_PROGRAM = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
torch.set_grad_enabled(False)
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    batch, prompt, new = json.loads(line)
    ids = torch.randint(5, 1000, (batch, prompt), generator=torch.manual_seed(0))
    start = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    filled = time.perf_counter()
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    for _ in range(new - 1):
        out = model(token, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    done = time.perf_counter()
    print(json.dumps([batch * prompt / (filled - start), batch * (new - 1) / (done - filled)]), flush=True)
"""  # noqa: E501


def measure(engine: Engine, batch: int) -> tuple[float, float]:
    """Returns prefill and decode tokens/s of `batch` requests that arrive together."""
    prompts = [[5 + (7 * i + j) % 900 for j in range(PROMPT)] for i in range(batch)]
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    start = time.perf_counter()
    requests = [engine.submit(p, params, lambda _: None) for p in prompts]
    while not all(r.first_token_seconds for r in requests):
        engine.step()
    filled, early = time.perf_counter(), sum(len(r.output) for r in requests)
    while engine.step():
        pass
    decoded = batch * NEW - early
    return batch * PROMPT / (filled - start), decoded / (time.perf_counter() - filled)


def start_peer(folder: Path) -> subprocess.Popen:
    """Starts the peer's process and waits until it has loaded."""
    peer = subprocess.Popen(
        [PEER, "-c", PEER_PROGRAM, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if peer.stdout.readline().strip() != '"ready"':
        sys.exit("the peer did not start; its message stands above")
    return peer


def ask_peer(peer: subprocess.Popen, batch: int) -> tuple[float, float]:
    """Runs one round of the peer."""
    peer.stdin.write(json.dumps([batch, PROMPT, NEW]) + "\n")
    peer.stdin.flush()
    return tuple(json.loads(peer.stdout.readline()))


def main() -> int:
    """Alternates rounds, keeps the best of each, prints the ratios."""
    enable_compilation_cache()
    model = load(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct")
    # prefill_tokens: the whole batch is prefilled before it decodes, as the peer does it.
    engines = {
        n: Engine(model, EngineConfig(slots=n, context=256, prefill_tokens=n * PROMPT))
        for n in (1, BATCH)
    }
    best: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        peer = None
        if PEER.is_file():
            from internjax.models.convert import convert

            convert(model.path, Path(folder) / "hf", to="hf", dtype="float32")
            peer = start_peer(Path(folder) / "hf")
        for _ in range(ROUNDS + 1):  # the first round compiles and warms up; the best counts
            for n, engine in engines.items():
                theirs = ask_peer(peer, n) if peer else (0.0, 0.0)
                for kind, ours, other in zip(
                    ("prefill", "decode"), measure(engine, n), theirs, strict=True
                ):
                    row = best.setdefault(f"{kind}_{n}", [0.0, 0.0])
                    row[:] = max(row[0], ours), max(row[1], other)
        if peer:
            peer.stdin.close()
            peer.wait()
    for name, (ours, theirs) in best.items():
        if theirs:
            print(f"RATIO {name} {ours:.1f} {theirs:.1f} {ours / theirs:.2f}")
        else:
            print(f"OURS {name} {ours:.1f}")
    if not PEER.is_file():
        print(f"missing: {PEER.relative_to(ROOT)} (transformers + torch); `make peers` builds it")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
