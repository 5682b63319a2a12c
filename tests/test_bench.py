"""The bench verb: what it measures adds up, over a tiny model in this process and over HTTP."""

import csv
import json
import threading
import time

import numpy as np
import pytest

from internjax.data.chat import encode_chat
from internjax.data.templates import TEMPLATES
from internjax.errors import Corrupt, UserError
from internjax.experiments import bench, bench_decode, bench_load, bench_rows, bench_serve
from internjax.experiments.bench_targets import Answer, checked, over_http
from internjax.serve.server import serving
from tests.fakes import byte_tokenizer
from tests.test_serve_engine import make_model


def conversation(*turns):
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


CHATS = [
    conversation(("human", f"Question {i}?"), ("gpt", "x" * length))
    for i, length in enumerate((5, 6, 7, 8, 2, 90))
] + [conversation(("gpt", "Nobody asked.")), conversation()]


@pytest.fixture
def tiny(monkeypatch):
    """The verb's `load` gives a tiny random model, whatever the name."""
    model = make_model(context=2048)
    monkeypatch.setattr("internjax.models.load.load", lambda name, dtype, packed: model)
    monkeypatch.setattr(bench_serve, "text_of", lambda cfg: (model.tokenizer, model.template))
    return model


@pytest.fixture
def sharegpt(tmp_path):
    """A ShareGPT file: four rows that fit, one too short, one too long, two malformed."""
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(CHATS), encoding="utf-8")
    return path


def test_decode_measures_every_case(tiny, tmp_path):
    cfg = bench.BenchConfig(batch=(1, 3), lengths=((1, 4), (40, 5)), rounds=2)
    rows = list(bench_decode.decode_rows(cfg))
    cases = [(row["batch"], row["prompt"], row["new"]) for row in rows]
    assert cases == [(1, 1, 4), (1, 40, 5), (3, 1, 4), (3, 40, 5)]
    for row in rows:
        first = [row[f"first_token_{name}_seconds"] for name in ("min", "mean", "max")]
        assert 0 < first[0] <= first[1] <= first[2]
        later = [row[f"token_p{p}_seconds"] for p in (50, 75, 95, 99)]
        assert later == sorted(later)
        assert row["tokens_per_second"] > 0
        assert row["peak_memory_bytes"] > 1e6
    bench_rows.write_csv(tmp_path / "new" / "rows.csv", rows)
    with (tmp_path / "new" / "rows.csv").open(encoding="utf-8") as file:
        kept = list(csv.DictReader(file))
    assert [float(row["tokens_per_second"]) for row in kept] == [
        row["tokens_per_second"] for row in rows
    ]


def test_decode_sums_rounds_up():
    """Two rounds of two requests by hand: 12 tokens in 3 + 5 seconds."""
    rounds = [np.array([[1.0, 2.0, 3.0], [1.0, 1.5, 2.0]]), np.array([[2.0, 3.0, 5.0]] * 2)]
    row = bench_decode.decode_row(rounds)
    assert row["tokens_per_second"] == 12 / 8
    assert row["first_token_mean_seconds"] == 1.5
    assert (row["first_token_min_seconds"], row["first_token_max_seconds"]) == (1.0, 2.0)
    assert row["token_p50_seconds"] == 1.0


@pytest.mark.parametrize("over", ["http", "python"])
def test_serve_static_measures_every_case(tiny, over):
    cfg = bench.BenchConfig("serve", over=over, concurrency=(1, 2), lengths=((9, 4),), rounds=2)
    rows = bench.serve(cfg)
    assert [(row["concurrency"], row["requests"]) for row in rows] == [(1, 2), (2, 4)]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(4 * row["requests_per_second"])
        assert row["total_tokens_per_second"] == pytest.approx(13 * row["requests_per_second"])
        assert 0 < row["ttft_min_seconds"] <= row["ttft_mean_seconds"] <= row["ttft_max_seconds"]
        assert row["itl_p50_seconds"] <= row["itl_p99_seconds"]
        assert row["peak_memory_bytes"] > 1e6


def test_serve_dynamic_asks_a_running_server_and_draws(tiny, sharegpt, tmp_path):
    with serving(tiny, name="tiny") as url:
        load = {"load": "dynamic", "data": (str(sharegpt),), "requests": 4, "max_total": 100}
        served = bench.BenchConfig("serve", "tiny", url=url, concurrency=(2,), **load)
        arriving = bench.BenchConfig("serve", "tiny", url=url, rate=(20.0, 50.0), **load)
        rows, rates = bench.serve(served), bench.serve(arriving)
    assert [r["rate"] for r in rates] == [20, 50]
    for row in rows + rates:
        assert row["requests_per_minute"] == pytest.approx(60 * row["requests_per_second"])
        assert row["tokens_per_second"] == pytest.approx(row["requests_per_second"] * 30 / 4)
        assert 0 < row["ttft_p50_seconds"] <= row["e2e_p50_seconds"] <= row["e2e_p99_seconds"]
        assert "peak_memory_bytes" not in row  # that of a server is its own
    page = bench_serve.plot(tmp_path / "load.html", rates, "tiny").read_text(encoding="utf-8")
    assert "Time to the first token" in page and "requests a second" in page


