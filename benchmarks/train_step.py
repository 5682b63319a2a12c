"""Training tokens/s of SmolLM2-135M's shape beside transformers + torch, same precision, one run.

    .venv/bin/python benchmarks/train_step.py

Full fine-tuning, 4 rows of 512 tokens, AdamW, random weights. bf16 computes in bfloat16 beside
float32 master weights (torch: autocast). Steps of ours and of the peer (.venv-peers, `make peers`)
alternate, medians count. Prints compile seconds cold and warm, peak memory of each process, and
`RATIO name ours theirs times_better` lines. Exits with 3 when the peer is missing (ours is printed
all the same).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / ".venv-peers" / "bin" / "python"
ROWS, LENGTH, ROUNDS = 4, 512, 5

# Each program answers one line of JSON for each line on standard input: seconds of a step.
OURS = """
import dataclasses, json, resource, sys, time
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
from internjax.data.batch import Batch
from internjax.models.decoder import init_params
from internjax.models.internlm import CONFIGS
from internjax.models.remat import Remat
from internjax.train.gradients import make_gradients
from internjax.train.losses import Stages
from internjax.train.optim import OptimConfig, make_optimizer
from internjax.train.state import init_state
from internjax.train.step import make_train_step
dtype, rows, length = sys.argv[1], int(sys.argv[3]), int(sys.argv[4])
model = dataclasses.replace(CONFIGS["smollm2-135m-instruct"], dtype=dtype)
stages = Stages(model, remat=Remat("dots"))
tx = make_optimizer(OptimConfig(lr=1e-5), 1000)
state = init_state(init_params(model, jax.random.key(0)), tx)
ids = np.random.default_rng(0).integers(5, 1000, (rows, length + 1)).astype(np.int32)
ones = np.ones((rows, length), np.int32)
positions = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)
batch = Batch(ids[:, :-1], ids[:, 1:], ones, positions, ones.astype(np.float32))
gradients = make_gradients(stages.whole, dtype=dtype)
step = jax.jit(make_train_step(gradients, tx), donate_argnums=0)
start = time.perf_counter()
compiled = step.lower(state, batch).compile()
print(json.dumps(time.perf_counter() - start), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    state, metrics = compiled(state, batch)
    loss = float(metrics["loss"])
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([seconds, loss, peak]), flush=True)
"""

THEIRS = """
import contextlib, json, resource, sys, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
dtype, rows, length = sys.argv[1], int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, rope_theta=1e5,
    max_position_embeddings=8192)).train()
tx = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
ids = torch.randint(5, 1000, (rows, length))
low = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
print(json.dumps(0.0), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    with low:
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    tx.step()
    tx.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([seconds, float(loss), peak]), flush=True)
"""


def start(python: Path, program: str, dtype: str, cache: str) -> tuple[subprocess.Popen, float]:
    """Starts one side and returns it with the seconds it took to compile."""
    # numpy wheels ask OpenBLAS for a slow kernel where this is set; neither side should suffer.
    env = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
    side = subprocess.Popen(
        [python, "-c", program, dtype, cache, str(ROWS), str(LENGTH)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=env,
    )
    line = side.stdout.readline()
    if not line:
        sys.exit("a side did not start; its message stands above")
    return side, json.loads(line)


def ask(side: subprocess.Popen) -> tuple[float, float, int]:
    """One step: seconds, loss, peak memory in KiB."""
    side.stdin.write("\n")
    side.stdin.flush()
    return tuple(json.loads(side.stdout.readline()))


def stop(side: subprocess.Popen) -> None:
    side.stdin.close()
    side.wait(timeout=60)


def compare(dtype: str) -> list[str]:
    """Runs both sides in turn and returns the lines that tell the result."""
    with tempfile.TemporaryDirectory() as cache:
        side, cold = start(Path(sys.executable), OURS, dtype, cache)
        stop(side)
        ours, warm = start(Path(sys.executable), OURS, dtype, cache)
        theirs = start(PEER, THEIRS, dtype, cache)[0] if PEER.exists() else None
        sides = [side for side in (ours, theirs) if side]
        taken = {side: [ask(side)][:0] for side in sides}
        for _ in range(ROUNDS):
            for side in sides:
                taken[side].append(ask(side))
        for side in sides:
            stop(side)
    seconds = {side: float(np.median([t for t, _, _ in taken[side]])) for side in sides}
    rate = {side: ROWS * LENGTH / seconds[side] for side in sides}
    loss, peak = taken[ours][-1][1:]
    print(f"{dtype}: ours {rate[ours]:.0f} tokens/s, loss {loss:.3f}, peak {peak / 2**20:.2f} GiB")
    print(f"{dtype}: compiling cold {cold:.1f} s, from the cache {warm:.1f} s")
    if theirs is None:
        return []
    _, loss, their_peak = taken[theirs][-1]
    theirs_told = f"{rate[theirs]:.0f} tokens/s, loss {loss:.3f}, peak {their_peak / 2**20:.2f} GiB"
    print(f"{dtype}: peer {theirs_told}")
    name = "fp32" if dtype == "float32" else "bf16"
    times = rate[ours] / rate[theirs]
    return [
        f"RATIO train_{name}_tokens_per_second {rate[ours]:.1f} {rate[theirs]:.1f} {times:.2f}",
        f"RATIO train_{name}_peak_bytes {peak * 1024} {their_peak * 1024} {their_peak / peak:.2f}",
    ]


def main() -> int:
    """Prints everything, the ratios last."""
    begin = time.perf_counter()
    lines = [line for dtype in ("float32", "bfloat16") for line in compare(dtype)]
    print(f"{time.perf_counter() - begin:.0f} s in all")
    if not lines:
        print(f"the peer is missing: {PEER}; make peers")
        return 3
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
