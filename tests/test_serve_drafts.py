"""Laws of speculation: guesses change the number of steps and nothing else."""

from dataclasses import replace

import jax
import pytest
from hypothesis import given, strategies as st

from internjax.errors import UserError
from internjax.models.lm import SamplingParams
from internjax.serve.drafts import PromptLookup
from internjax.serve.engine import Engine, EngineConfig
from tests.test_serve_engine import logprobs_of, make_model, run
from tests.test_serve_paging import model  # noqa: F401  plain weights and packed ones

BASE = EngineConfig(slots=2, context=128, block=16, prefill_tokens=64, invariant=True)


def jobs():
    """A text that repeats itself, sampled and greedy; and requests that may not be guessed for."""
    loop = [5, 6, 7, 8] * 8
    same = {"ignore_eos": True, "logprobs": 1}
    return [
        (loop, SamplingParams(max_tokens=40, **same)),
        (loop[:11], SamplingParams(max_tokens=33, temperature=0.7, seed=3, **same)),
        (loop, SamplingParams(max_tokens=21, repetition_penalty=1.3, **same)),
        (loop[2:], SamplingParams(max_tokens=20, bad_words=("ab",), **same)),
        (loop[:9], SamplingParams(max_tokens=1, **same)),
    ]


def heard(news):
    return [logprobs_of(one) for one in news]


@pytest.mark.parametrize("blocks", [0, 9])
@pytest.mark.parametrize("drafted", [False, True])
def test_guesses_change_no_bit(model, drafted, blocks):  # noqa: F811
    # As many rows as the other's steps have: plain weights are invariant at one size only.
    plain = Engine(model, replace(BASE, slots=2 * 4))
    want = heard(run(plain, jobs())[1])
    draft = model if drafted else None
    engine = Engine(model, replace(BASE, speculate=3, blocks=blocks), draft=draft)
    _, news = run(engine, jobs())
    assert heard(news) == want
    stats = engine.stats
    assert stats.accepted <= stats.guessed and stats.guessed > 0
    if drafted and not blocks:  # by the model itself: its guesses of greedy answers are right
        before = replace(stats)
        run(engine, jobs()[:1])
        assert stats.accepted - before.accepted == stats.guessed - before.guessed == 30
    assert engine.scheduler.pool.held == 0


def test_a_stop_among_the_guesses_ends_the_answer():
    tiny = make_model(128)
    prompt = [9, 10, 11] * 9
    greedy = SamplingParams(max_tokens=30, ignore_eos=True)
    (full,), _ = run(Engine(tiny, BASE), [(prompt, greedy)])
    stop = replace(greedy, stop_token_ids=(full.output[5],))
    (want,), _ = run(Engine(tiny, BASE), [(prompt, stop)])
    engine = Engine(tiny, replace(BASE, speculate=3), draft=tiny)
    (got,), news = run(engine, [(prompt, stop)])
    assert got.output == want.output
    assert got.finish_reason == want.finish_reason == "stop"
    assert sum(len(d.tokens) for d in news[0]) == len(want.output)


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 5))
def test_a_lookup_finds_the_last_place(tokens, count):
    grown, lookup = [], PromptLookup()
    for token in tokens:  # in pieces or at once, it is the same
        grown.append(token)
        lookup.guess(grown, 1)
    guess = lookup.guess(tokens, count)
    assert guess == PromptLookup().guess(tokens, count)
    want = []
    for size in (4, 3, 2):
        places = [i for i in range(size, len(tokens)) if tokens[i - size : i] == tokens[-size:]]
        if len(tokens) >= size and places:
            want = tokens[places[-1] : places[-1] + count]
            break
    assert guess == want


def test_a_draft_of_another_vocabulary_is_refused():
    tiny = make_model(128)
    other = replace(tiny, cfg=replace(tiny.cfg, vocab_size=300, name="other"))
    with pytest.raises(UserError, match=r"draft=other: its vocabulary of .* must be ids of the"):
        Engine(tiny, replace(BASE, speculate=2), draft=other)
    engine = Engine(tiny, replace(BASE, speculate=2), draft=tiny)
    assert any(name.startswith("step 6") for name in engine.warm_up())
    jax.block_until_ready(engine.programs._slots)
