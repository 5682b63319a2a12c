"""Sampling fields, formats and streamed tool calls as the public `openai` client sees them."""

import json
import re

import jsonschema
import openai
import pytest

from internjax.models.load import load
from internjax.serve.engine import EngineConfig
from internjax.serve.server import serving
from tests.test_serve_engine import make_model

ENGINE = EngineConfig(slots=8, context=1536, max_waiting=64)
REAL = EngineConfig(slots=2, context=1024)
HI = [{"role": "user", "content": "hi"}]
PLACE = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "strict": True, "parameters": PLACE}}
    for name in ("put", "take")
]
EOS = 258


@pytest.fixture(scope="module")
def client():
    model = make_model(context=2048)
    with serving(model, name="tiny", engine=ENGINE, default_max_tokens=32) as url:
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


def chat(client, **changes):
    options = {"model": "tiny", "max_tokens": 12, "temperature": 0.0, "messages": HI} | changes
    return client.chat.completions.create(**options)


def complete(client, **changes):
    options = {"model": "tiny", "max_tokens": 8, "temperature": 0.0, "prompt": "abc"} | changes
    return client.completions.create(**options)


def test_sampling_fields_by_all_their_names(client):
    hurry = {"logit_bias": {str(EOS): 100, "65": 90}, "max_tokens": 9}
    assert chat(client, **hurry).usage.completion_tokens == 1
    for field in ("min_tokens", "min_new_tokens"):
        answer = chat(client, **hurry, extra_body={field: 5})
        assert answer.choices[0].message.content == "AAAAA"
        assert answer.usage.completion_tokens == 6
    stopped = chat(client, logit_bias={"65": 100}, extra_body={"stop_token_ids": [65]})
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("", "stop")
    banned = chat(client, logit_bias={"65": 100, "66": 50}, extra_body={"bad_words": ["AAA"]})
    assert banned.choices[0].message.content == "AABAABAABAAB"
    for typical in (0.2, 1.0):
        answers = {
            chat(client, temperature=1.5, seed=s, max_tokens=1, extra_body={"typical_p": typical})
            .choices[0].message.content
            for s in range(12)
        }  # fmt: skip
        assert len(answers) > 1
    shown = complete(
        client, logit_bias={str(EOS): 100}, max_tokens=2,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )  # fmt: skip
    assert shown.choices[0].text == "<|im_end|>" * 2


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"min_tokens": 3, "min_new_tokens": 4}, "differ"),
        ({"min_tokens": 30}, "max_tokens"),
        ({"typical_p": 0}, "typical_p"),
        ({"bad_words": ["much too long"]}, "at most 8"),
        ({"stop_token_ids": [300]}, "300"),
        ({"min_tokens": 3, "grammar": {"regex": "a"}}, "grammar"),
        ({"best_of": 3, "stream": True}, "streamed"),
        ({"best_of": 1, "n": 2}, "less than n"),
    ],
)
def test_fields_that_cannot_be_obeyed_are_refused(client, body, says):
    with pytest.raises(openai.BadRequestError, match=says):
        complete(client, extra_body=body)


def test_best_of_returns_the_likeliest(client):
    options = {"temperature": 1.0, "seed": 5, "max_tokens": 6, "prompt": ["abc", "xy"]}
    options["extra_body"] = {"ignore_eos": True}
    every = complete(client, n=6, logprobs=0, **options)
    chosen = complete(client, n=2, best_of=6, **options)
    assert [c.index for c in chosen.choices] == [0, 1, 2, 3]
    for at in (0, 1):
        group = every.choices[6 * at : 6 * at + 6]
        ranked = sorted(group, key=lambda c: -sum(c.logprobs.token_logprobs))
        assert [c.text for c in chosen.choices[2 * at : 2 * at + 2]] == [c.text for c in ranked[:2]]
    assert chosen.choices[0].logprobs is None
    assert chosen.usage.completion_tokens == every.usage.completion_tokens == 72


def test_lmdeploys_form_of_a_regular_expression(client):
    form = {"type": "regex_schema", "regex_schema": "[0-9]{3}-[a-z]{2}"}
    text = chat(client, extra_body={"response_format": form}).choices[0].message.content
    assert re.fullmatch("[0-9]{3}-[a-z]{2}", text)
    with pytest.raises(openai.BadRequestError, match="non-empty"):
        chat(client, extra_body={"response_format": {"type": "regex_schema"}})


