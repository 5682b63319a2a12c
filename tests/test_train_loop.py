"""The loop: resumed equals uninterrupted bit for bit, bad numbers stop it, settings are kept."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from internjax.data.loader import batches
from internjax.errors import UserError
from tests.training import leaves, rows, train

ROOT = Path(__file__).resolve().parent.parent


def curve(folder: Path) -> list[dict]:
    """The lines of the log without their times."""
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return [{k: r[k] for k in ("step", "loss", "grad_norm", "num_tokens")} for r in lines]


def assert_same(a, b) -> None:
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_stopped_in_between_ends_with_the_same_bits(tmp_path: Path, stop: int):
    straight, records = train(tmp_path / "straight")
    batch_at = batches(rows(24), 4, seed=1)

    def interrupted(step: int):
        if step == stop:
            raise KeyboardInterrupt
        return batch_at(step)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", batch_at=interrupted)
    seen = []

    def resumed(step: int):
        seen.append(step)
        return batch_at(step)

    state, again = train(tmp_path / "resumed", batch_at=resumed)
    assert seen[0] == 2 * (stop // 2)  # from the newest checkpoint, not from the start
    assert_same(leaves(state), leaves(straight))
    assert curve(tmp_path / "resumed") == curve(tmp_path / "straight")
    assert [r["loss"] for r in again] == [r["loss"] for r in records]
    assert len(again) == 6


def test_a_finished_run_is_not_trained_again(tmp_path: Path):
    state, _ = train(tmp_path)

    def never(step: int):
        raise AssertionError(f"step {step} was trained again")

    again, records = train(tmp_path, batch_at=never)
    assert_same(leaves(again), leaves(state))
    assert len(records) == 6


def test_changed_settings_are_refused_by_name(tmp_path: Path):
    train(tmp_path, 2)
    with pytest.raises(UserError, match=r"lr: was 0\.01, is 0\.1; rank: was None, is 4"):
        train(tmp_path, 2, lr=0.1, rank=4)


def poisoned(bad: set[int]):
    batch_at = batches(rows(24), 4, seed=1)

    def at(step: int):
        batch = batch_at(step)
        mask = jnp.full_like(batch.loss_mask, jnp.nan) if step in bad else batch.loss_mask
        return batch.replace(loss_mask=mask)

    return at


def test_a_few_bad_batches_are_skipped(tmp_path: Path):
    state, records = train(tmp_path, 8, batch_at=poisoned({2, 3, 4}))
    assert [r["finite"] for r in records] == [True, True, False, False, False, True, True, True]
    assert all(np.isfinite(leaf).all() for leaf in leaves(state).values())
    text = (tmp_path / "steps.jsonl").read_text()
    strict = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert strict[2]["loss"] is None and strict[1]["loss"] > 0


@pytest.mark.parametrize("last", [6, 8])  # in the middle, and in the very last updates
def test_bad_batches_in_a_row_stop_the_run_with_the_steps(tmp_path: Path, last: int):
    bad = set(range(last - 4, last))
    with pytest.raises(UserError, match=f"steps {last - 3} to {last} .*lower optim.lr"):
        train(tmp_path, 8, save_every=0, batch_at=poisoned(bad))


def test_killed_at_random_moments_ends_with_the_same_bits(tmp_path: Path):
    run = [sys.executable, "-m", "tests.training"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests")}

    def start(folder: Path) -> subprocess.Popen:
        return subprocess.Popen([*run, folder, "16"], cwd=ROOT, env=os.environ | cache)

    assert start(tmp_path / "straight").wait(120) == 0
    folder = tmp_path / "killed"
    folder.mkdir()
    log = folder / "steps.jsonl"
    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    kills = 0
    for _ in range(2):
        seen = len(log.read_text().splitlines()) if log.exists() else 0
        target = min(seen + draw.randint(1, 7), 14)
        process = start(folder)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and len(log.read_text().splitlines()) >= target:
                break
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))  # somewhere in an update, or in the write of a checkpoint
        process.send_signal(signal.SIGKILL)
        kills += process.wait(120) == -signal.SIGKILL
    assert start(folder).wait(120) == 0
    assert kills, "the run was over before it could be killed"
    with np.load(folder / "state.npz") as a, np.load(tmp_path / "straight" / "state.npz") as b:
        assert_same(dict(a), dict(b))
    assert curve(folder) == curve(tmp_path / "straight"), f"seed {seed}"
    assert len(curve(folder)) == 16
