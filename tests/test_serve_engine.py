"""Laws of the engine on a tiny random model: alone = among others, clean slots, fair errors."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.data.templates import TEMPLATES
from internjax.errors import UserError
from internjax.models.decoder import forward
from internjax.models.lm import SamplingParams
from internjax.models.load import Model
from internjax.serve.engine import Engine, EngineConfig
from internjax.serve.scheduler import QueueFull
from tests.fakes import BYTE_VOCAB, byte_tokenizer, tiny_model

# One shape for all tests: compiled programs are shared by every engine of it.
CONFIG = EngineConfig(slots=4, context=256, prefill_tokens=64, prefix_cache=False)


def make_model(context=512, **changes):
    cfg, params = tiny_model(max_context=context, **changes)
    # Random weights of std 0.02 give nearly flat logits: larger ones make texts differ.
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)
    return Model(cfg, params, byte_tokenizer(), TEMPLATES["chatml"], path=Path(__file__))


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, CONFIG)


def prompts(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, n).tolist() for n in lengths]


def run(engine, jobs):
    """Runs (prompt, params) jobs together; returns requests and their joined news."""
    news = [[] for _ in jobs]
    requests = [engine.submit(p, s, n.append) for (p, s), n in zip(jobs, news, strict=True)]
    while engine.step():
        pass
    assert engine.in_flight() == 0
    return requests, news


def test_greedy_is_argmax_of_the_full_forward(model, engine):
    (prompt,) = prompts(70)
    (request,), _ = run(engine, [(prompt, SamplingParams(max_tokens=12, ignore_eos=True))])
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(forward(model.params, jnp.asarray([ids]), model.cfg)[0, -1].argmax()))
    assert request.output == ids[70:]


def logprobs_of(news):
    return [entry for delta in news for entry in delta.logprobs]


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_alone_is_among_others(model, kv_dtype):
    engine = Engine(model, replace(CONFIG, kv_dtype=kv_dtype))
    greedy = SamplingParams(max_tokens=16, logprobs=2, ignore_eos=True)
    drawn = SamplingParams(max_tokens=20, temperature=1.0, seed=5, top_p=0.9, logprobs=0)
    penal = SamplingParams(max_tokens=9, repetition_penalty=1.5, logprobs=1, logit_bias={7: 2.0})
    short = [
        (p, (greedy, drawn, penal)[i % 3]) for i, p in enumerate(prompts(1, 2, 33, 64, 99, 40))
    ]
    together, heard = run(engine, short)
    # 200 makes the others attend to a longer stretch of the cache than they do alone
    longer, heard_longer = run(engine, [*short, (prompts(200)[0], greedy)])
    for i, job in enumerate(short):
        (alone,), (heard_alone,) = run(engine, [job])
        expected = logprobs_of(heard_alone)
        assert alone.output == together[i].output == longer[i].output
        # bitwise, without tolerance: the shapes are the same whoever is there
        assert logprobs_of(heard[i]) == expected
        # a longer stretch is summed in another order: last bits of float32
        assert [e.logprob for e in logprobs_of(heard_longer[i])] == pytest.approx(
            [e.logprob for e in expected], abs=1e-5
        )
    backwards, _ = run(engine, short[::-1])
    assert [r.output for r in backwards[::-1]] == [r.output for r in together]


def test_quantized_and_plain_caches_agree(model):
    jobs = [(p, SamplingParams(max_tokens=8, logprobs=0, ignore_eos=True)) for p in prompts(50, 9)]
    texts = {}
    for kv in ("float32", "int8", "int4"):
        _, news = run(Engine(model, replace(CONFIG, kv_dtype=kv)), jobs)
        texts[kv] = [n[0].logprobs[0].logprob for n in news]
    # int8 keeps 7 bits of each key and value: the first token's logprob moves by a few percent
    assert texts["int8"] == pytest.approx(texts["float32"], abs=0.1)
    assert texts["int4"] == pytest.approx(texts["float32"], abs=1.0)
    assert texts["int4"] != texts["int8"] != texts["float32"]


def test_length_stop_and_eos(model, engine):
    (prompt,) = prompts(20)
    (full,), (news,) = run(engine, [(prompt, SamplingParams(max_tokens=24, ignore_eos=True))])
    assert full.finish_reason == "length"
    assert len(full.output) == 24
    text = "".join(d.text for d in news)
    assert text == model.tokenizer.decode(full.output, skip_specials=True)
    stop = text[6:9]
    (cut,), (news,) = run(
        engine, [(prompt, SamplingParams(max_tokens=24, stop=(stop,), ignore_eos=True))]
    )
    assert cut.finish_reason == "stop"
    assert "".join(d.text for d in news) == text[: text.index(stop)]
    bias = SamplingParams(max_tokens=24, logit_bias={model.tokenizer.eos_id: 100.0})
    (ended,), (news,) = run(engine, [(prompt, bias)])
    assert (ended.finish_reason, ended.output) == ("stop", [model.tokenizer.eos_id])
    assert "".join(d.text for d in news) == ""


def test_seed_decides(engine):
    (prompt,) = prompts(10)
    warm = {"max_tokens": 16, "temperature": 1.0, "ignore_eos": True}
    jobs = [(prompt, SamplingParams(seed=s, **warm)) for s in (1, 1, 2, None, None)]
    requests, _ = run(engine, jobs)
    first, again, other, *free = [r.output for r in requests]
    assert first == again
    assert len({tuple(x) for x in (first, other, *free)}) == 4


def test_cancel_frees_the_slot(engine):
    jobs = [(p, SamplingParams(max_tokens=100, ignore_eos=True)) for p in prompts(*[30] * 6)]
    news = [[] for _ in jobs]
    requests = [engine.submit(p, s, n.append) for (p, s), n in zip(jobs, news, strict=True)]
    for _ in range(4):
        engine.step()
    for request in requests:
        engine.cancel(request)
    engine.step()
    assert engine.in_flight() == 0
    assert all(n[-1].finish_reason == "cancelled" for n in news)
    assert all(r is None for r in engine.scheduler.slots)


def test_poisoned_request_fails_alone(model):
    params = {**model.params, "embed": model.params["embed"].at[200].set(jnp.nan)}
    cfg = model.cfg
    params["head"] = model.params["embed"].T  # untied, so that only token 200 is poison
    untied = tiny_model(max_context=512, tie_embeddings=False)[0]
    engine = Engine(Model(untied, params, model.tokenizer, model.template, Path(__file__)), CONFIG)
    good, longer = ([t % 200 for t in p] for p in prompts(40, 90))
    params_ = SamplingParams(max_tokens=6, ignore_eos=True, logit_bias={200: -100.0})
    alone, _ = run(engine, [(good, params_)])
    jobs = [(good, params_), ([*longer[:50], 200, *longer[:20]], params_), (good, params_)]
    (first, bad, second), news = run(engine, jobs)
    assert bad.finish_reason == "error"
    assert "NaN" in news[1][-1].error
    assert first.output == second.output == alone[0].output
    # the slot that held NaN serves its next owners as any other
    again, _ = run(engine, [(good, params_)] * cfg.num_heads)
    assert all(r.output == alone[0].output for r in again)


def test_an_id_without_a_text_fails_its_request_alone():
    padded = make_model(vocab_size=BYTE_VOCAB + 5)
    engine = Engine(padded, CONFIG)
    (prompt,) = prompts(9)
    plain = SamplingParams(max_tokens=3, ignore_eos=True, logit_bias={65: 100.0})
    beyond = SamplingParams(max_tokens=3, logit_bias={BYTE_VOCAB + 1: 100.0})
    (bad, good), news = run(engine, [(prompt, beyond), (prompt, plain)])
    assert bad.finish_reason == "error"
    assert f"id {BYTE_VOCAB + 1}, which its tokenizer does not have" in news[0][-1].error
    assert good.output == [65] * 3


def test_failed_round_keeps_the_engine(engine, monkeypatch):
    (prompt,) = prompts(20)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    (before,), _ = run(engine, [(prompt, params)])
    heard = []
    engine.submit(prompt, params, heard.append)
    engine.step()
    engine.fail_all("the engine failed: test")
    assert heard[-1].finish_reason == "error"
    (after,), _ = run(engine, [(prompt, params)])
    assert after.output == before.output


def test_refusals(model, engine):
    say = [].append
    with pytest.raises(UserError, match=r"250 tokens and max_tokens=13, together 263.*256"):
        engine.submit([1] * 250, SamplingParams(max_tokens=13), say)
    with pytest.raises(UserError, match="empty"):
        engine.submit([], SamplingParams(), say)
    with pytest.raises(UserError, match=r"token id 259 is outside 0\.\.258"):
        engine.submit([259], SamplingParams(), say)
    with pytest.raises(UserError, match=r"logprobs=21"):
        engine.submit([1], SamplingParams(logprobs=21), say)
    with pytest.raises(UserError, match="logit_bias"):
        engine.submit([1], SamplingParams(logit_bias={999: 1.0}), say)
    with pytest.raises(UserError, match="longer than the model"):
        Engine(model, EngineConfig(context=1024))
    small = Engine(model, EngineConfig(slots=1, context=64, max_waiting=2))
    for _ in range(2):
        small.submit([1, 2], SamplingParams(max_tokens=2), say)
    with pytest.raises(QueueFull):
        small.submit([1, 2], SamplingParams(max_tokens=2), say)


def test_prompt_fills_the_context(model):
    engine = Engine(model, replace(CONFIG, context=300))
    assert engine.context == 256
    for length in (255, 250, 193):
        params = SamplingParams(max_tokens=256 - length, ignore_eos=True)
        ids = list(prompts(length)[0])
        (request,), _ = run(engine, [(ids, params)])
        first = int(forward(model.params, jnp.asarray([ids]), model.cfg)[0, -1].argmax())
        assert request.output[0] == first
        assert len(request.output) == 256 - length


def test_warm_up_leaves_nothing_to_compile(model):
    engine = Engine(model, CONFIG)
    names = engine.warm_up()
    met = engine.stats.programs
    assert len(names) == met
    warm = SamplingParams(max_tokens=4, temperature=1.0, logprobs=3)
    run(engine, [(p, warm) for p in prompts(1, 30, 100, 180)])
    assert engine.stats.programs == met
