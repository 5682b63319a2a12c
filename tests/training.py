"""A tiny training for tests: a real decoder, random rows, and a program that can be killed.

python -m tests.training FOLDER [STEPS]   trains in FOLDER, resuming; writes state.npz at the end
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from internjax.data.batch import Batch
from internjax.data.loader import batches
from internjax.models.decoder import init_params
from internjax.train.gradients import make_gradients
from internjax.train.loop import RunConfig, fit
from internjax.train.losses import next_token_loss
from internjax.train.optim import OptimConfig, make_optimizer
from internjax.train.state import TrainState, init_state
from internjax.train.step import make_train_step
from tests.fakes import TINY


def rows(count: int, length: int = 16, seed: int = 0) -> list[Batch]:
    """Rows of two documents each; about half of the targets count."""
    rng = np.random.default_rng(seed)
    cut = length // 2
    segments = np.r_[np.ones(cut), np.full(length - cut, 2)].astype(np.int32)
    positions = np.r_[np.arange(cut), np.arange(length - cut)].astype(np.int32)
    return [
        Batch(
            tokens=rng.integers(0, TINY.vocab_size, length).astype(np.int32),
            targets=rng.integers(0, TINY.vocab_size, length).astype(np.int32),
            segment_ids=segments,
            positions=positions,
            loss_mask=rng.integers(0, 2, length).astype(np.float32),
        )
        for _ in range(count)
    ]


def one_batch(count: int, seed: int = 0) -> Batch:
    """Stacks `count` rows."""
    return jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs)), *rows(count, seed=seed))


def train(
    folder: Path, steps: int = 6, *, save_every: int = 2, lr: float = 1e-2, batch_at=None, **changes
) -> tuple[TrainState, list[dict]]:
    """Trains the tiny model; `changes` go into the run's settings."""
    tx = make_optimizer(OptimConfig(lr=lr), steps)
    loss = lambda params, batch, _: next_token_loss(params, batch, TINY)  # noqa: E731
    return fit(
        init_state(init_params(TINY, jax.random.key(0)), tx),
        make_train_step(make_gradients(loss), tx),
        batch_at or batches(rows(24), 4, seed=1),
        RunConfig(steps=steps, save_every=save_every, progress=False),
        folder,
        settings={"steps": steps, "lr": lr, **changes},
    )


def leaves(state: TrainState) -> dict[str, np.ndarray]:
    """Every array of a state by its path."""
    found = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    final, _ = train(target, int(sys.argv[2]), save_every=1)
    np.savez(target / "state.npz", **leaves(final))