def test_conversations_that_fit_are_asked_for_their_answers_length(sharegpt):
    tokenizer, template = byte_tokenizer(), TEMPLATES["chatml"]
    works = bench_load.conversations(
        [str(sharegpt)], tokenizer, template, max_prompt=60, max_total=100
    )
    assert [work.prompt[0]["content"] for work in works] == [f"Question {i}?" for i in range(4)]
    chat = [*works[0].prompt, {"role": "assistant", "content": "x" * 5}]
    assert works[0].new == sum(encode_chat(tokenizer, template, chat)[1]) == 6  # and the end token
    short = {"max_prompt": 10, "max_total": 100}
    assert bench_load.conversations([str(sharegpt)], tokenizer, template, **short) == []
    with pytest.raises(UserError, match="requests=5: only 4 conversations fit"):
        bench_load.sample(works, 5, seed=0)
    (sharegpt.parent / "none.json").write_text('[{"text": "no chat"}]', encoding="utf-8")
    with pytest.raises(Corrupt, match="holds no conversation"):
        bench_load.conversations([str(sharegpt.parent / "none.json")], tokenizer, template, **short)


def test_loads_are_drawn_from_their_seed():
    first = bench_load.fixed(8, 2, 50, 259, seed=3)
    assert first == bench_load.fixed(8, 2, 50, 259, seed=3)
    assert len({tuple(work.prompt) for work in first}) == 50
    starts = bench_load.poisson(4000, 5.0, seed=0)
    gaps = np.diff(starts, prepend=0)
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.05) == pytest.approx(gaps.std(), rel=0.1)


def test_answers_sum_up_by_hand():
    """Three tokens and one token, in four seconds."""
    answers = [Answer(10, 3, (1.0, 1.5, 3.0)), Answer(20, 1, (2.0,))]
    row = bench_serve.summary(answers, 4.0, bench_serve.DYNAMIC)
    assert (row["requests_per_second"], row["requests_per_minute"]) == (0.5, 30)
    assert (row["tokens_per_second"], row["total_tokens_per_second"]) == (1.0, 8.5)
    assert (row["ttft_mean_seconds"], row["e2e_mean_seconds"]) == (1.5, 2.5)
    assert row["tpot_mean_seconds"] == 1.0  # two later tokens in two seconds; the other has none
    assert row["itl_p50_seconds"] == 1.0
    with pytest.raises(UserError, match="8 tokens were asked for with ignore_eos, 3 came"):
        checked(answers[0], bench_load.Work([1], 8))


def test_starts_are_waited_for():
    asked = []

    def ask(work):
        asked.append(work.new)
        return Answer(1, 1, (0.0,))

    works = [bench_load.Work([1], new) for new in (1, 2, 3)]
    _, seconds = bench_serve.run(ask, works, 3, lambda: None, [0.2, 0.0, 0.1])
    assert asked == [2, 3, 1]
    assert seconds >= 0.2


def test_an_error_waits_neither_for_answers_nor_for_starts():
    """Ctrl-C, too: it comes to the thread that waits for the first answer."""
    begun, free = threading.Event(), threading.Event()

    def ask(work):
        if work.new == 1:
            begun.wait(10)
            raise UserError("this server is gone")
        begun.set()
        free.wait(10)

    works = [bench_load.Work([1], new) for new in (1, 2, 3)]
    start = time.monotonic()
    with pytest.raises(UserError, match="gone"):
        bench_serve.run(ask, works, 3, lambda: None, [0.0, 0.0, 9.0])
    free.set()
    assert time.monotonic() - start < 5


def test_a_file_that_cannot_be_written_is_refused_before_measuring(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "rows.csv"):
        with pytest.raises(UserError, match="no file can be written there"):
            bench_rows.check_writable("out", out)
    bench_rows.check_writable("out", tmp_path / "new" / "rows.csv")


def test_mistakes_get_one_line(tiny):
    for changes, said in (
        ({"batch": (0,)}, r"batch=\(0,\): each number must be at least 1"),
        ({"rate": (1.0,)}, "is for load=dynamic"),
        ({"load": "dynamic", "rate": (0.0,)}, "above 0 requests a second"),
        ({"url": "http://127.0.0.1:9/v1", "over": "python"}, "leave out url="),
        ({"plot": "a.png"}, "give FILE.html"),
    ):
        with pytest.raises(UserError, match=said):
            bench.BenchConfig(**changes)
    with pytest.raises(UserError, match="2500 tokens are more than the 2048"):
        next(bench_decode.decode_rows(bench.BenchConfig(lengths=((2400, 100),))))
    with pytest.raises(UserError, match="2500 tokens of prompt and answer are more than the 2048"):
        bench.serve(bench.BenchConfig("serve", lengths=((2400, 100),)))
    with pytest.raises(UserError, match=r"url=http://127\.0\.0\.1:9/v1: no server answers there"):
        bench.serve(bench.BenchConfig("serve", url="http://127.0.0.1:9/v1"))
    with pytest.raises(UserError, match="url=ftp://x/v1: give http"):
        over_http("ftp://x/v1", "tiny", "none")
    with serving(tiny, name="tiny") as url:
        ask = over_http(url, "other", "none")
        with pytest.raises(UserError, match="refused the request: status 404"):
            ask(bench_load.Work([1], 2))
