"""`LocalLM` against the plain forward pass, windows of long texts, and `pipeline`."""

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.errors import UserError
from internjax.models.decoder import forward
from internjax.models.lm import LM, SamplingParams
from internjax.models.load import load
from internjax.serve.engine import EngineConfig
from internjax.serve.local import LocalLM, fingerprint, rolling_windows
from internjax.serve.pipeline import async_pipeline, pipeline
from tests.test_serve_engine import CONFIG, make_model


@pytest.fixture(scope="module")
def model():
    return make_model()


def reference(model, ids, first):
    """Sum of log p(ids[first:]) and whether all were likeliest, from the whole logits."""
    logits = np.asarray(forward(model.params, jnp.asarray([ids]), model.cfg)[0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = ids[first:]
    rows = logprobs[first - 1 : -1]
    return rows[np.arange(len(targets)), targets].sum(), (rows.argmax(-1) == targets).all()


def test_loglikelihood_is_the_forward_pass(model):
    lm = LocalLM(model)
    assert isinstance(lm, LM)
    pairs = [("the cat", " sat"), ("a ", "b"), ("", "alone"), ("x" * 100, "yz")]
    # the space that ends a context belongs to the continuation; nothing means BOS
    cuts = [(b"the cat", b" sat"), (b"a", b" b"), (None, b"alone"), (b"x" * 100, b"yz")]
    seen = []
    scores = lm.loglikelihood(pairs, progress=lambda done, total: seen.append((done, total)))
    for (context, continuation), score in zip(cuts, scores, strict=True):
        head = [model.tokenizer.bos_id] if context is None else list(context)
        total, greedy = reference(model, [*head, *continuation], len(head))
        assert score.sum == pytest.approx(total, abs=1e-4)
        assert (score.num_tokens, score.is_greedy) == (len(continuation), greedy)
    assert seen[-1] == (4, 4)
    with pytest.raises(UserError, match="empty continuation"):
        lm.loglikelihood([("a", "")])


@pytest.mark.parametrize(("length", "limit"), [(0, 8), (5, 8), (8, 8), (9, 8), (31, 8), (16, 1)])
def test_rolling_windows_score_each_token_once(length, limit):
    ids = list(range(100, 100 + length))
    windows = rolling_windows(ids, 1, limit)
    assert [i for _, continuation in windows for i in continuation] == ids
    for number, (context, continuation) in enumerate(windows):
        assert context
        assert len(context) + len(continuation) <= limit + 1
        before = [1, *ids][: 1 + (continuation[0] - 100)]
        assert list(context) == before[len(before) - len(context) :]
        assert number == 0 or len(context) + len(continuation) == limit + 1


def test_rolling_is_the_forward_pass(model):
    text = "some words, 书"
    (nats,) = LocalLM(model).loglikelihood_rolling([text])
    ids = [model.tokenizer.bos_id, *text.encode()]
    assert nats == pytest.approx(reference(model, ids, 1)[0], abs=1e-4)


def test_generate_stream_and_pipeline_agree(model):
    lm = LocalLM(model, CONFIG)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    chat = [{"role": "user", "content": "hi"}]
    many = lm.generate(["abc", chat] * 5, params)
    assert [g.text for g in many] == [many[0].text, many[1].text] * 5
    assert "".join(lm.stream(chat, params)) == many[1].text
    stream = lm.stream(chat, params)
    next(stream)
    stream.close()
    assert lm.engine.in_flight() == 0
    pipe = pipeline(model, slots=CONFIG.slots, context=CONFIG.context, max_tokens=8)
    options = {"ignore_eos": True}
    assert pipe("hi", **options).text == many[1].text
    assert pipe(chat, **options).text == many[1].text
    assert [g.text for g in pipe(["hi", chat], **options)] == [many[1].text] * 2
    assert pipe("abc", raw=True, **options).text == many[0].text
    assert "".join(pipe.stream("hi", **options)) == many[1].text


def test_a_batch_may_be_any_iterable_and_shows_a_bar(model, capsys, monkeypatch):
    pipe = pipeline(model, slots=CONFIG.slots, context=CONFIG.context, max_tokens=4)
    one = pipe("hi", ignore_eos=True).text
    seen = []
    many = pipe(("hi" for _ in range(3)), ignore_eos=True, progress=lambda *x: seen.append(x))
    assert [g.text for g in many] == [one] * 3
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert pipe(iter(()), progress=True) == []
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    pipe(["hi"] * 2, ignore_eos=True, progress=True)
    assert "answers" in capsys.readouterr().err


def test_an_event_loop_is_answered_as_a_caller_is(model):
    options = {"slots": CONFIG.slots, "context": CONFIG.context, "max_tokens": 8}
    want = pipeline(model, **options)("hi", ignore_eos=True)

    async def ask():
        async with async_pipeline(model, **options) as pipe:
            answers = await asyncio.gather(*(pipe("hi", ignore_eos=True) for _ in range(9)))
            pieces = [piece async for piece in pipe.stream("hi", ignore_eos=True)]
            with pytest.raises(UserError, match="the context holds"):
                await pipe("hi", max_tokens=10_000)
            left = asyncio.create_task(pipe("hi", ignore_eos=True, max_tokens=200))
            await asyncio.sleep(0.05)
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left
            assert pipe.lm.engine.stats.max_in_flight > 1
        assert pipe.lm.engine.in_flight() == 0
        return answers, pieces

    answers, pieces = asyncio.run(ask())
    assert answers == [want] * 9
    assert "".join(pieces) == want.text


def test_name_tells_weights_apart(model):
    other = jax.tree.map(lambda x: x, model.params)
    other["final_norm"] = other["final_norm"].at[3].add(1e-3)
    assert fingerprint(model.params) == fingerprint(dict(model.params))
    assert fingerprint(model.params) != fingerprint(other)
    assert LocalLM(model, name="mine").name == "mine"
    assert LocalLM(model).name.startswith("tiny@")


@pytest.mark.needs_model
def test_smollm2_says_what_the_reference_says(smollm2_gguf):
    """Ids of an independent NumPy implementation of the dequantized model, greedy."""
    lm = LocalLM(load(smollm2_gguf), EngineConfig(slots=1, context=128))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (answer,) = lm.generate([question], SamplingParams(max_tokens=12))
    assert answer.prompt_tokens == 37
    assert answer.token_ids[:7] == (504, 3575, 282, 4649, 314, 7042, 30)
    assert answer.text == "The capital of France is Paris."
    assert answer.finish_reason == "stop"
