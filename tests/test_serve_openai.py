"""The HTTP contract: the public `openai` client against a real server on a tiny random model."""

import asyncio
import json
import re
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest

from internjax.errors import UserError
from internjax.models.lm import SamplingParams
from internjax.serve.engine import EngineConfig
from internjax.serve.local import LocalLM
from internjax.serve.server import serving
from tests.test_serve_engine import make_model

ENGINE = EngineConfig(slots=8, context=1536, max_waiting=64)
HI = [{"role": "user", "content": "hi"}]
CALC = {
    "type": "function",
    "function": {
        "name": "calc",
        "description": "adds",
        "parameters": {
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["n"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def model():
    return make_model(context=2048)


@pytest.fixture(scope="module")
def url(model):
    with serving(model, name="tiny", engine=ENGINE, default_max_tokens=32) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


def chat(client, messages=HI, **changes):
    options = {"model": "tiny", "max_tokens": 12, "temperature": 0.0} | changes
    return client.chat.completions.create(messages=messages, **options)


def complete(client, prompt="abc", **changes):
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0.0} | changes
    return client.completions.create(prompt=prompt, **options)


def metric(url, name):
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
        return float(re.search(rf"^internjax_{name} (\S+)$", answer.read().decode(), re.M)[1])


def idle(url, seconds=20):
    deadline = time.monotonic() + seconds
    while metric(url, "in_flight") and time.monotonic() < deadline:
        time.sleep(0.02)
    return metric(url, "in_flight") == 0


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"model": "other"}, 404, "tiny"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "robot"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n:"),
        ({"max_tokens": 100_000}, 400, r"100021.*1536|21 tokens.*1536"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, 400, r"\d{4}.*1536"),
        ({"logit_bias": {"99999": 1}}, 400, "99999"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias"),
        ({"top_logprobs": 2}, 400, "logprobs=true"),
        ({"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs"),
        ({"extra_body": {"tempreature": 1}}, 400, "tempreature"),
        ({"tool_choice": "required"}, 400, "no tools"),
        ({"tools": [CALC], "tool_choice": {"type": "function", "function": {}}}, 400, "none of"),
        ({"tools": [CALC, CALC]}, 400, "same name"),
        ({"extra_body": {"grammar": {"regex": "("}}}, 400, "regex"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {
                "type": "array", "uniqueItems": True}}}},
            400,
            "uniqueItems",
        ),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_with_the_reason(client, changes, status, says):
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, **changes)
    assert caught.value.status_code == status
    body = caught.value.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code", "request_id"}
    assert body["request_id"] == caught.value.response.headers["x-request-id"]
    assert re.search(says, body["message"])


def test_routes_that_are_not_there(client):
    with pytest.raises(openai.NotFoundError):
        client.moderations.create(input="x")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert client.models.list().data[0].id == "tiny"


def test_chat_equals_local_and_stream_equals_whole(model, client):
    local = LocalLM(model, EngineConfig(slots=8, context=1536))
    expected = local.generate([HI], SamplingParams(max_tokens=12))[0]
    whole = chat(client)
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert whole.usage.prompt_tokens == expected.prompt_tokens
    assert whole.usage.completion_tokens == expected.completion_tokens
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == expected.text
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert chunks[-1].usage == whole.usage


def test_seed_repeats_under_load_and_n_differs(client):
    warm = {"temperature": 1.0, "seed": 11, "max_tokens": 10}
    alone = chat(client, **warm).choices[0].message.content
    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(chat, client, temperature=1.0) for _ in range(8)]
        again = pool.submit(chat, client, **warm).result().choices[0].message.content
        assert len([o.result() for o in others]) == 8
    assert again == alone
    several = chat(client, n=4, **warm)
    texts = [c.message.content for c in several.choices]
    assert texts[0] == alone
    assert len(set(texts)) > 1
    assert [c.index for c in several.choices] == [0, 1, 2, 3]


