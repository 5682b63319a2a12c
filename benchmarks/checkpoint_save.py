"""How long a training stands still for a checkpoint, beside a blocking save by plain Orbax.

    .venv/bin/python benchmarks/checkpoint_save.py [STEPS]

The real training step on SmolLM2-135M's shape (full fine-tune, AdamW: 1.6 GB of state), 4 rows of
512 tokens. Rounds of: some steps without a save; a save of ours and the steps that run while it is
being written; a blocking save of the peer (Orbax, asynchronous writing off). Prints the seconds
blocked as a share of a step (goal: ours <= 10%), how much the overlapped steps are slowed down,
and at last `RATIO save_blocked_seconds peer ours ratio` (above 1: ours blocks less).
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from omegaconf import OmegaConf

from internjax import configs
from internjax.checkpoint import Checkpoints
from internjax.data.batch import Batch
from internjax.experiments.compilation_cache import enable_compilation_cache
from internjax.experiments.config import build
from internjax.models.config import ModelConfig
from internjax.models.decoder import init_params
from internjax.train.gradients import make_gradients
from internjax.train.losses import next_token_loss
from internjax.train.optim import OptimConfig, make_optimizer
from internjax.train.state import init_state
from internjax.train.step import make_train_step
from internjax.tree import size_bytes

ROWS, LENGTH, ROUNDS = 4, 512, 2


def random_batch(vocab_size: int) -> Batch:
    """Draws rows of one document each."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    return Batch(
        tokens=jnp.asarray(tokens[:, :-1]),
        targets=jnp.asarray(tokens[:, 1:]),
        segment_ids=jnp.ones((ROWS, LENGTH), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (ROWS, LENGTH)),
        loss_mask=jnp.ones((ROWS, LENGTH), jnp.float32),
    )


def timed(fn) -> float:
    """Returns the seconds of a call, its work on the device included."""
    start = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - start


def blocking_save(folder: Path, state) -> float:
    """Saves with Orbax's manager, asynchronous writing off; returns the seconds."""
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder, options=options) as manager:
        seconds = timed(lambda: manager.save(1, args=ocp.args.StandardSave(state)))
    shutil.rmtree(folder)
    return seconds


def main() -> int:
    """Measures and prints."""
    enable_compilation_cache()
    plain_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    raw = OmegaConf.load(Path(configs.__file__).parent / "arch" / "smollm2-135m-instruct.yaml")
    cfg = build(ModelConfig, raw)
    tx = make_optimizer(OptimConfig(), 100)
    state = init_state(init_params(cfg, jax.random.key(0)), tx)
    batch = random_batch(cfg.vocab_size)
    loss = lambda params, batch, _: next_token_loss(params, batch, cfg)  # noqa: E731
    step = jax.jit(make_train_step(make_gradients(loss), tx), donate_argnums=0)

    def stepped() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = step(state, batch, None)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    print(f"state {size_bytes(state) / 1e9:.2f} GB; first step, compiled: {stepped():.1f} s")
    plain, overlapped, ours, peers = [], [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(ROUNDS):
            plain += [stepped() for _ in range(plain_steps)]
            with Checkpoints(Path(scratch) / "ours", keep=1) as checkpoints:
                ours.append(timed(lambda n=number, c=checkpoints: c.save(n + 1, state, {})))
                while checkpoints.writing():
                    overlapped.append(stepped())
            peers.append(blocking_save(Path(scratch) / "peer", state))
    usual = statistics.median(plain)
    slowed = statistics.median(overlapped) / usual - 1
    print(
        f"step {usual:.2f} s; while a checkpoint is written {slowed:+.1%} ({len(overlapped)} steps)"
    )
    for name, seconds in (("OURS", ours), ("PEER", peers)):
        blocked = statistics.median(seconds)
        print(f"{name} blocked {blocked:.2f} s, {blocked / usual:.1%} of a step")
    theirs, own = statistics.median(peers), statistics.median(ours)
    print(f"RATIO save_blocked_seconds {theirs:.2f} {own:.2f} {theirs / own:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
