"""Constrained decoding with a random model: the text is always valid, compact, or refused."""

import json
import re

import pytest
from hypothesis import given, settings, strategies as st

from internjax.errors import UserError
from internjax.models.lm import SamplingParams
from internjax.serve.engine import Engine
from tests.test_serve_engine import CONFIG, make_model, run


@pytest.fixture(scope="module")
def engine():
    return Engine(make_model(), CONFIG)


LEAVES = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -5, "maximum": 999},
        {"type": "string", "maxLength": 6},
        {"enum": ["red", 'gr"een', 7]},
    ]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        inner.map(lambda s: {"type": "array", "items": s, "minItems": 1, "maxItems": 2}),
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=2).map(
            lambda p: {
                "type": "object",
                "properties": p,
                "required": sorted(p),
                "additionalProperties": False,
            }
        ),
    ),
    max_leaves=4,
)


def fits(schema, value):
    """The few keywords used above, by their definition."""
    if "enum" in schema:
        return value in schema["enum"]
    match schema["type"]:
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            return isinstance(value, str) and len(value) <= 6
        case "array":
            return 1 <= len(value) <= 2 and all(fits(schema["items"], v) for v in value)
        case "object":
            properties = schema["properties"]
            return set(value) == set(properties) and all(
                fits(properties[k], v) for k, v in value.items()
            )


@given(SCHEMAS, st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_schema_constrained_text_is_valid_and_compact(engine, schema, seed):
    params = SamplingParams(
        max_tokens=200, temperature=1.0, seed=seed, grammar={"json_schema": schema}
    )
    (request,), (news,) = run(engine, [([104, 105], params)])
    text = "".join(d.text for d in news)
    assert request.finish_reason == "stop"
    assert fits(schema, json.loads(text))
    assert json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")).count(
        ":"
    ) == text.count(":")
    outside = re.sub(r'"(\\.|[^"\\])*"', "", text)
    assert not re.search(r"\s", outside)


def test_regex_choice_and_lark_beside_free_text(engine):
    free = SamplingParams(max_tokens=10, temperature=1.0, seed=1, ignore_eos=True)
    (alone,), _ = run(engine, [([1, 2, 3], free)])
    grammars = [{"regex": r"[0-9]{3}-[a-f]+x"}, {"choice": ["yes", "no"]}, {"lark": 'start: "ok"'}]
    jobs = [
        ([5, 6], SamplingParams(max_tokens=60, temperature=1.0, seed=2, grammar=g))
        for g in grammars
    ]
    requests, news = run(engine, [*jobs, ([1, 2, 3], free)])
    regex, choice, lark, _ = ("".join(d.text for d in n) for n in news)
    assert re.fullmatch(r"[0-9]{3}-[a-f]+x", regex)
    assert choice in ("yes", "no")
    assert lark == "ok"
    assert requests[-1].output == alone.output


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"not": {"type": "string"}}}, "not"),
        ({"json_schema": "text"}, "an object"),
        ({"regex": "("}, "regex"),
        ({"choice": []}, "list"),
        ({"lark": "start: nothing"}, "nothing"),
        ({"xml": "a"}, "exactly one of"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of"),
    ],
)
def test_what_cannot_be_enforced_is_refused(engine, grammar, reason):
    with pytest.raises(UserError, match=reason):
        engine.submit([1], SamplingParams(grammar=grammar), [].append)
    assert engine.in_flight() == 0


def test_a_grammar_that_grows_too_large_fails_its_request_alone(engine):
    free = ([1, 2], SamplingParams(max_tokens=10, ignore_eos=True))
    (alone,), _ = run(engine, [free])
    # legal to write, but following it takes more states than the library allows
    huge = SamplingParams(
        max_tokens=60,
        grammar={"regex": "((a{1,100}){1,100}){1,100}b"},
        logit_bias={97: 50.0},
    )
    tokens = engine.stats.grammar_tokens
    requests, news = run(engine, [([5], huge), free])
    assert requests[0].finish_reason == "error"
    assert "grammar" in news[0][-1].error
    assert requests[1].output == alone.output
    assert engine.stats.grammar_tokens > tokens
    assert engine.stats.grammar_seconds > 0