def test_stop_bias_and_logprobs(model, client):
    text = complete(client, max_tokens=24, extra_body={"ignore_eos": True}).choices[0].text
    stop = text[4:6]
    cut = complete(client, max_tokens=24, stop=[stop, "zzzz"], extra_body={"ignore_eos": True})
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    biased = chat(client, logit_bias={"65": 100}, max_tokens=5, logprobs=True, top_logprobs=3)
    assert biased.choices[0].message.content == "AAAAA"
    entries = biased.choices[0].logprobs.content
    assert [e.token for e in entries] == ["A"] * 5
    assert all(len(e.top_logprobs) == 3 and e.bytes == [65] for e in entries)
    assert all(e.logprob <= e.top_logprobs[0].logprob for e in entries)


def test_completions_take_every_form_of_prompt(client):
    one = complete(client, "abc").choices[0].text
    ids = [97, 98, 99]
    assert complete(client, ids).choices[0].text == one
    both = complete(client, ["abc", "xyz"], n=2, temperature=0.0)
    assert [c.text for c in both.choices][:2] == [one, one]
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert [c.text for c in complete(client, [ids, ids]).choices] == [one, one]
    streamed = list(complete(client, "abc", stream=True))
    assert "".join(c.choices[0].text for c in streamed) == one
    for prompt in ("", [], [[]], [99999]):
        with pytest.raises(openai.BadRequestError):
            complete(client, prompt)


def test_an_event_is_one_line_whatever_the_text(url):
    prompt = "a\u2028b\x85c\u2029d\x0be\n"
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "echo": True, "stream": True}
    with httpx2.stream("POST", f"{url}/completions", json=body) as answer:
        events = [x.removeprefix("data: ") for x in answer.iter_lines() if x]
    assert events[-1] == "[DONE]"
    assert json.loads(events[0])["choices"][0]["text"] == prompt


def test_echoed_logprobs_are_loglikelihoods(model, client):
    """What lm-eval's local-completions sends and reads."""
    context, continuation = "the quick", " brown fox"
    ids = model.tokenizer.encode(context + continuation)
    answer = complete(client, ids, max_tokens=1, echo=True, logprobs=1, seed=1234)
    reported = answer.choices[0].logprobs
    assert reported.token_logprobs[0] is None
    assert len(reported.tokens) == len(ids) + 1
    (expected,) = LocalLM(model).loglikelihood([(context, continuation)])
    inside = reported.token_logprobs[len(context) : -1]
    # float32 sums over other batch shapes
    assert sum(inside) == pytest.approx(expected.sum, abs=1e-3)
    tops = reported.top_logprobs[len(context) : -1]
    greedy = all(max(t.values()) <= p + 1e-6 for t, p in zip(tops, inside, strict=True))
    assert greedy == expected.is_greedy
    scored = complete(client, ids, max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].logprobs.token_logprobs == reported.token_logprobs[:-1]
    assert scored.choices[0].text == context + continuation


def test_tools_required_named_auto_none(client):
    for choice, names in (("required", {"calc", "clock"}), ("calc", {"calc"})):
        named = {"type": "function", "function": {"name": choice}}
        for seed in range(3):
            answer = chat(
                client,
                tools=[CALC, CLOCK],
                tool_choice=named if choice == "calc" else choice,
                temperature=1.0,
                seed=seed,
                max_tokens=120,
                parallel_tool_calls=False,
            ).choices[0]
            assert answer.finish_reason == "tool_calls"
            (call,) = answer.message.tool_calls
            assert call.function.name in names
            arguments = json.loads(call.function.arguments)
            if call.function.name == "calc":
                assert set(arguments) == {"n"}
                assert 0 <= arguments["n"] <= 99
    for choice in ("auto", "none"):
        answer = chat(client, tools=[CALC], tool_choice=choice).choices[0]
        assert answer.message.tool_calls is None
        assert answer.message.content
    chunks = list(chat(client, tools=[CALC], tool_choice="required", max_tokens=90, stream=True,
                       parallel_tool_calls=False))  # fmt: skip
    pieces = [t for c in chunks for t in c.choices[0].delta.tool_calls or ()]
    assert json.loads("".join(p.function.arguments for p in pieces if p.index == 0))["n"] >= 0
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    cut = chat(client, tools=[CALC], tool_choice="required", max_tokens=4).choices[0]
    assert cut.finish_reason == "length"
    assert cut.message.tool_calls is None


