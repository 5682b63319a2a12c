"""Scores over HTTP equal scores in process; every refusal of a server has its own clear line."""

import socket
from dataclasses import fields

import pytest

from internjax.cli import run as cli
from internjax.errors import Missing, UserError
from internjax.evals.core import Incomplete
from internjax.evals.http_lm import HttpLM, _options
from internjax.evals.run import evaluate
from internjax.models.lm import LM, RequestFailed, SamplingParams
from tests.ngram_lm import BigramLM, serve


@pytest.fixture
def lm():
    return BigramLM()


@pytest.fixture
def http(lm):
    with serve(lm) as url:
        client = HttpLM(url, "bigram", retries=0, timeout_seconds=20)
        yield client
        client.close()


def test_it_is_an_lm(http):
    assert isinstance(http, LM)


def test_every_sampling_parameter_reaches_the_server():
    given = {
        "max_tokens": 9, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1,
        "typical_p": 0.8, "seed": 4, "stop": ("x",), "stop_token_ids": (5,), "min_tokens": 2,
        "bad_words": ("y",), "repetition_penalty": 1.1, "presence_penalty": 0.1,
        "frequency_penalty": 0.2, "logit_bias": {1: 2.0}, "ignore_eos": True,
        "grammar": {"regex": "a"}, "skip_special_tokens": False,
    }  # fmt: skip
    # the calls themselves send it
    assert set(given) | {"logprobs"} == {field.name for field in fields(SamplingParams)}
    plain = _options(SamplingParams(), chat=True)
    for name, value in given.items():
        assert _options(SamplingParams(**{name: value}), chat=True) != plain, name


def test_loglikelihood_equals_the_models_own(lm, http):
    pairs = [("the water is", " cold."), ("the ice is", " warm."), ("the water is ", "cold.")]
    ours, theirs = http.loglikelihood(pairs), lm.loglikelihood(pairs)
    for one, two in zip(ours[:2], theirs[:2], strict=True):
        assert one.sum == pytest.approx(two.sum, abs=1e-9)
        assert (one.num_tokens, one.is_greedy) == (two.num_tokens, two.is_greedy)
    # A space that ends the context belongs to the continuation.
    assert ours[2] == ours[0]
    likeliest = lm.generate(["the"], SamplingParams(max_tokens=5))[0].text
    assert http.loglikelihood([("the", likeliest)])[0].is_greedy
    assert not http.loglikelihood([("the", " zebra")])[0].is_greedy


def test_letters_of_several_bytes_score_alike(lm, http):
    """Their tokens are parts of letters, whose texts do not add up to the prompt's offsets."""
    pairs = [("水は", " 冷たい"), ("the ice is ", "kühl"), ("größer", " or é")]
    ours, theirs = http.loglikelihood(pairs), lm.loglikelihood(pairs)
    assert [s.num_tokens for s in ours] == [1 + 9, 1 + 5, 1 + 2 + 1 + 2]
    for one, two in zip(ours[::2], theirs[::2], strict=True):
        assert one.sum == pytest.approx(two.sum, abs=1e-9)


def test_choices_score_alike_over_http(lm, http):
    near, far = (evaluate(model, ["retention_choices"], limit=20) for model in (lm, http))
    assert far.scores[0] == near.scores[0]
    assert {row.id for row in far.rows} == {row.id for row in near.rows}


def test_generation_and_streaming(lm, http):
    chat, params = [{"role": "user", "content": "i am"}], SamplingParams(max_tokens=12)
    (answer,) = http.generate([chat], params)
    assert answer.text == lm.generate([chat], params)[0].text and len(answer.text) == 12
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 12)
    assert "".join(http.stream(chat, params)) == answer.text
    assert "".join(http.stream("i am", params)) == http.generate(["i am"], params)[0].text
    (short,) = http.generate(["i am"], SamplingParams(max_tokens=12, stop=(" ",)))
    assert " " not in short.text and short.finish_reason == "stop"


def test_answers_keep_the_order_of_the_prompts(lm, http):
    prompts, params = (
        [f"say {word}" for word in ["the", "ice", "is", "cold"]],
        SamplingParams(max_tokens=8),
    )
    done = []
    answers = http.generate(prompts, params, lambda *count: done.append(count))
    assert [a.text for a in answers] == [a.text for a in lm.generate(prompts, params)]
    assert done[-1] == (4, 4)


