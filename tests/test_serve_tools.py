"""Tool calls: the grammar against texts by hand, the reader against any cutting, random models."""

import json
from dataclasses import replace

import jsonschema
import pytest
from hypothesis import given, settings, strategies as st

from internjax.data.tokenizer import Tokenizer
from internjax.errors import UserError
from internjax.models.lm import SamplingParams
from internjax.serve.answers import Answer, best
from internjax.serve.calls import CallReader
from internjax.serve.engine import Engine
from internjax.serve.grammar import Grammars
from internjax.serve.scheduler import Delta, IdLogprob
from internjax.serve.tools import MAX_CALLS, STYLES, plan_tools
from tests.fakes import BYTE_VOCAB, byte_tokenizer
from tests.test_serve_engine import CONFIG, make_model, run
from tests.test_serve_json_schema import follows

TOKENIZER = byte_tokenizer()
SUM = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "why": {"type": "string", "maxLength": 8},
    },
    "required": ["n"],
    "additionalProperties": False,
}
TREE = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/node"}},
    "required": ["root"],
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"is": {"enum": ["leaf", "書"]}, "in": {"$ref": "#/$defs/node"}},
            "required": ["is"],
            "additionalProperties": False,
        }
    },
}


def tool(name, parameters=None):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("sum", SUM), tool("clock"), tool("tree", TREE)]
SCHEMAS = {"sum": SUM, "clock": {"maxProperties": 0}, "tree": TREE}


def plan(choice=None, tools=TOOLS, style="hermes", **options):
    return plan_tools(tools, choice, style, tokenizer=TOKENIZER, **options)


def named(name):
    return {"type": "function", "function": {"name": name}}


def written(name, arguments="{}"):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


CLOCK, ADD = written("clock"), written("sum", '{"n": 5, "why": "</tool_call>"}')
ADD_SHORT = written("sum", '{"n": 5, "why": "</to"}')


@pytest.mark.parametrize(
    ("choice", "options", "possible", "impossible"),
    [
        ("auto", {}, ["", "hi <tool_c", CLOCK, f"hi\n{ADD_SHORT}", f"{CLOCK}\n{ADD_SHORT}{CLOCK}"],
         [f"{CLOCK} and", "<tool_call>", f"hi {written('clocks')}", written("sum"),
          written("sum", '{"n": 100}'), written("clock", '{"x": 1}'), CLOCK * (MAX_CALLS + 1)]),
        ("auto", {"parallel": False}, ["", CLOCK, f"hi {CLOCK}"], [CLOCK * 2]),
        ("required", {}, [CLOCK, CLOCK * MAX_CALLS], ["", f"hi {CLOCK}"]),
        ("required", {"parallel": False}, [CLOCK], [CLOCK * 2]),
        (named("sum"), {}, [ADD_SHORT], [CLOCK, ADD_SHORT * 2, ""]),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("sum")]}},
         {}, [ADD_SHORT, ADD_SHORT * 2], [CLOCK, ""]),
        ("auto", {"asked": {"json_schema": SUM}},
         ['{"n":5}', CLOCK, '{"n":5,"why":"<tool>"}'], ["hi", f'{{"n":5}}{CLOCK}', '{"n": 5}']),
    ],
)  # fmt: skip
def test_what_each_choice_allows(choice, options, possible, impossible):
    grammar = plan(choice, **options).grammar
    assert [text for text in possible if not follows(grammar, text)] == []
    assert [text for text in impossible if follows(grammar, text)] == []


@pytest.mark.parametrize(
    ("choice", "tools", "reason"),
    [
        ("required", [], "no tools"),
        (named("nope"), TOOLS, "names none of sum, clock, tree"),
        ({"type": "function"}, TOOLS, "names none"),
        ("any", TOOLS, "none, auto, required"),
        ("auto", [TOOLS[0], TOOLS[0]], "same name"),
        ("auto", [tool("a", {"type": "array"})], "tools/0/function/parameters #/type"),
        ("auto", [TOOLS[0], tool("a", {"properties": {"x": {"not": {}}}})],
         "tools/1/function/parameters #/properties/x/not"),
        ("auto", [tool("a", {"x-guidance": {"lenient": True}})], "x-guidance"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "any", "tools": []}}, TOOLS, "any"),
    ],
)  # fmt: skip
def test_choices_and_schemas_that_cannot_be_obeyed_are_refused(choice, tools, reason):
    with pytest.raises(UserError) as caught:
        plan(choice, tools)
    assert reason in str(caught.value)


def read(text, pieces, **options):
    """Feeds a text in pieces; returns words, calls and what was cut off."""
    reader = CallReader(STYLES["hermes"], **{"anywhere": True} | options)
    heard = ""
    for begin, end in zip([0, *pieces], [*pieces, len(text)], strict=True):
        reader.push(text[begin:end])
        assert reader.words.startswith(heard)  # nothing is taken back
        heard = reader.words
    cut = reader.finish()
    assert reader.words.startswith(heard)
    return reader.words, [(c.name, c.arguments, c.complete) for c in reader.calls], cut


CUT = ADD[: ADD.index('"n"') + 2]
DONE = ("clock", "{}", True)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_reading_does_not_depend_on_the_cutting(data):
    cases = [
        ("hello <tool", "hello <tool", [], ""),
        (" \n", " \n", [], ""),
        (f"so: \n\n{CLOCK}\n{ADD}", "so:",
         [DONE, ("sum", '{"n": 5, "why": "</tool_call>"}', True)], ""),
        (written("sum", '{"why": "\\"}{\\\\", "n": 1}'), "",
         [("sum", '{"why": "\\"}{\\\\", "n": 1}', True)], ""),
        (f"{CLOCK}\n", "", [DONE], ""),
        (CLOCK + CUT, "", [DONE, ("sum", '{"n', False)], CUT),
        (f"hm {ADD[:20]}", f"hm {ADD[:20]}", [], ""),
        (CLOCK[:-1], "", [("clock", "{}", False)], CLOCK[:-1]),
    ]  # fmt: skip
    text, words, calls, cut = data.draw(st.sampled_from(cases))
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    assert read(text, sorted(places)) == (words, calls, cut)


