"""The step log: one whole line a step, whatever happens between them."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import pytest

from internjax.telemetry import StepLog


def lines(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def log_to(path: Path, start: int = 0) -> StepLog:
    return StepLog(path, name="test", start=start, total=9, progress=False)


def test_every_step_has_its_line(tmp_path: Path):
    path = tmp_path / "new" / "steps.jsonl"
    with log_to(path) as log:
        for step in (1, 2, 3):
            log.step(step, {"loss": jnp.float32(step / 2), "num_tokens": 10, "finite": True})
    found = lines(path)
    assert [r["step"] for r in found] == [1, 2, 3]
    assert [r["loss"] for r in found] == [0.5, 1.0, 1.5]
    assert all(r["tokens_per_second"] == pytest.approx(10 / r["seconds"]) for r in found)
    assert log.records == found


def test_a_flushed_step_is_on_disk_at_once(tmp_path: Path):
    path = tmp_path / "steps.jsonl"
    with log_to(path) as log:
        log.step(1, {"loss": 1.0})
        assert lines(path) == []  # read one step late
        log.flush()
        assert [r["step"] for r in lines(path)] == [1]
    assert len(lines(path)) == 1


def test_a_resumed_run_repeats_no_line_and_keeps_the_others(tmp_path: Path):
    path = tmp_path / "steps.jsonl"
    with log_to(path) as log:
        for step in (1, 2, 3):
            log.step(step, {"loss": float(step)})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a process died while it wrote
    with log_to(path, start=2) as log:
        assert [r["step"] for r in log.records] == [1, 2]
        log.step(3, {"loss": 30.0})
    assert [(r["step"], r["loss"]) for r in lines(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["steps.jsonl"]


def test_what_is_no_number_is_null_in_the_file_and_itself_in_memory(tmp_path: Path):
    path = tmp_path / "steps.jsonl"
    with log_to(path) as log:
        log.step(1, {"loss": jnp.float32(jnp.nan), "grad_norm": math.inf})
    assert lines(path)[0]["loss"] is None and lines(path)[0]["grad_norm"] is None
    assert math.isnan(log.records[0]["loss"])


def test_an_exception_keeps_the_step_before_it(tmp_path: Path):
    path = tmp_path / "steps.jsonl"
    with pytest.raises(KeyboardInterrupt), log_to(path) as log:
        log.step(1, {"loss": 1.0})
        raise KeyboardInterrupt
    assert [r["step"] for r in lines(path)] == [1]
