"""The loop against a scripted server: the openai client, the wire and the tools are real."""

import json
import re

import pytest
from openai import APIConnectionError, BadRequestError
from rich.console import Console

from internjax.agents import protocol
from internjax.agents.loop import Budget, connect, run
from internjax.agents.policies import FunctionCalling, ReAct, make_policy
from internjax.agents.show import print_ending, print_step, to_block
from internjax.agents.sums import compare, is_right, make_sums
from internjax.agents.tool import tool
from internjax.agents.tools.calculator import make_calculator
from internjax.errors import UserError
from tests.scripted_openai import scripted, tool_call


def act(expression: str, thought: str = "I use calculator.") -> str:
    return protocol.write_call(thought, "calculator", {"expression": expression})


def ask(script, policy, *, tools=None, question="What is 2 + 3?", **options):
    tools = tools or [make_calculator()]
    return run(connect(script.url), "tiny", question, tools, policy, **options)


def test_react_acts_observes_and_answers():
    with scripted(act("2 + 3"), "Final Answer: The answer is 5.") as script:
        trace = ask(script, ReAct())
    assert (trace.answer, trace.finish) == ("The answer is 5.", "answer")
    assert trace.steps[0].thought == "I use calculator."
    assert trace.steps[0].calls[0].name == "calculator"
    assert trace.steps[0].results[0].text == "5"
    assert (trace.steps[0].prompt_tokens, trace.steps[0].completion_tokens) == (10, 5)
    first, second = script.requests
    assert first["messages"][-1] == {"role": "user", "content": "Question: What is 2 + 3?"}
    assert [m["role"] for m in second["messages"][-3:]] == ["user", "assistant", "user"]
    assert second["messages"][-1]["content"] == "Observation: 5"


def test_react_must_act_first_and_end_last():
    with scripted(act("1 + 1"), act("1 + 2"), "Final Answer: 3") as script:
        trace = ask(script, ReAct(), budget=Budget(steps=3))
    grammars = [request["grammar"]["lark"] for request in script.requests]
    assert ["ANSWER" in g for g in grammars] == [False, True, True]
    assert ["Action Input" in g for g in grammars] == [True, True, False]
    assert protocol.FORCE_STOP in script.requests[2]["messages"][-1]["content"]
    assert trace.answer == "3"


def test_function_calling_calls_then_answers():
    with scripted(tool_call("calculator", {"expression": "2 + 3"}), "It is 5.") as script:
        trace = ask(script, FunctionCalling())
    assert (trace.answer, trace.finish) == ("It is 5.", "answer")
    assert trace.steps[0].results[0].text == "5"
    first, second = script.requests
    assert [first["tool_choice"], second["tool_choice"]] == ["required", "auto"]
    assert first["tools"] == [make_calculator().as_openai()]
    *_, call, result = second["messages"]
    assert call["tool_calls"][0]["id"] == result["tool_call_id"] == "call_1"
    assert (result["role"], result["content"]) == ("tool", "5")


def test_function_calling_several_calls_in_one_step():
    both = tool_call("calculator", {"expression": "1 + 1"}, "a")
    both["tool_calls"] += tool_call("calculator", {"expression": "2 + 2"}, "b")["tool_calls"]
    with scripted(both, "2 and 4") as script:
        trace = ask(script, FunctionCalling())
    assert [r.text for r in trace.steps[0].results] == ["2", "4"]
    assert [m["tool_call_id"] for m in script.requests[1]["messages"][-2:]] == ["a", "b"]


def test_function_calling_is_not_offered_tools_at_the_end():
    call = tool_call("calculator", {"expression": "1 + 1"})
    with scripted(call, "2") as script:
        ask(script, FunctionCalling(), budget=Budget(steps=2))
    assert script.requests[-1]["tool_choice"] == "none"


@pytest.mark.parametrize(
    "arguments, told",
    [
        ({"expression": "1 / 0"}, "zero"),
        ({"expression": "1 +"}, "pattern"),
        ({}, "expression"),
        ("{broken", "not JSON"),
    ],
)
def test_what_is_wrong_with_a_call_goes_back_and_can_be_repaired(arguments, told):
    right = tool_call("calculator", {"expression": "2 + 3"})
    with scripted(tool_call("calculator", arguments), right, "It is 5.") as script:
        trace = ask(script, FunctionCalling())
    assert not trace.steps[0].results[0].ok
    said = script.requests[1]["messages"][-1]["content"]
    assert said.startswith("Error: ")
    assert told in said
    assert trace.steps[1].results[0].ok
    assert trace.answer == "It is 5."


def test_react_unparsable_text_gets_a_hint():
    with scripted("I would rather chat.", act("2 + 3"), "Final Answer: 5") as script:
        trace = ask(script, ReAct(constrained=False))
    assert protocol.HINT in script.requests[1]["messages"][-1]["content"]
    assert trace.steps[0].calls == ()
    assert trace.answer == "5"
    assert script.requests[0]["stop"] == ["\nObservation:"]
    assert "grammar" not in script.requests[0]


def test_an_unknown_tool_is_told_the_known_ones():
    wrong = protocol.write_call("Hm.", "search", {"query": "x"})
    with scripted(wrong, "Final Answer: 5") as script:
        ask(script, ReAct(constrained=False))
    assert "calculator" in script.requests[1]["messages"][-1]["content"]


