"""Embeddings, responses and LMDeploy's calls, through the clients that people have."""

import base64
import json

import httpx2 as httpx
import jax.numpy as jnp
import numpy as np
import openai
import pytest

from internjax.models.decoder import hidden
from internjax.serve.server import serving
from tests.test_serve_engine import make_model
from tests.test_serve_openai import CALC, ENGINE

FUNCTION = {"type": "function", **CALC["function"]}


@pytest.fixture(scope="module")
def model():
    return make_model(context=2048)


@pytest.fixture(scope="module")
def url(model):
    options = {"engine": ENGINE, "default_max_tokens": 24, "max_conversations": 4}
    with serving(model, name="tiny", **options) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url.removesuffix("/v1"), timeout=60) as http:
        yield http


# Mistakes of those who ask by hand -----------------------------------------------------------

JSON = "application/json"
HALF = r'{"model": "tiny", "messages": [{"role": "user", "content": "a \ud800"}]}'


@pytest.mark.parametrize(
    "body, kind, says, param",
    [
        ('{"model": "tiny"', JSON, "the body is no JSON: Expecting ',' delimiter at char", None),
        ('{"model": "tiny"}', "application/x-www-form-urlencoded", "content-type: appl", None),
        ("", JSON, "the body must be a JSON object.", None),
        ("[]", JSON, "the body must be a JSON object.", None),
        ('{"mesages": []}', JSON, "mesages: no such field; did you mean messages?", "mesages"),
        ('{"model": "tiny", "messages": 1}', JSON, "messages: ", "messages"),
        (HALF, JSON, "U+D800 at character", None),
    ],
)
def test_a_wrong_body_is_told_what_is_wrong(http, body, kind, says, param):
    answer = http.post("/v1/chat/completions", content=body, headers={"content-type": kind})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert says in error["message"]


@pytest.mark.parametrize(
    "method, path, status, says",
    [
        ("GET", "/", 404, "GET /: nothing is here; the API begins at /v1"),
        ("GET", "/v1", 404, "/openapi.json lists every path"),
        ("GET", "/v1/chat/completions", 405, "this path takes POST"),
    ],
)
def test_a_wrong_address_is_told_the_right_one(http, method, path, status, says):
    answer = http.request(method, path)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


# Embeddings ---------------------------------------------------------------------------------


def test_embeddings_are_the_mean_state_of_unit_length(model, client, http):
    texts = ["abc", "a longer text than the first", "x" * 70]
    answer = client.embeddings.create(model="tiny", input=texts)  # base64 under the hood
    vectors = np.array([entry.embedding for entry in answer.data])
    assert vectors.shape == (3, model.cfg.d_model)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for text, vector in zip(texts, vectors, strict=True):
        ids = jnp.array([model.tokenizer.encode(text)])
        mean = np.asarray(hidden(model.params, ids, model.cfg))[0].mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-4)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, texts))
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    body = {"model": "tiny", "input": [97, 98, 99], "encoding_format": "float"}
    plain = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    np.testing.assert_allclose(plain, vectors[0], atol=1e-5)
    body["encoding_format"] = "base64"
    packed = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), np.float32(plain))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dimensions": 8}, "dimensions=8.*32"),
        ({"input": []}, "empty"),
        ({"input": [[]]}, "empty"),
        ({"input": "x" * 2000}, "2000.*1536"),
        ({"input": [99999]}, "99999"),
        ({"input": ["a"] * 2049}, "2048"),
        ({"encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_embeddings_that_cannot_be_are_refused(client, changes, says):
    with pytest.raises(openai.BadRequestError, match=says):
        client.embeddings.create(**{"model": "tiny", "input": "abc"} | changes)


# Responses ----------------------------------------------------------------------------------


def test_a_response_equals_the_chat(client):
    made = client.responses.create(
        model="tiny", input="hi", instructions="be brief", temperature=0, max_output_tokens=12
    )
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        temperature=0,
        max_tokens=12,
    )
    assert made.output_text == chat.choices[0].message.content
    assert made.usage.input_tokens == chat.usage.prompt_tokens
    assert made.usage.output_tokens == chat.usage.completion_tokens
    if chat.choices[0].finish_reason == "length":
        assert made.status == "incomplete"
        assert made.incomplete_details.reason == "max_output_tokens"
    assert client.responses.retrieve(made.id).output_text == made.output_text
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_response_events_build_the_response(client):
    options = {"model": "tiny", "input": "hi", "temperature": 0, "max_output_tokens": 12}
    whole = client.responses.create(**options)
    with client.responses.stream(**options) as stream:  # the client's own accumulator checks order
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    raw = list(client.responses.create(**options, stream=True))
    assert [e.sequence_number for e in raw] == list(range(len(raw)))
    kinds = [e.type.removeprefix("response.") for e in raw]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == [
        "output_text.done", "content_part.done", "output_item.done", whole.status
    ]  # fmt: skip
    assert raw[-1].response.usage == whole.usage


def test_a_conversation_goes_on_where_it_was(client):
    first = client.responses.create(model="tiny", input="one", temperature=0)
    second = client.responses.create(
        model="tiny", input="two", temperature=0, previous_response_id=first.id
    )
    spelled = client.responses.create(
        model="tiny",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
            *[item.model_dump() for item in first.output],
            {"role": "user", "content": "two"},
        ],
        temperature=0,
        store=False,
    )
    assert second.output_text == spelled.output_text
    assert second.usage.input_tokens == spelled.usage.input_tokens > first.usage.input_tokens
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(spelled.id)
    for _ in range(4):  # as many as are kept
        client.responses.create(model="tiny", input="x", max_output_tokens=1)
    with pytest.raises(openai.BadRequestError, match="Send the whole"):
        client.responses.create(model="tiny", input="x", previous_response_id=first.id)