def test_options_travel_in_the_words_of_the_api(lm):
    bodies = []
    with serve(lm, lambda body: bodies.append(body)) as url:
        http = HttpLM(url, "m", retries=0)
        schema = {"type": "object"}
        http.generate(
            [[{"role": "user", "content": "x"}]],
            SamplingParams(
                max_tokens=3, seed=7, top_k=5, logit_bias={9: 1.5}, grammar={"json_schema": schema}
            ),
        )
        http.generate(["x"], SamplingParams(max_tokens=3, grammar={"choice": ["a", "b"]}))
        http.close()
    first, second = bodies
    assert first["model"] == "m" and first["seed"] == 7 and first["temperature"] == 0
    assert first["top_k"] == 5 and "min_p" not in first and "ignore_eos" not in first
    assert first["logit_bias"] == {"9": 1.5}
    assert first["response_format"]["json_schema"]["schema"] == schema
    assert second["grammar"] == {"choice": ["a", "b"]}


def test_bits_per_byte_need_an_opening_token(lm):
    with serve(lm) as url:
        http = HttpLM(url, "bigram", retries=0)
        with pytest.raises(UserError, match="need bos="):
            http.loglikelihood_rolling(["the ice"])
        http.close()
        opened = HttpLM(url, "bigram", retries=0, bos="\0")
        ours, theirs = (m.loglikelihood_rolling(["the ice", "warm"]) for m in (opened, lm))
        opened.close()
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_a_server_that_ignores_echo_is_refused(lm):
    """Accepting the flag and scoring the generated token instead would break results silently."""
    with serve(lm) as url:
        http = HttpLM(url, "bigram", retries=0)
        create = http._client.completions.create
        http._client.completions.create = lambda **options: create(**options | {"echo": False})
        with pytest.raises(UserError, match="does not echo"):
            http.loglikelihood([("the", " ice")])
        http.close()


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (500, RequestFailed, "request 1 of 1"),
        (400, RequestFailed, "refused by the test"),
        (401, UserError, "refuses the key"),
        (404, Missing, "no model 'bigram'"),
    ],
)
def test_refusals(lm, status, error, said):
    with serve(lm, lambda body: status) as url:
        http = HttpLM(url, "bigram", retries=0)
        with pytest.raises(error, match=said):
            http.generate(["x"], SamplingParams(max_tokens=3))
        http.close()


def test_no_server_is_one_clear_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    http = HttpLM(f"http://127.0.0.1:{port}/v1", "bigram", retries=0)
    with pytest.raises(Missing, match="No server answers"):
        http.generate(["x"], SamplingParams(max_tokens=3))
    http.close()


def test_a_server_that_fails_one_request_costs_one_sample(lm):
    fail = lambda body: 500 if "Italy" in str(body.get("prompt")) else None  # noqa: E731
    with serve(lm, fail) as url:
        http = HttpLM(url, "bigram", retries=0)
        with pytest.raises(Incomplete, match="choice-018") as caught:
            evaluate(http, ["retention_choices"])
        http.close()
    assert caught.value.results.scores[0].n == 142


def test_the_command_evaluates_a_server_and_compares(lm, tmp_path, capsys):
    with serve(lm) as url:
        line = ["evaluate", "bigram", f"base_url={url}", "tasks=[retention_choices,identity]"]
        assert cli([*line, "limit=12", f"out={tmp_path / 'one'}"]) == 0
        said = capsys.readouterr().out
        assert "retention_choices" in said and "25.0%" in said and "identity" in said
        against = f"against={tmp_path / 'one' / 'results.json'}"
        assert cli([*line, "limit=12", against]) == 0
        assert "0/0" in capsys.readouterr().out
        assert cli([*line, "limit=11", against]) == 2
        assert "use the same limit and seed" in capsys.readouterr().err


def test_the_command_lists_tasks_and_refuses_unknown_ones(capsys):
    assert cli(["evaluate", "list=true"]) == 0
    assert "commonsense" in capsys.readouterr().out
    assert cli(["evaluate", "m", "tasks=[nothing]"]) == 2
    assert "No task 'nothing'" in capsys.readouterr().err
    assert cli(["evaluate"]) == 2
    assert "needs a model" in capsys.readouterr().err
