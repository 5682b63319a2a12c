"""Bad words, minimal lengths and stop tokens through the engine, beside other requests."""

import re
from dataclasses import replace

import pytest

from internjax.errors import UserError
from internjax.models.lm import SamplingParams
from internjax.serve.bans import ALWAYS, MAX_BANS, request_bans
from internjax.serve.engine import Engine, EngineConfig
from tests.fakes import byte_tokenizer
from tests.test_serve_engine import CONFIG, make_model, prompts, run

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_id


@pytest.fixture(scope="module")
def engine():
    return Engine(make_model(), CONFIG)


def text_of(news):
    return "".join(delta.text for delta in news)


def test_bad_words_never_come_and_nothing_else_changes(engine):
    (prompt,) = prompts(12)
    free = SamplingParams(max_tokens=60, temperature=1.0, seed=3, ignore_eos=True)
    (open_,), _ = run(engine, [(prompt, free)])
    # three tokens that the free run writes, of which the last is forbidden after the other two
    at = next(i for i in range(9, 50) if all(32 < t < 127 for t in open_.output[i : i + 3]))
    word = TOKENIZER.decode(open_.output[at : at + 3])
    options = {"max_tokens": 60, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    banned = SamplingParams(bad_words=(word,), **options)
    requests, _ = run(engine, [(prompt, banned), (prompt, free), (prompt, banned)])
    assert requests[1].output == open_.output
    assert requests[0].output == requests[2].output
    assert requests[0].output[: at + 2] == open_.output[: at + 2]
    assert requests[0].output[at + 2] != open_.output[at + 2]
    assert word.encode() not in bytes(t for t in requests[0].output if t < 256)


def test_min_tokens_hold_back_every_end(engine):
    (prompt,) = prompts(5)
    hurry = {"max_tokens": 20, "logit_bias": {EOS: 100.0, 65: 90.0}}
    for changes, length, last in (
        ({}, 1, EOS),
        ({"min_tokens": 7}, 8, EOS),
        ({"min_tokens": 7, "stop_token_ids": (65,)}, 8, EOS),
        ({"stop_token_ids": (65,), "ignore_eos": True, "logit_bias": {65: 100.0}}, 1, 65),
        ({"min_tokens": 20}, 20, 65),
    ):
        params = SamplingParams(**(hurry | changes))
        (request,), (news,) = run(engine, [(prompt, params)])
        assert len(request.output) == length, changes
        assert request.output[-1] == last
        assert request.finish_reason == ("length" if length == 20 else "stop")
        if "stop_token_ids" in changes:
            assert "A" not in text_of(news)
    stops = SamplingParams(max_tokens=20, min_tokens=4, stop=("AA",), logit_bias={65: 100.0})
    (request,), (news,) = run(engine, [(prompt, stops)])
    assert (len(request.output), text_of(news)) == (4, "AA")


def test_words_are_spelled_at_a_line_start_and_after_a_space():
    params = SamplingParams(bad_words=("ab",), min_tokens=2, max_tokens=9, stop_token_ids=(7,))
    bans = request_bans(params, TOKENIZER, 10)
    # the byte vocabulary spells " ab" with "ab" at its end: one ban does for both
    assert bans[0] == ((97, 98), ALWAYS)
    assert {(ids, until) for ids, until in bans[1:]} == {
        ((i,), 12) for i in (7, *TOKENIZER.eos_ids)
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bad_words": ("",)}, "empty"),
        ({"bad_words": ("nine letters",)}, "at most 8"),
        ({"bad_words": tuple(f"{i:03}" for i in range(MAX_BANS + 1))}, "at most 64"),
        ({"stop_token_ids": (9999,)}, "9999"),
    ],
)
def test_what_cannot_be_forbidden_is_refused(engine, changes, reason):
    with pytest.raises(UserError, match=reason):
        engine.submit([1], SamplingParams(**changes), [].append)
    assert engine.in_flight() == 0


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="grammar"):
        SamplingParams(min_tokens=1, grammar={"regex": "a"})
    with pytest.raises(ValueError, match="max_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_bans_that_leave_a_grammar_no_token_fail_that_request_alone(engine):
    free = ([1, 2], SamplingParams(max_tokens=8, ignore_eos=True))
    (alone,), _ = run(engine, [free])
    stuck = SamplingParams(grammar={"regex": "xy"}, bad_words=("xy",))
    requests, news = run(engine, [([5], stuck), free])
    assert requests[0].finish_reason == "error"
    assert "no token" in news[0][-1].error
    assert requests[1].output == alone.output


@pytest.mark.slow
def test_a_request_that_was_put_back_keeps_its_bans_and_its_grammar():
    small = EngineConfig(slots=4, context=128, block=16, prefill_tokens=64, invariant=True)
    model = make_model(128)
    # of every byte, the runs below repeat few: bans of two tokens bite often
    words = tuple(chr(a) + chr(b) for a, b in zip(range(97, 121), range(98, 122), strict=True))
    options = {"max_tokens": 60, "temperature": 1.0, "logprobs": 0}
    likely = dict.fromkeys(range(97, 123), 6.0)
    kinds = [
        SamplingParams(seed=1, bad_words=words, min_tokens=60, logit_bias=likely, **options),
        SamplingParams(seed=2, min_tokens=40, logit_bias={EOS: 9.0}, typical_p=0.9, **options),
        SamplingParams(seed=3, grammar={"regex": "([a-d]{3} ){15}"}, **options),
    ]
    jobs = [(p, kinds[i % 3]) for i, p in enumerate(prompts(20, 21, 30, 22, 25, 31))]
    crowded = Engine(model, replace(small, blocks=10))
    requests, news = run(crowded, jobs)
    assert crowded.stats.preempted > 0
    roomy = Engine(model, small)
    for job, request, heard in zip(jobs, requests, news, strict=True):
        (alone,), (quiet,) = run(roomy, [job])
        assert (request.output, text_of(heard)) == (alone.output, text_of(quiet))
        assert not any(word in text_of(heard) for word in job[1].bad_words)
    assert roomy.stats.preempted == 0
    assert re.fullmatch("([a-d]{3} ){15}", text_of(news[2]))
    assert len(requests[1].output) > 40
