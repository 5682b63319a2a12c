"""A tiny training for tests: a bigram model, random rows, and a program that can be killed.

The loop knows nothing of the model, so the smallest one that learns from tokens will do; it
compiles in a tenth of a decoder's time.

python -m tests.training FOLDER [STEPS]   trains in FOLDER, resuming
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from internjax.data.batch import Batch
from internjax.data.loader import batches
from internjax.train.gradients import make_gradients
from internjax.train.loop import RunConfig, fit
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


def init_bigram(seed: int = 0, width: int = 8) -> dict[str, jax.Array]:
    """Draws an embedding and a head: the next token is told from the one before alone."""
    one, two = jax.random.split(jax.random.key(seed))
    vocab = TINY.vocab_size
    return {
        "embed": jax.random.normal(one, (vocab, width)),
        "head": jax.random.normal(two, (width, vocab)) * width**-0.5,
    }


def bigram_loss(params, batch: Batch, _=None):
    """Mean negative log-likelihood of the counted targets, and its parts."""
    logits = jnp.take(params["embed"], batch.tokens, axis=0) @ params["head"]
    picked = jnp.take_along_axis(logits, batch.targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    total, count = jnp.sum(losses * batch.loss_mask), jnp.sum(batch.loss_mask)
    return total / jnp.maximum(count, 1), {"loss_sum": total, "num_tokens": count}


def train(
    folder: Path,
    steps: int = 6,
    *,
    save_every: int = 2,
    lr: float = 1e-2,
    batch_at=None,
    run: dict | None = None,
    fitting: dict | None = None,
    **changes,
) -> tuple[TrainState, list[dict]]:
    """Trains the bigram model.

    Args:
      run: other fields of `RunConfig`; fitting: other arguments of `fit`.
      changes: go into the run's settings.
    """
    tx = make_optimizer(OptimConfig(lr=lr), steps)
    options = {"steps": steps, "save_every": save_every, "progress": False} | (run or {})
    return fit(
        init_state(init_bigram(), tx),
        make_train_step(make_gradients(bigram_loss), tx),
        batch_at or batches(rows(24), 4, seed=1),
        RunConfig(**options),
        folder,
        settings={"steps": steps, "lr": lr, **changes},
        **(fitting or {}),
    )


def leaves(state: TrainState) -> dict[str, np.ndarray]:
    """Every array of a state by its path."""
    found = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), save_every=1)
