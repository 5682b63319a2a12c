"""The ReAct text protocol (arXiv:2210.03629, field names as in Lagent): to write it and to read it.

    Thought: ...
    Action: calculator
    Action Input: {"expression":"12 + 30"}
    Observation: 42
    Final Answer: ...

The grammar made here is what an answer is decoded under: a thought and then one call whose input
follows the tool's own JSON schema, or the final answer. An action that cannot be parsed is then not
something to be handled well but something that cannot be written.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from internjax.agents.tool import Tool

THOUGHT = "[^\n0-9=]{1,100}"
"""What a thought may be: a line without figures. A small model that computes in its thought then
believes the wrong number more than its question; measured, that is most of its failures."""
ANSWER = "[^\n]{1,300}"

_INSTRUCTIONS = """Answer the question with the tools:
{tools}
Use this format:
Thought: what to do
Action: one of {names}
Action Input: the input of the action as JSON
Observation: the result of the action
Final Answer: the answer to the question"""
FORCE_STOP = "You have no actions left. Give the final answer now: Final Answer: ..."
HINT = 'No action was found. Write "Action:" and "Action Input:", or "Final Answer:".'

_FINAL = re.compile(r"Final Answer:[ \t]*(.*)", re.DOTALL)
_THOUGHT = re.compile(r"Thought:[ \t]*([^\n]*)")
_ACTION = re.compile(r"Action:[ \t]*([^\n]+?)[ \t]*\nAction Input:[ \t]*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Parsed:
    """What a model wrote: a thought, and a call (name, JSON text), an answer, or neither."""

    thought: str = ""
    call: tuple[str, str] | None = None
    answer: str | None = None


def instructions(tools: Iterable[Tool]) -> str:
    """The system text: the tools and the format."""
    tools = list(tools)
    described = "\n".join(f"{tool.name}: {tool.description}{_inputs(tool)}" for tool in tools)
    return _INSTRUCTIONS.format(tools=described, names=", ".join(tool.name for tool in tools))


def example_turns(tool: Tool) -> list[tuple[str, str]]:
    """A tool's examples as (role, text) turns that went before.

    As turns of their own, not as system text: a small model then sees that after an observation the
    next turn is the final answer; told in one text it goes on acting.
    """
    turns = []
    for example in tool.examples:
        thought = example.thought or f"I use {tool.name}."
        turns += [
            ("user", question(example.question)),
            (
                "assistant",
                write_call(thought, tool.name, example.arguments),
            ),
            ("user", observation(example.result)),
            ("assistant", f"Final Answer: {example.answer}"),
        ]
    return turns


def question(text: str) -> str:
    """A question as the model reads it."""
    return f"Question: {text}"


def write_call(thought: str, name: str, arguments: dict) -> str:
    """A thought and a call as the model is to write them."""
    given = json.dumps(arguments, separators=(",", ":"), ensure_ascii=False)
    return f"Thought: {thought}\nAction: {name}\nAction Input: {given}"


def observation(text: str) -> str:
    """A tool's result as the model reads it."""
    return f"Observation: {text}"


def grammar(
    tools: Iterable[Tool], *, act: bool = True, finish: bool = True, thought: str = THOUGHT
) -> dict:
    """The grammar of one turn for the server's `grammar` field.

    Args:
        act: whether a call is allowed.
        finish: whether a final answer is allowed.
        thought: regular expression of the thought.
    """
    assert act or finish, "a turn must allow something"
    rules, turns = [], []
    if act:
        calls = []
        for index, tool in enumerate(tools):
            schema = {**tool.parameters, "x-guidance": _COMPACT}
            rules.append(f"input_{index}: %json {json.dumps(schema)}")
            calls.append(f"{json.dumps(tool.name + chr(10) + 'Action Input: ')} input_{index}")
        turns.append('"Thought: " THOUGHT "\\nAction: " call')
        rules += ["call: " + " | ".join(calls), f"THOUGHT: /{_slashes(thought)}/"]
    if finish:
        turns.append('"Final Answer: " ANSWER')
        rules.append(f"ANSWER: /{_slashes(ANSWER)}/")
    return {"lark": "\n".join(["start: " + " | ".join(turns), *rules]) + "\n"}


# Free white space inside JSON is where a small model gets lost.
_COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}


def parse(text: str) -> Parsed:
    """Reads a turn: a final answer wins, else the last action counts (Lagent's rule)."""
    thought = _THOUGHT.search(text)
    said = thought[1].strip() if thought else ""
    final = _FINAL.search(text)
    if final:
        return Parsed(said, answer=final[1].strip())
    start = text.rfind("Action:")
    action = _ACTION.match(text, start) if start >= 0 else None
    if action:
        given = action[2].split("\nObservation:")[0].strip()
        return Parsed(said, call=(action[1].strip(), given))
    return Parsed(said or text.strip())


def _inputs(tool: Tool) -> str:
    """The names and meanings of a tool's arguments, in a few words."""
    known = tool.parameters.get("properties", {})
    words = (f'"{k}": {v.get("description") or v.get("type", "value")}' for k, v in known.items())
    return f" Input: {{{', '.join(words)}}}"


def _slashes(pattern: str) -> str:
    """A regular expression for between slashes, in one line."""
    return pattern.replace("/", r"\/").replace("\n", r"\n")
