"""Random requests, legal and illegal: no answer is a failure of the server.

Half of them are made by schemathesis after our own OpenAPI, half are legal bodies with parts put
in their place that do not belong there. Afterwards the server answers as it did before.
"""

import time

import httpx2 as httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from internjax.serve.server import serving
from tests.test_serve_engine import make_model
from tests.test_serve_openai import CALC, ENGINE, HI

# schemathesis draws from `random` inside its strategies
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the .random. module")

CHAT = {"model": "tiny", "messages": HI, "max_tokens": 4}
JSON_FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}}
LEGAL = (
    ("/v1/chat/completions", {**CHAT, "temperature": 0.5, "top_p": 0.9, "seed": 1, "n": 2}),
    ("/v1/chat/completions", {**CHAT, "stream": True, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {**CHAT, "tools": [CALC], "tool_choice": "auto"}),
    ("/v1/chat/completions", {**CHAT, "response_format": JSON_FORM, "stop": ["1", "2"]}),
    ("/v1/chat/completions", {**CHAT, "logit_bias": {"65": 5}, "presence_penalty": 1}),
    ("/v1/completions", {"model": "tiny", "prompt": [1, 2], "max_tokens": 3, "top_k": 5}),
    ("/v1/completions", {"model": "tiny", "prompt": "ab", "echo": True, "logprobs": 2}),
    ("/v1/embeddings", {"model": "tiny", "input": ["a", "b"], "encoding_format": "float"}),
    ("/v1/responses", {"model": "tiny", "input": HI, "max_output_tokens": 3, "stream": True}),
    ("/v1/responses", {"model": "tiny", "input": "hi", "text": {"format": {"type": "text"}}}),
    ("/v1/encode", {"input": ["a"], "add_bos": True}),
    ("/generate", {"prompt": "a", "max_tokens": 3, "return_logprob": True}),
    ("/v1/chat/interactive", {"prompt": "a", "session_id": 1, "interactive_mode": True}),
    ("/tokenize", {"messages": HI}),
    ("/detokenize", {"tokens": [1, 2]}),
)
STRANGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 1e308, -1e308, 1e-320, 0.5]),
    st.text(max_size=8),
    st.sampled_from(["tiny", "\x00", "\ud7ff<|im_end|>", "x" * 3000, "\u202e", "</s>"]),
    st.recursive(
        st.sampled_from([None, 1, "user", "x"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["role", "content", "type", "text", "name", "schema"]), inner
            )
        ),
        max_leaves=6,
    ),
)
SETTINGS = {"deadline": None, "derandomize": True, "database": None, "phases": [Phase.generate]}
SETTINGS["suppress_health_check"] = list(HealthCheck)


@pytest.fixture(scope="module")
def root():
    options = {"default_max_tokens": 6, "max_request_tokens": 400, "max_conversations": 8}
    with serving(make_model(context=2048), name="tiny", engine=ENGINE, **options) as url:
        yield url.removesuffix("/v1")


@pytest.fixture
def http(root):
    """Asks; at the end checks that the server is as it was."""
    with httpx.Client(base_url=root, timeout=60) as http:
        question = {**CHAT, "temperature": 0}
        before = http.post("/v1/chat/completions", json=question).json()["choices"]
        yield http
        deadline = time.monotonic() + 20
        while (idle := "in_flight 0.0" in http.get("/metrics").text) is False:
            assert time.monotonic() < deadline, "requests are left behind"
            time.sleep(0.02)
        assert idle
        assert "internjax_failed_total 0.0" in http.get("/metrics").text
        assert http.post("/v1/chat/completions", json=question).json()["choices"] == before


def check(answer):
    assert answer.status_code < 500, (answer.status_code, answer.text)
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["request_id"] in answer.headers["x-request-id"]  # schemathesis has lists
        assert error["message"]
    elif "event-stream" in answer.headers["content-type"]:
        assert "server_error" not in answer.text, answer.text


@st.composite
def spoiled(draw):
    """A legal body with one to three parts replaced, dropped or added."""
    path, body = draw(st.sampled_from(LEGAL))
    for _ in range(draw(st.integers(1, 3))):
        body = _spoil(draw, body)
    return path, body


def _spoil(draw, value):
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        name = draw(st.sampled_from(sorted(value)))
        deeper = {**value, name: _spoil(draw, value[name])}
        dropped = {k: v for k, v in value.items() if k != name}
        added = {**value, draw(st.sampled_from(FIELDS)): draw(STRANGE)}
        return draw(st.sampled_from([deeper, deeper, added, dropped]))
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], _spoil(draw, value[at]), *value[at + 1 :]]
    return draw(STRANGE)


FIELDS = sorted({name for _, body in LEGAL for name in body} | {"grammar", "min_p", "ignore_eos"})


def ask_spoiled(http, count):
    @settings(max_examples=count, **SETTINGS)
    @given(request=spoiled())
    def ask(request):
        path, body = request
        check(http.post(path, json=body))

    ask()


def ask_by_schema(http, root, count):
    document = http.get("/openapi.json").json()
    operations = [o.ok() for o in schemathesis.openapi.from_dict(document).get_all_operations()]
    assert len(operations) >= 14
    for operation in operations:

        @settings(max_examples=max(2, count // len(operations)), **SETTINGS)
        @given(case=operation.as_strategy(), named=st.integers(0, 4))
        def ask(case, named):
            if named and isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "tiny"  # else few get past that
            check(case.call(base_url=root))

        ask()


def test_spoiled_requests(http):
    ask_spoiled(http, 100)


def test_requests_after_our_openapi(http, root):
    ask_by_schema(http, root, 60)


EDGES = (
    {"temperature": 1e-320},
    {"temperature": 1e-5, "top_p": 1e-320},
    {"temperature": 100, "min_p": 0.999},
    {"top_k": 2**31 - 1, "temperature": 1},
    {"repetition_penalty": 0.01},
    {"repetition_penalty": 100, "presence_penalty": -2, "frequency_penalty": 2},
    {"seed": 2**70},
    {"seed": -(2**70)},
    {"logit_bias": {str(i): -100 for i in range(259)}},
)
BEYOND = (
    {"temperature": 1e308},
    {"top_k": 2**31},
    {"repetition_penalty": 1e-320},
    {"repetition_penalty": 1e308},
    {"max_tokens": 2**70},
)


def test_numbers_at_the_edges_hurt_nobody(http):
    for changes in EDGES + BEYOND:
        answer = http.post("/v1/chat/completions", json={**CHAT, **changes})
        assert answer.status_code == (200 if changes in EDGES else 400), (changes, answer.text)
        check(answer)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' * 3000, b"1" * 5000]
)
def test_bodies_that_are_no_object(http, body):
    for path in ("/v1/chat/completions", "/generate"):
        answer = http.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        check(answer)


@pytest.mark.slow
def test_two_thousand_requests(http, root):
    ask_spoiled(http, 1000)
    ask_by_schema(http, root, 1000)