def test_json_formats(client):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    text = chat(client, response_format=form, max_tokens=60).choices[0].message.content
    assert set(json.loads(text)) == {"a"}
    chosen = chat(client, extra_body={"grammar": {"choice": ["left", "right"]}})
    assert chosen.choices[0].message.content in ("left", "right")


def test_sixteen_streams_are_in_flight_together(client, url):
    def read(i):
        stream = chat(client, stream=True, max_tokens=24, seed=i, temperature=1.0,
                      extra_body={"ignore_eos": True})  # fmt: skip
        return sum(1 for _ in stream)

    with ThreadPoolExecutor(16) as pool:
        assert len(list(pool.map(read, range(16)))) == 16
    assert metric(url, "max_in_flight") == ENGINE.slots
    assert idle(url)


def test_abandoned_requests_leave_nothing_behind(client, url):
    async def storm():
        own = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)

        async def leave(i):
            stream = await own.chat.completions.create(
                model="tiny", messages=HI, max_tokens=1400, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            async for _ in stream:
                break
            await stream.close()

        whole = [
            asyncio.create_task(
                own.chat.completions.create(
                    model="tiny", messages=HI, max_tokens=1400, extra_body={"ignore_eos": True}
                )
            )
            for _ in range(6)
        ]
        await asyncio.gather(*map(leave, range(20)))
        for task in whole:
            task.cancel()
        await asyncio.gather(*whole, return_exceptions=True)
        await own.close()

    before = metric(url, "cancelled_total")
    asyncio.run(storm())
    assert idle(url)
    assert metric(url, "cancelled_total") >= before + 20
    assert chat(client).choices[0].message.content


def test_tokenize_and_back(url):
    def post(path, body):
        request = urllib.request.Request(
            url.removesuffix("/v1") + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())

    tokens = post("/tokenize", {"prompt": "hé"})
    assert tokens == {"tokens": [104, 195, 169], "count": 3, "max_model_len": 1536}
    assert post("/detokenize", {"tokens": tokens["tokens"]}) == {"prompt": "hé"}
    assert post("/tokenize", {"messages": HI})["count"] > 3


def test_key_size_queue_and_port(model):
    small = EngineConfig(slots=1, context=256, max_waiting=1)
    options = {"name": "tiny", "api_key": "secret", "max_body_bytes": 20_000, "engine": small}
    with serving(model, **options) as url:
        for key, error in (("wrong", openai.AuthenticationError), ("secret", None)):
            client = openai.OpenAI(base_url=url, api_key=key, max_retries=0)
            if error:
                with pytest.raises(error):
                    chat(client)
            else:
                assert chat(client).choices
        with pytest.raises(openai.APIStatusError) as caught:
            chat(client, messages=[{"role": "user", "content": "x" * 30_000}])
        assert caught.value.status_code == 413
        slow = {"max_tokens": 200, "extra_body": {"ignore_eos": True}, "stream": True}
        streams = [chat(client, **slow)]
        next(iter(streams[0]))  # holds the only slot
        streams.append(chat(client, **slow))  # waits
        with pytest.raises(openai.RateLimitError) as caught:
            chat(client)
        assert caught.value.response.headers["retry-after"] == "1"
        for stream in streams:
            stream.close()
        port = int(url.split(":")[2].split("/")[0])
        with (
            pytest.raises(UserError, match=rf":{port}.*another port, 0"),
            serving(model, port=port),
        ):
            pass
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        pass
    assert not [t for t in threading.enumerate() if t.name in ("http",) and not t.daemon]