def test_responses_call_functions(client):
    options = {"model": "tiny", "input": "add", "tools": [FUNCTION], "tool_choice": "required"}
    options |= {"temperature": 0, "max_output_tokens": 80}
    made = client.responses.create(**options)
    assert made.status == "completed"
    (call,) = made.output
    assert call.type == "function_call"
    assert 0 <= json.loads(call.arguments)["n"] <= 99
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    after = client.responses.create(
        model="tiny", input=[result], previous_response_id=made.id, max_output_tokens=4
    )
    assert after.usage.input_tokens > made.usage.output_tokens
    events = list(client.responses.create(**options, stream=True))
    done = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert [e.arguments for e in done] == [call.arguments]
    assert events[-1].response.output[0].id == done[0].item_id
    named = {"type": "function", "name": "calc"}
    (call,) = client.responses.create(**options | {"tool_choice": named}).output
    assert call.name == "calc"
    cut = client.responses.create(**options | {"max_output_tokens": 4})
    assert (cut.status, cut.output[0].type) == ("incomplete", "message")


def test_responses_keep_a_schema_and_report_logprobs(client):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    made = client.responses.create(model="tiny", input="hi", text=form, max_output_tokens=60)
    assert set(json.loads(made.output_text)) == {"a"}
    options = {"model": "tiny", "input": "hi", "max_output_tokens": 3, "top_logprobs": 2}
    options["include"] = ["message.output_text.logprobs"]
    (message,) = client.responses.create(**options).output
    assert 1 <= len(message.content[0].logprobs) <= 3
    assert all(len(entry.top_logprobs) == 2 for entry in message.content[0].logprobs)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input.0.*'reasoning'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"input": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input.0.arguments"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.name"),
        ({"tool_choice": {"type": "web_search"}, "tools": [FUNCTION]}, "tool_choice"),
        ({"max_output_tokens": 100_000}, "1536"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
    ],
)
def test_responses_that_cannot_be_are_refused(client, changes, says):
    with pytest.raises(openai.BadRequestError, match=says):
        client.responses.create(**{"model": "tiny", "input": "hi"} | changes)


# LMDeploy -----------------------------------------------------------------------------------


def test_generate_continues_and_streams(client, http):
    said = client.completions.create(model="tiny", prompt="abc", max_tokens=9, temperature=0)
    body = {"prompt": "abc", "max_tokens": 9, "temperature": 0, "return_logprob": True}
    whole = http.post("/generate", json=body).json()
    assert whole["text"] == said.choices[0].text
    assert whole["meta_info"]["prompt_tokens"] == 3
    assert whole["meta_info"]["finish_reason"] == {"type": said.choices[0].finish_reason}
    pairs = whole["meta_info"]["output_token_logprobs"]
    assert [token for _, token in pairs] == whole["output_ids"][: len(pairs)]
    assert all(logprob <= 0 for logprob, _ in pairs)
    body = {"input_ids": [97, 98, 99], "max_tokens": 9, "temperature": 0, "stream": True}
    events = [e[6:] for e in http.post("/generate", json=body).text.split("\n\n") if e]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert [i for chunk in chunks for i in chunk["output_ids"]] == whole["output_ids"]
    for wrong in ({}, {"prompt": "a", "input_ids": [1]}, {"prompt": "a", "image_data": "x"},
                  {"prompt": "a", "spaces_between_special_tokens": False}):  # fmt: skip
        assert http.post("/generate", json=wrong).status_code == 400