def test_a_defect_of_a_tool_is_seen():
    def broken(x: int):
        """Breaks."""
        raise ZeroDivisionError("a bug")

    with (
        scripted(tool_call("broken", {"x": 1})) as script,
        pytest.raises(ZeroDivisionError, match="a bug"),
    ):
        ask(script, FunctionCalling(), tools=[tool(broken)])


def test_budgets_end_a_run_with_its_trace():
    many = [act("1 + 1")] * 9
    with scripted(*many) as script:
        trace = ask(script, ReAct(), budget=Budget(steps=3))
    assert (trace.finish, len(trace.steps), trace.answer) == ("steps", 3, None)
    with scripted(*many) as script:
        trace = ask(script, ReAct(), budget=Budget(steps=9, tokens=31))
    assert (trace.finish, len(trace.steps)) == ("tokens", 3)
    with scripted(act("1 + 1"), {"content": act("1 + 1"), "delay": 3.0}) as script:
        trace = ask(script, ReAct(), budget=Budget(seconds=1.0))
    assert (trace.finish, len(trace.steps)) == ("seconds", 1)
    assert trace.seconds < 2.5
    with pytest.raises(UserError, match=r"budget\.steps"):
        Budget(steps=0)


def test_an_answer_that_was_cut_off_is_no_answer():
    cut = {"content": "The answer is", "finish_reason": "length"}
    with scripted(cut, "5") as script:
        trace = ask(script, FunctionCalling(call_first=False))
    assert trace.answer == "5"
    assert "brief" in script.requests[1]["messages"][-1]["content"]


def test_errors_of_the_server_pass_through():
    with scripted() as script, pytest.raises(BadRequestError, match="script has ended"):
        ask(script, ReAct())
    with pytest.raises(APIConnectionError):
        ask(script, ReAct())  # nobody listens there any more


def test_a_trace_is_saved_shown_and_reported(tmp_path):
    shown = Console(record=True, width=100)
    with scripted(act("1 / 0", "Try [it]."), act("2 + 3"), "Final Answer: [5]") as script:
        trace = ask(script, ReAct(), on_step=lambda step: print_step(shown, step))
    print_ending(shown, trace)
    text = shown.export_text()
    for expected in ("Try [it].", "1 / 0", "divides by zero", "[5]", "3 steps, 45 tokens"):
        assert expected in text
    trace.save(tmp_path / "trace.json")
    saved = json.loads((tmp_path / "trace.json").read_text())
    assert saved["steps"][1]["results"][0]["text"] == "5"
    assert list(tmp_path.iterdir()) == [tmp_path / "trace.json"]
    block = to_block(trace)
    kinds = [step.kind for step in block.steps]
    assert kinds == ["user", "thought", "call", "error", "thought", "call", "result", "answer"]
    assert block.steps[2].name == "calculator"


def test_policies_by_name():
    assert make_policy("react").name == "react"
    assert make_policy("function").name == "function"
    with pytest.raises(UserError, match="react, function"):
        make_policy("rewoo")


@pytest.mark.parametrize(
    "text, thought, call, answer",
    [
        ("Thought: a\nAction: b\nAction Input: {}", "a", ("b", "{}"), None),
        ("Action: x\nAction Input: 1\nAction: y\nAction Input: 2", "", ("y", "2"), None),
        ("Action: b\nAction Input: {}\nFinal Answer: 7", "", None, "7"),
        ("Action: b\nAction Input: {}\nObservation: made up", "", ("b", "{}"), None),
        ("Action: b", "Action: b", None, None),
        ("just words", "just words", None, None),
        ("", "", None, None),
    ],
)
def test_reading_react_text(text, thought, call, answer):
    parsed = protocol.parse(text)
    assert (parsed.thought, parsed.call, parsed.answer) == (thought, call, answer)


def test_sums_are_generated_and_graded():
    sums = make_sums(50, seed=3)
    assert sums == make_sums(50, seed=3) != make_sums(50, seed=4)
    for each in sums:
        numbers = [int(n) for n in re.findall(r"\d+", each.question)]
        assert len(numbers) in (2, 3)
        assert sum(numbers) == each.answer
        assert not is_right(each.question, each.answer)
    assert is_right("That makes 1,234.", 1234)
    assert is_right("1234.0", 1234)
    assert is_right("The answer is 1234.", 1234)
    for wrong in ("12345", "0.1234", "11234", "", None, "no idea"):
        assert not is_right(wrong, 1234)


def test_comparison_asks_bare_and_with_tools():
    two = make_sums(2, seed=0)

    def obedient(body):
        """A model that copies the question's sum into the tool and the result into the answer."""
        last = body["messages"][-1]["content"]
        if last.startswith("Observation: "):
            return "Final Answer: " + last.removeprefix("Observation: ")
        numbers = re.findall(r"\d+", last)
        return act(" + ".join(numbers)) if "grammar" in body else "I think it is 7."

    with scripted(*[obedient] * 6) as script:
        result = compare(connect(script.url), "tiny", [make_calculator()], ReAct(), two)
    assert (result.bare_right, result.tool_right) == (0, 2)
    assert result.bare_answers == ("I think it is 7.",) * 2
    assert "grammar" not in script.requests[0]
