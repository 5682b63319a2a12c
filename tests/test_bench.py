"""The bench verb: what it measures adds up, over a tiny model in this process and over HTTP."""

import csv

import numpy as np
import pytest

from internjax.chain.online import Stream
from internjax.errors import UserError
from internjax.experiments import bench
from internjax.serve.server import serving
from tests.test_serve_engine import make_model


@pytest.fixture
def tiny(monkeypatch):
    """The verb's `load` gives a tiny random model, whatever the name."""
    model = make_model(context=2048)
    monkeypatch.setattr("internjax.models.load.load", lambda name, dtype, packed: model)
    return model


def test_decode_measures_every_case(tiny, tmp_path):
    cfg = bench.BenchConfig(batch=(1, 3), lengths=((1, 4), (40, 5)), rounds=2)
    rows = list(bench.decode_rows(cfg))
    cases = [(row["batch"], row["prompt"], row["new"]) for row in rows]
    assert cases == [(1, 1, 4), (1, 40, 5), (3, 1, 4), (3, 40, 5)]
    for row in rows:
        first = [row[f"first_token_{name}_seconds"] for name in ("min", "mean", "max")]
        assert 0 < first[0] <= first[1] <= first[2]
        later = [row[f"token_p{p}_seconds"] for p in (50, 75, 95, 99)]
        assert later == sorted(later)
        assert row["tokens_per_second"] > 0
        assert row["peak_memory_bytes"] > 1e6
    bench.write_csv(tmp_path / "new" / "rows.csv", rows)
    with (tmp_path / "new" / "rows.csv").open(encoding="utf-8") as file:
        kept = list(csv.DictReader(file))
    assert [float(row["tokens_per_second"]) for row in kept] == [
        row["tokens_per_second"] for row in rows
    ]


def test_decode_sums_rounds_up():
    """Two rounds of two requests by hand: 12 tokens in 3 + 5 seconds."""
    rounds = [np.array([[1.0, 2.0, 3.0], [1.0, 1.5, 2.0]]), np.array([[2.0, 3.0, 5.0]] * 2)]
    row = bench.decode_row(rounds)
    assert row["tokens_per_second"] == 12 / 8
    assert row["first_token_mean_seconds"] == 1.5
    assert (row["first_token_min_seconds"], row["first_token_max_seconds"]) == (1.0, 2.0)
    assert row["token_p50_seconds"] == 1.0


def test_serve_measures_a_running_server(tiny):
    with serving(tiny, name="tiny") as url:
        cfg = bench.BenchConfig(
            "serve", "tiny", url=url, concurrency=(1, 2), requests=3, max_tokens=4
        )
        rows = list(bench.serve_rows(cfg))
    assert [row["concurrency"] for row in rows] == [1, 2]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(4 * row["requests_per_second"])
        assert 0 < row["first_token_p50_seconds"] <= row["answer_p50_seconds"]


def test_serve_sums_streams_up():
    row = bench.serve_row([Stream(5, 1.0, 3.0), Stream(1, 2.0, 2.0)], 4.0)
    assert (row["requests_per_second"], row["tokens_per_second"]) == (0.5, 1.5)
    assert row["first_token_mean_seconds"] == 1.5
    assert row["token_p50_seconds"] == 0.25  # half a second a later token, and none


def test_mistakes_get_one_line(tiny):
    with pytest.raises(UserError, match=r"batch=\(0,\): each number must be at least 1"):
        bench.BenchConfig(batch=(0,))
    with pytest.raises(UserError, match="2500 tokens are more than the 2048"):
        next(bench.decode_rows(bench.BenchConfig(lengths=((2400, 100),))))
    with pytest.raises(UserError, match=r"url=http://127\.0\.0\.1:9/v1: no server answers there"):
        next(bench.serve_rows(bench.BenchConfig("serve", url="http://127.0.0.1:9/v1")))
