"""Agents over our own server: whatever a random model is made to write, its calls are valid."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from pydantic import BaseModel

from internjax.agents import protocol
from internjax.agents.loop import Budget, connect, run
from internjax.agents.policies import FunctionCalling, ReAct
from internjax.agents.tool import tool
from internjax.agents.tools.calculator import make_calculator
from internjax.serve.grammar import Grammars
from tests.fakes import BYTE_VOCAB, byte_tokenizer


class Point(BaseModel):
    x: int
    y: int = 0


def draw(points: list[Point], colour: str | None = None):
    """Draws points."""
    return f"{len(points)} points"


TOOLS = [make_calculator(), tool(draw)]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(byte_tokenizer(), BYTE_VOCAB)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rng=st.randoms(use_true_random=False), first=st.booleans())
def test_whatever_is_written_under_the_grammar_can_be_carried_out(grammars, rng, first):
    """A uniform random writer, cut off like a model at its token limit, or done."""
    import numpy as np

    tokenizer = byte_tokenizer()
    matcher = grammars.matcher(protocol.grammar(TOOLS, finish=not first))
    words, ids, done = np.zeros((BYTE_VOCAB + 31) // 32, np.uint32), [], False
    while not done and len(ids) < 1500:
        matcher.fill(words)
        allowed = [t for t in range(BYTE_VOCAB) if words[t // 32] >> np.uint32(t % 32) & 1]
        closing = [t for t in allowed if chr(t) in '"}])\n' or t >= 256]
        token = rng.choice(closing if closing and rng.random() < 0.3 else allowed)
        done = token >= 256 or matcher.advance(token)
        ids += [token] if token < 256 else []
    if not done:
        return
    text = tokenizer.decode(ids)
    reply = ReAct().read(SimpleNamespace(content=text), cut_off=False)
    assert bool(reply.calls) != (reply.answer is not None) or not text.strip(), text
    assert reply.calls or not first
    for call in reply.calls:
        validate(call.name, json.loads(call.arguments))


def validate(name: str, arguments: dict) -> None:
    """The tool's own check of its arguments, without carrying the call out."""
    if name == "draw":
        assert draw.__name__ == name
        for point in arguments["points"]:
            Point.model_validate(point, strict=True)
        assert set(arguments) <= {"points", "colour"}
    else:
        import re

        (expression,) = arguments.values()
        assert re.search(TOOLS[0].parameters["properties"]["expression"]["pattern"], expression)


@pytest.fixture(scope="module")
def served():
    pytest.importorskip("fastapi")
    from internjax.serve.server import serving
    from tests.test_serve_openai import ENGINE, make_model

    with (
        serving(make_model(context=2048), name="tiny", engine=ENGINE) as url,
        connect(url) as client,
    ):
        yield client


@pytest.mark.parametrize("policy", [ReAct(), FunctionCalling()], ids=lambda p: p.name)
def test_a_random_model_calls_validly_over_http(served, policy):
    """The tiny random model means nothing by it, but every finished call passes its schema."""
    # One step: in bytes for tokens, a second prompt would not fit the tiny context.
    budget = Budget(steps=1, step_tokens=150)
    trace = run(served, "tiny", "What is 2 + 3?", [make_calculator()], policy, budget=budget)
    assert trace.steps
    for step in trace.steps:
        for result in step.results:
            assert "Wrong arguments" not in result.text or "JSON" in result.text
