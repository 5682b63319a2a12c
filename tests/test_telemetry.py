"""The step log: one whole line a step, whatever happens between them."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from internjax.telemetry import StepLog, utilisation, work_of


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


def test_rates_leave_the_compiling_step_out_and_survive_a_resume(tmp_path: Path, monkeypatch):
    clock = iter([0.0, 10.0, 11.0, 13.0, 17.0, 100.0, 110.0, 112.0])
    monkeypatch.setattr("internjax.telemetry.time.perf_counter", lambda: next(clock))
    path = tmp_path / "steps.jsonl"
    metrics = {"loss": 1.0, "num_tokens": 30, "batch_tokens": 40, "finite": True}
    with log_to(path) as log:
        for step, finite in enumerate((True, False, True, True), start=1):
            log.step(step, metrics | {"finite": finite})
            log.flush()
    one, two, _, four = log.records
    assert one["tgs"] == 4 and "tgs_all" not in one  # 40 tokens in the 10 seconds of compiling
    assert two["tgs_last_10"] == 40 and four["tgs_last_50"] == pytest.approx(120 / 7)
    assert four["tgs_all"] == pytest.approx(120 / 7) and four["tgs"] == 10
    assert [r["skipped_batches"] for r in log.records] == [0, 1, 1, 1]
    assert four["tokens_per_second"] == 7.5 and four["perplexity"] == pytest.approx(math.e)
    with log_to(path, start=3) as log:
        for step in (4, 5):
            log.step(step, metrics)
            log.flush()
    assert [r["consumed_tokens"] for r in lines(path)] == [40, 80, 120, 160, 200]
    assert log.records[-1]["tgs_all"] == 20 and log.records[-1]["skipped_batches"] == 1


def test_sources_are_told_apart_and_those_without_a_token_left_out(tmp_path: Path):
    path = tmp_path / "steps.jsonl"
    metrics = {
        "source_loss_sum": jnp.array([6.0, 0.0, 5.0]),
        "source_tokens": jnp.array([3.0, 0.0, 2.0]),
        "source_correct": jnp.array([1.0, 0.0, 2.0]),
        "num_tokens": 5,
        "num_correct": 3,
    }
    names = ("cn", "en", "code")
    with StepLog(path, name="t", start=0, total=1, progress=False, sources=names) as log:
        log.step(1, metrics)
    (found,) = lines(path)
    told = {key: value for key, value in found.items() if "/" in key}
    assert told == {
        "loss/cn": 2.0,
        "loss/code": 2.5,
        "accuracy/cn": pytest.approx(1 / 3),
        "accuracy/code": 1.0,
    }
    assert found["accuracy"] == 0.6


def test_only_the_primary_process_writes(tmp_path: Path):
    path = tmp_path / "steps.jsonl"
    with log_to(path) as log:
        log.step(1, {"loss": 1.0})
    options = {"name": "test", "start": 0, "total": 9, "progress": True, "primary": False}
    with StepLog(path, **options) as log:  # it starts anew, but the lines are another's
        log.step(1, {"loss": 2.0})
    assert [r["loss"] for r in lines(path)] == [1.0] and log.records[0]["loss"] == 2.0


def test_flops_are_those_of_internevo_where_both_count_the_same():
    """Every query head has its own keys: its formula (c = 3, or 4 with recomputation) and ours."""
    cfg = SimpleNamespace(num_layers=32, d_model=4096, num_heads=32, num_kv_heads=32, head_dim=128)
    cfg.d_ff, cfg.vocab_size = 11008, 103168
    for remat in (0.0, 1.0):
        work = work_of(cfg, length=2048, remat=remat, devices=8, device="NVIDIA A100-SXM4-80GB")
        assert work.hardware_flops == pytest.approx(work.internevo_flops, rel=1e-12)
        assert work.peak_flops == 312e12
    # InternEvo's own log: 4270 tokens a second and GPU are 190 TFLOPS without recomputation.
    plain = work_of(cfg, length=2048, remat=0.0, devices=8, device="A100")
    told = utilisation(plain, 8 * 4270)
    assert told["tflops"] == pytest.approx(190, rel=0.01)
    assert told["mfu"] == told["hfu"] == pytest.approx(0.61, abs=0.005)
    half = work_of(cfg, length=2048, remat=0.5, devices=8, device="A100")
    assert half.model_flops == plain.model_flops  # recomputing is no model's work
    cfg.num_kv_heads = 8
    assert work_of(cfg, length=2048, remat=0.0, devices=8, device="A100").model_flops < 0.9 * (
        plain.model_flops
    )


def test_a_device_of_unknown_peak_has_no_utilisation_unless_its_peak_is_given():
    cfg = SimpleNamespace(num_layers=2, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4)
    cfg.d_ff, cfg.vocab_size = 16, 32
    unknown = work_of(cfg, length=4, remat=0.0, devices=1, device="cpu")
    assert "mfu" not in utilisation(unknown, 100.0) and utilisation(unknown, 100.0)["tflops"] > 0
    given = work_of(cfg, length=4, remat=0.0, devices=1, device="cpu", peak_tflops=1e-6)
    assert utilisation(given, 100.0)["mfu"] == pytest.approx(100 * given.model_flops / 1e6)
