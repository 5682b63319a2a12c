"""JSON schemas keyword by keyword, refereed by the `jsonschema` package: enforced, or refused.

Every probe is one keyword with valid and invalid instances. A schema that is accepted must let the
valid ones through and block the invalid ones, both as compact JSON, byte by byte.
"""

import json

import jsonschema
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from internjax.errors import UserError
from internjax.models.lm import SamplingParams
from internjax.serve.engine import Engine
from internjax.serve.grammar import Grammars
from tests.fakes import BYTE_VOCAB, byte_tokenizer
from tests.test_serve_engine import CONFIG, make_model, run

TOKENIZER = byte_tokenizer()
GRAMMARS = Grammars(TOKENIZER, BYTE_VOCAB)


def follows(grammar, text):
    """Whether a whole text is possible under a grammar, asked byte by byte."""
    matcher = GRAMMARS.matcher(grammar)
    words = np.zeros(-(-BYTE_VOCAB // 32), np.uint32)

    def allowed(token):
        matcher.fill(words)
        return bool(words[token // 32] >> (token % 32) & 1)

    data = text.encode()
    for at, byte in enumerate(data):
        if not allowed(byte):
            return False
        if matcher.advance(byte):
            return at == len(data) - 1
    return allowed(TOKENIZER.eos_id)


def compact(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


OBJECT, ARRAY, STRING, INTEGER = ({"type": t} for t in ("object", "array", "string", "integer"))
NODE = {
    "type": "object",
    "properties": {"v": INTEGER, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["v", "next"],
    "additionalProperties": False,
}

ENFORCED = [
    # (keyword, schema, valid instances, invalid instances)
    ("type", INTEGER, [1, -7], ["a", 1.5, None]),
    ("type list", {"type": ["integer", "null"]}, [1, None], ["a"]),
    ("enum", {"enum": [1, "a", {"x": [2]}]}, [1, {"x": [2]}], ["b", {"x": [3]}]),
    ("const", {"const": {"a": [1]}}, [{"a": [1]}], [{"a": [2]}]),
    ("minimum", {**INTEGER, "minimum": 3}, [3, 900], [2, -4]),
    ("maximum", {**INTEGER, "maximum": 3}, [3, -900], [4]),
    ("exclusiveMinimum", {"type": "number", "exclusiveMinimum": 3}, [3.5, 4], [3, 2.9]),
    ("exclusiveMaximum", {"type": "number", "exclusiveMaximum": 3}, [2.9], [3, 3.1]),
    ("multipleOf", {**INTEGER, "multipleOf": 7}, [0, 14], [15]),
    ("multipleOf fraction", {"type": "number", "multipleOf": 0.5}, [1.5, 2], [1.3]),
    ("minLength", {**STRING, "minLength": 2}, ["ab", "äöü"], ["a", ""]),
    ("maxLength", {**STRING, "maxLength": 2}, ["书书", ""], ["abc"]),
    ("pattern", {**STRING, "pattern": "^a+$"}, ["aa"], ["ab", ""]),
    ("pattern inside", {**STRING, "pattern": "b"}, ["abc"], ["ac"]),
    ("pattern of a script", {**STRING, "pattern": "^[\u4e00-\u9fff]+$"}, ["书"], ["a", "é"]),
    ("pattern of letters", {**STRING, "pattern": "^[À-ÿ]\U0001f600$"}, ["É😀"], ["E😀", "É"]),
    ("pattern + minLength", {**STRING, "pattern": "^a+$", "minLength": 3}, ["aaa"], ["aa"]),
    ("items", {**ARRAY, "items": INTEGER}, [[], [1, 2]], [["a"], [1, "a"]]),
    ("prefixItems", {**ARRAY, "prefixItems": [INTEGER, STRING], "items": False},
     [[1, "a"], [1]], [["a"], [1, "a", 2]]),
    ("minItems", {**ARRAY, "minItems": 1}, [[1]], [[]]),
    ("maxItems", {**ARRAY, "maxItems": 1}, [[1], []], [[1, 2]]),
    ("properties", {**OBJECT, "properties": {"a": INTEGER}}, [{"a": 1}, {}], [{"a": "x"}]),
    ("additionalProperties", {**OBJECT, "additionalProperties": False}, [{}], [{"a": 1}]),
    ("additionalProperties schema", {**OBJECT, "additionalProperties": INTEGER},
     [{"b": 1}], [{"b": "x"}]),
    ("required", {**OBJECT, "required": ["a"]}, [{"a": 1}], [{}, {"b": 1}]),
    ("patternProperties",
     {**OBJECT, "patternProperties": {"^x": INTEGER}, "additionalProperties": False},
     [{"xa": 1}], [{"xa": "a"}, {"y": 1}]),
    ("minProperties", {**OBJECT, "minProperties": 1}, [{"a": 1}], [{}]),
    ("maxProperties", {**OBJECT, "maxProperties": 1}, [{"a": 1}], [{"a": 1, "b": 2}]),
    ("anyOf", {"anyOf": [INTEGER, {"type": "null"}]}, [1, None], ["a"]),
    ("oneOf", {"oneOf": [INTEGER, {"type": "null"}]}, [1, None], ["a"]),
    ("allOf", {"allOf": [{**INTEGER, "minimum": 2}, {"maximum": 5}]}, [3], [1, 6]),
    ("allOf of objects", {"allOf": [
        {**OBJECT, "properties": {"a": INTEGER}, "required": ["a"]},
        {**OBJECT, "properties": {"b": STRING}, "required": ["b"]}]},
     [{"a": 1, "b": "x"}], [{"a": 1}, {"b": "x"}]),
    ("$ref", {"$ref": "#/$defs/x", "$defs": {"x": INTEGER}}, [3], ["a"]),
    ("$ref + sibling", {"$ref": "#/$defs/x", "minimum": 5, "$defs": {"x": INTEGER}}, [5], [3]),
    ("$ref recursion", {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
     [{"v": 1, "next": {"v": 2, "next": None}}], [{"v": 1, "next": {"v": "a", "next": None}}]),
    ("definitions", {"$ref": "#/definitions/x", "definitions": {"x": INTEGER}}, [3], ["a"]),
    ("$anchor", {"$ref": "#a", "$defs": {"x": {"$anchor": "a", **INTEGER}}}, [3], ["a"]),
    ("annotations", {**STRING, "title": "t", "description": "d", "default": 5, "examples": [1],
                     "deprecated": True, "readOnly": True, "$comment": "c", "x-order": 1},
     ["a"], [5]),
    ("a property named like a keyword", {**OBJECT, "properties": {"not": INTEGER, "title": STRING},
                                         "additionalProperties": False},
     [{"not": 1, "title": "a"}], [{"not": "a"}]),
    ("uniqueItems false", {**ARRAY, "uniqueItems": False}, [[1, 1]], [1]),
    ("true", True, [1, {"a": [None]}], []),
    ("minLength without type", {"minLength": 2}, [1, "ab"], ["a"]),
    ("escapes in a name", {**OBJECT, "properties": {'q"\\x': INTEGER}, "required": ['q"\\x']},
     [{'q"\\x': 1}], [{}]),
]  # fmt: skip


@pytest.mark.parametrize("probe", ENFORCED, ids=lambda p: p[0])
def test_a_keyword_lets_the_valid_through_and_blocks_the_invalid(probe):
    _, schema, valid, invalid = probe
    referee = jsonschema.Draft202012Validator(schema)
    for value in valid:
        assert referee.is_valid(value)
        assert follows({"json_schema": schema}, compact(value)), value
    for value in invalid:
        assert not referee.is_valid(value)
        assert not follows({"json_schema": schema}, compact(value)), value


FORMATS = {
    "date": ("2024-02-29", "2024-13-01"),
    "time": ("10:20:30Z", "25:00:00Z"),
    "date-time": ("2024-01-31T10:20:30Z", "2024-01-31"),
    "duration": ("P1DT2H", "1 day"),
    "email": ("a@b.de", "a.b.de"),
    "hostname": ("b.de", "b..de"),
    "ipv4": ("10.0.0.255", "10.0.0.256"),
    "ipv6": ("::1", ":::1"),
    "uuid": ("123e4567-e89b-12d3-a456-426614174000", "123e4567"),
    "uri": ("https://b.de/x?y=1", "no uri"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_enforced(name):
    schema = {"json_schema": {"type": "string", "format": name}}
    valid, invalid = FORMATS[name]
    assert follows(schema, compact(valid))
    assert not follows(schema, compact(invalid))


REFUSED = [
    # (schema, the place, a word of the reason)
    ({"not": STRING}, "#/not", "enforced"),
    ({**OBJECT, "properties": {"tags": {**ARRAY, "uniqueItems": True}}},
     "#/properties/tags/uniqueItems", "enforced"),
    ({**ARRAY, "contains": INTEGER}, "#/contains", "enforced"),
    ({**ARRAY, "items": {**ARRAY, "minContains": 2}}, "#/items/minContains", "enforced"),
    ({**OBJECT, "propertyNames": {"pattern": "x"}}, "#/propertyNames", "enforced"),
    ({**OBJECT, "dependentRequired": {"a": ["b"]}}, "#/dependentRequired", "enforced"),
    ({**OBJECT, "dependentSchemas": {"a": {}}}, "#/dependentSchemas", "enforced"),
    ({**OBJECT, "dependencies": {"a": ["b"]}}, "#/dependencies", "enforced"),
    ({"anyOf": [INTEGER, {"if": INTEGER, "then": {"minimum": 3}}]}, "#/anyOf/1/if", "enforced"),
    ({**OBJECT, "unevaluatedProperties": False}, "#/unevaluatedProperties", "enforced"),
    ({**ARRAY, "unevaluatedItems": False}, "#/unevaluatedItems", "enforced"),
    ({"$dynamicRef": "#a"}, "#/$dynamicRef", "enforced"),
    ({**STRING, "contentEncoding": "base64"}, "#/contentEncoding", "enforced"),
    ({**OBJECT, "properties": {"a": {**STRING, "nullable": True}}},
     "#/properties/a/nullable", '"null"'),
    ({"typ": "string"}, "#/typ", "enforced"),
    ({"x-guidance": {"lenient": True}, **OBJECT}, "#/x-guidance", "enforced"),
    ({"$defs": {"a/b": {"anyOf": [{"not": {}}]}}, **OBJECT},
     "#/$defs/a~1b/anyOf/0/not", "enforced"),
    ({"oneOf": [INTEGER, {"type": "number"}]}, "#", "oneOf"),
    ({**OBJECT, "properties": {"a": {"oneOf": [STRING, {**STRING, "maxLength": 3}]}}},
     "#/properties/a", "oneOf"),
    ({**ARRAY, "items": {**STRING, "pattern": "(?!a)b"}}, "#/items", "look-around"),
    ({**ARRAY, "items": {**STRING, "pattern": r"^(a)\1$"}}, "#/items", "backreference"),
    ({**OBJECT, "properties": {"a": {**STRING, "format": "foo"}}}, "#/properties/a", "foo"),
    ({**OBJECT, "properties": {"a": {**INTEGER, "format": "int32"}}},
     "#/properties/a/format", "numbers"),
    ({**OBJECT, "properties": {"a": {"type": "strin"}}}, "#/properties/a", "strin"),
    ({**OBJECT, "properties": {"a": {"$ref": "#/$defs/no"}}}, "#/properties/a", "no"),
    ({"$ref": "https://example.org/a"}, "#", "example.org"),
    ({**OBJECT, "properties": {"n": {**INTEGER, "minimum": 5, "maximum": 3}}, "required": ["n"]},
     "#", "unsatisfiable"),
    ({**OBJECT, "properties": {"a": "string"}}, "#/properties/a", "object"),
    (False, "#", "nsatisfiable"),
]  # fmt: skip


@pytest.mark.parametrize("probe", REFUSED, ids=lambda p: p[1])
def test_what_cannot_be_enforced_is_refused_with_its_place(probe):
    schema, place, reason = probe
    with pytest.raises(UserError) as caught:
        GRAMMARS.matcher({"json_schema": schema})
    message = str(caught.value)
    assert message.startswith(f"json_schema {place}: "), message
    assert reason in message


def test_endless_and_bottomless_schemas_are_refused():
    loop = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    with pytest.raises(UserError, match="grammar"):
        GRAMMARS.matcher({"json_schema": loop})
    for levels in (100, 3000):
        deep = {"type": "string"}
        for _ in range(levels):
            deep = {"type": "array", "items": deep}
        with pytest.raises(UserError, match="deep"):
            GRAMMARS.matcher({"json_schema": deep})


REAL = {
    "calendar event": {
        "type": "object",
        "properties": {
            "title": {"type": "string", "minLength": 1, "maxLength": 12},
            "day": {"type": "string", "format": "date"},
            "guests": {"type": "array", "items": {"type": "string", "format": "email",
                                                  "maxLength": 12}, "maxItems": 2},
            "remind": {"type": ["integer", "null"], "minimum": 0, "maximum": 60},
        },
        "required": ["title", "day", "guests", "remind"],
        "additionalProperties": False,
    },
    "invoice": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "number": {"type": "string", "pattern": "^R-[0-9]{4}$"},
            "lines": {"type": "array", "minItems": 1, "maxItems": 2,
                      "items": {"$ref": "#/$defs/line"}},
            "paid": {"type": "boolean"},
        },
        "required": ["number", "lines", "paid"],
        "additionalProperties": False,
        "$defs": {"line": {
            "type": "object",
            "properties": {
                "what": {"enum": ["书", "Füller", "ink"]},
                "count": {"type": "integer", "minimum": 1, "maximum": 99},
            },
            "required": ["what", "count"],
            "additionalProperties": False,
        }},
    },
    "folder tree": {
        "$ref": "#/$defs/folder",
        "$defs": {"folder": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z]{1,5}$"},
                "inside": {"type": "array", "maxItems": 1, "items": {"$ref": "#/$defs/folder"}},
            },
            "required": ["name", "inside"],
            "additionalProperties": False,
        }},
    },
    "tagged union": {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": kind}, **fields},
             "required": ["kind", *fields], "additionalProperties": False}
            for kind, fields in (
                ("circle", {"r": {"type": "number", "exclusiveMinimum": 0, "maximum": 9}}),
                ("box", {"w": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500}}),
            )
        ],
        "discriminator": {"propertyName": "kind"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    return Engine(make_model(), CONFIG)


@pytest.mark.parametrize("name", REAL)
def test_a_random_model_fills_real_schemas(engine, name):
    grammar = {"json_schema": REAL[name]}
    jobs = [
        ([i], SamplingParams(max_tokens=240, temperature=0.8, seed=i, grammar=grammar))
        for i in range(4)
    ]
    requests, news = run(engine, jobs)
    finished = [r for r in requests if r.finish_reason == "stop"]
    assert finished  # what recurses may reach max_tokens instead
    for request, heard in zip(requests, news, strict=True):
        text = "".join(delta.text for delta in heard)
        if request in finished:
            jsonschema.Draft202012Validator(REAL[name]).validate(json.loads(text))
            assert text == compact(json.loads(text)) or "\\" in text or "e" in text.lower()
        else:
            assert request.finish_reason == "length"


@given(st.text(max_size=12))
@settings(max_examples=15, deadline=None)
def test_any_text_is_a_string(text):
    assert follows({"json_schema": {"type": "string"}}, compact(text))


@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4), st.text(max_size=6))
@settings(max_examples=30, deadline=None)
@example(["\x7f", "a\x1f"], "\x7f")
def test_choices_are_themselves_and_nothing_else(options, other):
    assert all(follows({"choice": options}, option) for option in options)
    assert follows({"choice": options}, other) == (other in options)