@pytest.mark.parametrize("parallel", [True, False])
def test_streamed_calls_are_put_together_by_the_client(client, parallel):
    counts = []
    for seed in range(2):
        options = {"temperature": 1.0, "seed": seed, "max_tokens": 220, "model": "tiny"}
        options["logit_bias"] = {str(EOS): 8}  # legal between two calls only
        options |= {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": parallel}
        with client.chat.completions.stream(messages=HI, **options) as stream:
            events = [event.type for event in stream]
            final = stream.get_final_completion().choices[0]
        whole = client.chat.completions.create(messages=HI, **options).choices[0]
        assert final.finish_reason == whole.finish_reason
        calls = final.message.tool_calls
        if final.finish_reason == "tool_calls":
            functions = [(c.function.name, c.function.arguments) for c in calls]
            assert functions == [(c.function.name, c.function.arguments)
                                 for c in whole.message.tool_calls]  # fmt: skip
            for name, arguments in functions:
                assert name in ("put", "take")
                jsonschema.validate(json.loads(arguments), PLACE)
            assert len({c.id for c in calls}) == len(calls)
            assert events.count("tool_calls.function.arguments.delta") > 3 * len(calls)
            counts.append(len(calls))
    assert counts
    assert parallel or set(counts) == {1}


def test_cut_calls_are_none_and_end_with_length(client):
    options = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 46}
    whole = chat(client, **options).choices[0]
    assert whole.finish_reason == "length"
    assert whole.message.tool_calls is None
    assert whole.message.content.startswith("<tool_call>")
    chunks = list(chat(client, stream=True, **options))
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_format_and_tools_together(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": PLACE}}
    for seed in range(3):
        options = {"temperature": 1.0, "seed": seed, "max_tokens": 150, "tools": TOOLS}
        options["parallel_tool_calls"] = False
        answer = chat(client, response_format=form, **options).choices[0]
        if answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.message.content), PLACE)
        assert answer.finish_reason in ("stop", "tool_calls")
    for refused in ({"tool_choice": "required", "response_format": form},
                    {"extra_body": {"grammar": {"regex": "a"}}}):  # fmt: skip
        with pytest.raises(openai.BadRequestError):
            chat(client, tools=TOOLS, **refused)


def test_a_tool_that_cannot_be_enforced_is_refused_with_its_place(client):
    parameters = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    bad = {"type": "function", "function": {"name": "tag", "parameters": parameters}}
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, tools=[TOOLS[0], bad])
    place = "tools/1/function/parameters #/properties/tags/uniqueItems"
    assert place in caught.value.response.json()["error"]["message"]
    unknown = {"type": "function", "function": {"name": "nope"}}
    with pytest.raises(openai.BadRequestError, match="put, take"):
        chat(client, tools=TOOLS, tool_choice=unknown)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    with serving(load(smollm2_gguf), name="smollm2", engine=REAL) as url:
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "strict": True,
        "description": "Tells the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "pattern": "^[A-Z][a-z]{1,15}$"},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.needs_model
@pytest.mark.slow
def test_smollm2_calls_a_tool_and_uses_its_result(smollm2):
    asked = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]
    options = {"model": "smollm2", "tools": [WEATHER], "temperature": 0, "max_tokens": 80}
    for choice in ("required", "auto"):
        called = options | {"tool_choice": choice, "parallel_tool_calls": False}
        with smollm2.chat.completions.stream(messages=asked, **called) as stream:
            kinds = [event.type for event in stream]
            said = stream.get_final_completion().choices[0]
        whole = smollm2.chat.completions.create(messages=asked, **called).choices[0]
        assert said.finish_reason == whole.finish_reason
        if choice == "required":
            (call,) = said.message.tool_calls
            assert call.function.parsed_arguments == {"city": "Paris", "unit": "celsius"}
            assert kinds.count("tool_calls.function.arguments.delta") > 5
            assert said.message.tool_calls[0].function.arguments == (
                whole.message.tool_calls[0].function.arguments
            )
            made = whole.message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": made["tool_calls"][0]["id"], "content": "21 degrees"}
    answer = smollm2.chat.completions.create(messages=[*asked, made, result], **options)
    assert "21" in answer.choices[0].message.content


@pytest.mark.needs_model
@pytest.mark.slow
def test_smollm2_fills_a_schema_and_keeps_words_out(smollm2):
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string"}, "country": {"type": "string"}},
        "required": ["capital", "country"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    ask = {"model": "smollm2", "temperature": 0, "max_tokens": 60}
    ask["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    answer = smollm2.chat.completions.create(response_format=form, **ask).choices[0]
    assert json.loads(answer.message.content)["capital"] == "Paris"
    plain = smollm2.chat.completions.create(**ask).choices[0].message.content
    assert "Paris" in plain
    banned = smollm2.chat.completions.create(extra_body={"bad_words": ["Paris"]}, **ask)
    assert "Paris" not in banned.choices[0].message.content
