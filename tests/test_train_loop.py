"""The loop: resumed equals uninterrupted bit for bit, bad numbers stop it, settings are kept."""

import importlib.util
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from internjax.data.loader import batches
from internjax.errors import Missing, UserError
from internjax.telemetry import work_of
from internjax.train.loop import RunConfig
from internjax.train.profile import parse_steps
from internjax.train.stop import Stopped
from internjax.train.watch import WatchConfig
from tests.fakes import tiny_model
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
    with pytest.raises(UserError, match=r"lr: was 0\.01, is 0\.1; rank: was absent, is 4"):
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


def asking(ask, at_step: int):
    batch_at = batches(rows(24), 4, seed=1)

    def at(step: int):
        if step == at_step:
            ask()
        return batch_at(step)

    return at


@pytest.mark.parametrize("how", ["SIGTERM", "file"])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_with_the_same_bits(tmp_path: Path, how):
    straight, _ = train(tmp_path / "straight", save_every=0)
    folder = tmp_path / "stopped"
    if how == "file":
        ask, reason = (folder / "STOP").touch, "the file .*STOP"
    else:
        ask, reason = lambda: os.kill(os.getpid(), signal.SIGTERM), "SIGTERM"
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=f"stopped by {reason} after step 4 of 6, which is saved"):
        train(folder, save_every=0, batch_at=asking(ask, 3))
    assert signal.getsignal(signal.SIGTERM) is before
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["4"]
    state, _ = train(folder, save_every=0)  # the STOP file of last time is gone
    assert_same(leaves(state), leaves(straight))
    assert curve(folder) == curve(tmp_path / "straight")


def test_changed_settings_are_listed_where_they_are_allowed(tmp_path: Path, capsys):
    train(tmp_path, 4)
    train(tmp_path, 6, lr=0.1, run={"allow_changes": True})
    said = capsys.readouterr().err
    assert "resumed with a change: lr: was 0.01, is 0.1\n" in said
    assert "resumed with a change: steps: was 4, is 6\n" in said
    assert len(curve(tmp_path)) == 6


def test_checkpoints_may_lie_elsewhere_and_every_so_many_stay(tmp_path: Path):
    run = {"checkpoints": str(tmp_path / "far"), "keep": 1, "keep_every": 2}
    train(tmp_path / "run", 5, save_every=1, run=run)
    assert sorted(p.name for p in (tmp_path / "far").iterdir()) == ["2", "4", "5"]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_log_tells_of_batches_rates_sources_and_utilisation(tmp_path: Path):
    cfg = tiny_model()[0]
    work = work_of(cfg, length=16, remat=0.5, devices=2, device="NVIDIA H100 80GB HBM3")
    fitting = {"describe": lambda step: {"lr": step / 10}, "work": work}
    _, records = train(tmp_path, 4, fitting=fitting)
    last = records[-1]
    assert [r["lr"] for r in records] == [0.0, 0.1, 0.2, 0.3]
    assert last["consumed_tokens"] == 4 * last["batch_tokens"] == 4 * 4 * 16
    assert last["num_documents"] == 8 and last["longest_document"] == 8
    assert last["padding"] == 0 and last["skipped_batches"] == 0
    assert last["perplexity"] == pytest.approx(np.exp(last["loss"]))
    assert last["tgs"] == pytest.approx(64 / last["seconds"] / 2)
    assert last["mfu"] == pytest.approx(last["tgs"] * work.model_flops / 989.4e12)
    assert {"tgs_last_10", "tgs_last_50", "tgs_all", "data_seconds", "save_seconds"} <= last.keys()
    stated = json.loads((tmp_path / "utilisation.json").read_text())
    assert stated["length"] == 16 and stated["remat"] == 0.5 and stated["peak_flops"] == 989.4e12
    assert "12 L N H T" in stated["formula"]


def test_a_spike_can_stop_a_run_before_it_is_saved(tmp_path: Path):
    # half of the loss before counts as a spike here, so the second step is one
    watch = WatchConfig(spike_ratio=0.5, on_spike=("log", "stop"))
    with pytest.raises(UserError, match=r"stopped at step 2: loss .* after a usual"):
        train(tmp_path, save_every=1, run={"watch": watch})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
    alerts = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert [(a["kind"], a["step"]) for a in alerts] == [("loss_spike", 2)]


def test_profiled_steps_write_a_trace(tmp_path: Path):
    train(tmp_path, 5, run={"profile_steps": "3:4"})
    traces = list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000


@pytest.mark.parametrize("steps", ["12:10", "0:3", "ten", "1:2:3"])
def test_profile_steps_that_are_none_are_refused(steps: str):
    with pytest.raises(UserError, match="give steps as FIRST:LAST, for example 10:12"):
        RunConfig(profile_steps=steps)


def test_profile_steps_reach_the_config_as_text_from_the_command_line():
    assert OverridesParser.create().parse_override("run.profile_steps=10:12").value() == "10:12"
    assert list(parse_steps("10:12")) == [10, 11, 12]


def test_event_files_hold_every_number_of_every_step(tmp_path: Path):
    pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")
    train(tmp_path, 4, run={"tensorboard": True})
    (path,) = (tmp_path / "tensorboard").iterdir()
    scalars = dict(scalars_of(path))
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("loss", "grad_norm", "perplexity"):
            assert scalars[name, line["step"]] == pytest.approx(line[name], rel=1e-6)


def scalars_of(path: Path):
    """Reads an event file: records of [length, crc, Event, crc] (tensorflow/core/lib/io)."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
        for value in event.summary.value:
            yield (value.tag, event.step), value.simple_value


def test_an_extra_that_is_not_there_is_named(tmp_path: Path):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(Missing, match=r"internjax\[wandb\]"):
        train(tmp_path, 1, run={"wandb": "project"})


def test_killed_at_random_moments_ends_with_the_same_bits(tmp_path: Path):
    straight, records = train(tmp_path / "straight", 16, save_every=1)
    folder = tmp_path / "killed"
    folder.mkdir()
    log = folder / "steps.jsonl"
    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    kills = 0
    for _ in range(2):
        seen = len(log.read_text().splitlines()) if log.exists() else 0
        target = min(seen + draw.randint(1, 7), 14)
        process = subprocess.Popen([sys.executable, "-m", "tests.training", folder, "16"], cwd=ROOT)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and len(log.read_text().splitlines()) >= target:
                break
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))  # somewhere in an update, or in the write of a checkpoint
        process.send_signal(signal.SIGKILL)
        kills += process.wait(120) == -signal.SIGKILL
    assert kills, "the run was over before it could be killed"
    state, again = train(folder, 16, save_every=1)
    assert_same(leaves(state), leaves(straight))
    assert curve(folder) == curve(tmp_path / "straight"), f"seed {seed}"
    assert [r["loss"] for r in again] == [r["loss"] for r in records]