def test_encode(model, http):
    one = http.post("/v1/encode", json={"input": "hé"}).json()
    assert one == {"input_ids": [104, 195, 169], "length": 3}
    two = http.post("/v1/encode", json={"input": ["a", "bc"], "add_bos": False}).json()
    assert two == {"input_ids": [[97], [98, 99]], "length": [1, 2]}
    turn = http.post("/v1/encode", json={"input": "a", "do_preprocess": True}).json()
    body = {"messages": [{"role": "user", "content": "a"}]}
    assert turn["input_ids"] == http.post("/tokenize", json=body).json()["tokens"]


def interact(http, prompt, session=7, **changes):
    body = {"prompt": prompt, "session_id": session, "interactive_mode": True,
            "temperature": 0, "request_output_len": 8} | changes  # fmt: skip
    return http.post("/v1/chat/interactive", json=body)


def test_sessions_remember(client, http):
    first = interact(http, "one").json()
    assert first["history_tokens"] == 0
    assert first["tokens"] <= 8
    streamed = interact(http, "two", stream=True)
    lines = [json.loads(line) for line in streamed.text.splitlines()]
    history = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "two"},
    ]
    expected = client.chat.completions.create(
        model="tiny", messages=history, max_tokens=8, temperature=0, extra_body={"top_k": 40}
    )
    assert "".join(line["text"] for line in lines) == expected.choices[0].message.content
    assert lines[-1]["finish_reason"] == expected.choices[0].finish_reason
    assert lines[-1]["history_tokens"] == first["input_tokens"] + first["tokens"]
    assert interact(http, "x", session=8).json()["history_tokens"] == 0
    # As LMDeploy's clients end a session.
    assert interact(http, "", request_output_len=0, interactive_mode=False).status_code == 200
    assert interact(http, "one").json() == first
    for session in range(20, 24):  # as many as are kept
        interact(http, "x", session=session, request_output_len=1)
    assert interact(http, "one").json()["history_tokens"] == 0
    assert interact(http, "x", session=-1).status_code == 400
    alone = interact(http, "one", session=-1, interactive_mode=False).json()
    assert alone["text"] == first["text"]


def test_a_session_is_cancelled_and_goes_on(http):
    body = {"prompt": "go", "session_id": 31, "interactive_mode": True, "stream": True,
            "request_output_len": 450, "ignore_eos": True}  # fmt: skip
    with http.stream("POST", "/v1/chat/interactive", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        busy = interact(http, "me too", session=31)
        assert busy.status_code == 409
        assert busy.json()["error"]["code"] == "session_busy"
        assert interact(http, "", session=31, cancel=True).status_code == 200
        last = json.loads(list(lines)[-1])
    assert last["finish_reason"] == "abort"
    assert last["tokens"] < 450
    after = interact(http, "and now?", session=31).json()
    assert "error" not in after, after
    assert after["history_tokens"] == last["tokens"] + last["input_tokens"]
    assert interact(http, "", session=-1, cancel=True).status_code == 400


def test_the_end_token_is_scored_too(model, client, http):
    """A harness drops the last entry, that of the one new token: it must be there, end or not."""
    info = http.get("/tokenizer_info").json()
    end = http.post("/tokenize", json={"prompt": info["eos_token"]}).json()["tokens"]
    assert end == [model.tokenizer.eos_id]
    options = {"max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    said = client.completions.create(
        model="tiny", prompt=[97, 98], logit_bias={str(end[0]): 100}, **options
    ).choices[0]
    assert said.finish_reason == "stop"
    assert len(said.logprobs.tokens) == len(said.logprobs.token_logprobs) == 3
    assert said.logprobs.tokens[-1] == info["eos_token"]


def test_a_repeated_prompt_is_found_in_the_cache(client):
    options = {"model": "tiny", "prompt": "cached " * 40, "max_tokens": 2}
    first, second = (client.completions.create(**options).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens >= 128