def test_a_marker_inside_a_formatted_answer_is_text():
    text = '{"why":"<tool_call>"}'
    assert read(text, [3, 9], anywhere=False) == (text, [], "")
    assert read(CLOCK, [3, 9], anywhere=False)[1] == [DONE]
    assert read("<tool", [2], anywhere=False) == ("<tool", [], "")


def finished(text, reason, plan):
    answer = Answer(TOKENIZER, plan)
    half = len(text) // 2
    answer.take(Delta(text[:half], (1,)))
    pieces = answer.new_call_pieces()
    answer.take(Delta(text[half:], (2,), finish_reason=reason))
    return answer, [*pieces, *answer.new_call_pieces()]


def test_an_answer_streams_names_first_and_never_shows_a_cut_call_as_one():
    answer, pieces = finished(f"x {CLOCK}{ADD}", "stop", plan())
    words, calls, reason = answer.result()
    assert (words, reason) == ("x", "tool_calls")
    assert [c["function"]["name"] for c in calls] == ["clock", "sum"]
    assert [p["index"] for p in pieces] == sorted(p["index"] for p in pieces)
    for index, call in enumerate(calls):
        first, *rest = [p for p in pieces if p["index"] == index]
        assert (first["id"], first["type"]) == (call["id"], "function")
        assert first["function"] == {"name": call["function"]["name"], "arguments": ""}
        assert all(set(p) == {"index", "function"} for p in rest)
        arguments = "".join(p["function"]["arguments"] for p in rest)
        assert arguments == call["function"]["arguments"]
    for reason in ("length", "stop"):  # a stop string may cut a call as well
        words, calls, told = finished(f"x {ADD[:-3]}", reason, plan())[0].result()
        assert (calls, told) == ([], reason)
        assert words == f"x {ADD[:-3]}"


def test_the_likeliest_a_token_are_best():
    answers = []
    for logprobs in ([-3.0], [-1.0, -1.5], [-1.0], [-2.0, -0.5, -0.5]):
        answer = Answer(TOKENIZER)
        entries = tuple(IdLogprob(5, x) for x in logprobs)
        answer.take(Delta("x", (5,) * len(logprobs), entries, "stop", by_token=True))
        assert len(answer.logprobs) == len(logprobs) - 1
        answers.append(answer)
    assert best(answers, 2) == [2, 3]
    assert best(answers, 4) == [2, 3, 1, 0]


def marked_tokenizer() -> Tokenizer:
    """The byte vocabulary with InternLM2's markers instead of ChatML's, one id each."""
    plain = byte_tokenizer()
    plain.engine.special = {"<|action_start|>": 256, "<|plugin|>": 257, "<|action_end|>": 258}
    return Tokenizer(
        engine=plain.engine, special_tokens=plain.engine.special, bos_id=None, eos_id=0,
        pad_id=0, eos_ids=(0,),
    )  # fmt: skip


MARKED = marked_tokenizer()


@pytest.mark.parametrize(
    ("choice", "style", "tokenizer"),
    # Random weights do not spell an opener; where it is one token, a bias makes it likely.
    [("required", "hermes", TOKENIZER), ("auto", "internlm2", MARKED)],
)
def test_calls_of_a_random_model_always_parse(choice, style, tokenizer):
    engine = Engine(replace(make_model(), tokenizer=tokenizer), CONFIG)
    planned = plan_tools(TOOLS, choice, style, tokenizer=tokenizer)
    options = {"max_tokens": 180, "temperature": 1.0, "grammar": planned.grammar}
    if planned.markers:
        options |= {"skip_special_tokens": False, "logit_bias": {256: 9.0}}
    requests, news = run(engine, [([i], SamplingParams(seed=i, **options)) for i in range(8)])
    kinds = []
    for request, heard in zip(requests, news, strict=True):
        answer, pieces = Answer(tokenizer, planned), []
        for delta in heard:
            answer.take(delta)
            pieces += answer.new_call_pieces()
        words, calls, reason = answer.result()
        ended = request.finish_reason
        assert reason == ("tool_calls" if calls and ended == "stop" else ended)
        assert calls or choice == "auto" or reason == "length"
        for index, call in enumerate(calls):
            function = call["function"]
            jsonschema.validate(json.loads(function["arguments"]), SCHEMAS[function["name"]])
            parts = [p["function"]["arguments"] for p in pieces if p["index"] == index]
            assert "".join(parts) == function["arguments"]
        assert reason == "length" or "<|" not in words
        kinds.append((reason, bool(words), len(calls)))
    assert sum(calls for _, _, calls in kinds) >= 3
    assert choice == "required" or any(words and calls for _, words, calls in kinds)


def test_markers_may_be_special_tokens_or_letters():
    body = '\n{"name": "sum", "parameters": {"n": 7}}'
    marked = plan_tools(TOOLS, "auto", "internlm2", tokenizer=MARKED)
    spelled = plan(style="internlm2")
    assert marked.markers
    assert not spelled.markers
    assert follows(spelled.grammar, f"hi <|action_start|><|plugin|>{body}<|action_end|>")
    matcher = Grammars(MARKED, BYTE_VOCAB).matcher(marked.grammar)
    # spelled by letters the markers of this vocabulary are words
    ids = [*b"hi <|action_start|>", 256, 257, *body.encode(), 258]
    assert not any(matcher.advance(i) for i in ids)
