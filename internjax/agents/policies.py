"""Two ways to let a model act: ReAct in text, and OpenAI's function calling."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from internjax.agents import protocol
from internjax.agents.loop import Call, Message, Policy, Reply, Result
from internjax.agents.tool import Tool
from internjax.errors import UserError


@dataclass(frozen=True)
class ReAct:
    """Thought, Action, Action Input, Observation in plain text (`protocol`).

    Attributes:
        constrained: decode under the grammar of the tools' schemas (a field of our server); off
            for servers that know no grammar, whose text is then parsed as it comes.
        act_first: the first step must be a call.
        thought: regular expression of a thought, see `protocol.THOUGHT`.
    """

    constrained: bool = True
    act_first: bool = True
    thought: str = protocol.THOUGHT
    name: str = "react"

    def opening(self, question: str, tools: dict[str, Tool]) -> list[Message]:
        turns = [("system", protocol.instructions(tools.values()))]
        for tool in reversed(
            tools.values()
        ):  # the first tool's examples stand nearest the question
            turns += protocol.example_turns(tool)
        turns.append(("user", protocol.question(question)))
        return [{"role": role, "content": text} for role, text in turns]

    def request(
        self, messages: list[Message], tools: dict[str, Tool], *, first: bool, last: bool
    ) -> dict[str, Any]:
        if last:
            messages = _and_told(messages, protocol.FORCE_STOP)
        if not self.constrained:
            return {"messages": messages, "stop": ["\nObservation:"]}
        grammar = protocol.grammar(
            tools.values(),
            act=not last,
            finish=last or not (first and self.act_first),
            thought=self.thought,
        )
        return {"messages": messages, "extra_body": {"grammar": grammar}}

    def read(self, message: Any, *, cut_off: bool) -> Reply:
        text = message.content or ""
        parsed = protocol.parse(text)
        calls = (Call("", *parsed.call),) if parsed.call else ()
        answer = parsed.answer or None
        hint = "" if calls or answer else protocol.HINT
        return Reply({"role": "assistant", "content": text}, parsed.thought, calls, answer, hint)

    def report(self, reply: Reply, results: list[Result]) -> list[Message]:
        texts = [_told(result) for result in results] or ([reply.hint] if reply.hint else [])
        return [{"role": "user", "content": protocol.observation(text)} for text in texts]


@dataclass(frozen=True)
class FunctionCalling:
    """OpenAI's `tools`: the server writes the tools into the prompt and reads the calls back.

    Attributes:
        call_first: the first step must be a call (`tool_choice="required"`).
        system: the system text.
    """

    call_first: bool = True
    system: str = "Use the tools to find the result, then answer with the result."
    name: str = "function"

    def opening(self, question: str, tools: dict[str, Tool]) -> list[Message]:
        # The first tool's examples stand nearest the question.
        shown = [message for tool in reversed(tools.values()) for message in _examples(tool)]
        system = {"role": "system", "content": self.system}
        return [system, *shown, {"role": "user", "content": question}]

    def request(
        self, messages: list[Message], tools: dict[str, Tool], *, first: bool, last: bool
    ) -> dict[str, Any]:
        choice = "none" if last else "required" if first and self.call_first else "auto"
        listed = [tool.as_openai() for tool in tools.values()]
        return {"messages": messages, "tools": listed, "tool_choice": choice}

    def read(self, message: Any, *, cut_off: bool) -> Reply:
        text = (message.content or "").strip()
        calls = tuple(
            Call(call.id, call.function.name, call.function.arguments)
            for call in message.tool_calls or ()
        )
        said: Message = {"role": "assistant", "content": text or None}
        if calls:
            said["tool_calls"] = [_call_message(call) for call in calls]
            return Reply(said, text, calls)
        if text and not cut_off:
            return Reply(said, answer=text)
        said["content"] = text
        hint = "The answer was cut off: be brief." if cut_off else "Give the answer in words."
        return Reply(said, text, hint=hint)

    def report(self, reply: Reply, results: list[Result]) -> list[Message]:
        told = [
            {"role": "tool", "tool_call_id": call.id, "content": _told(result)}
            for call, result in zip(reply.calls, results, strict=True)
        ]
        return told or ([{"role": "user", "content": reply.hint}] if reply.hint else [])


POLICIES: dict[str, Callable[[], Policy]] = {"react": ReAct, "function": FunctionCalling}


def make_policy(name: str) -> Policy:
    """Makes a policy by name.

    Raises:
        UserError: an unknown name.
    """
    if name not in POLICIES:
        raise UserError(f"policy={name!r} is not known; choose one of {', '.join(POLICIES)}.")
    return POLICIES[name]()


def _told(result: Result) -> str:
    return result.text if result.ok else f"Error: {result.text}"


def _and_told(messages: list[Message], text: str) -> list[Message]:
    """The messages with words added to the last one: two turns of one role are none in ChatML."""
    *before, final = messages
    return [*before, {**final, "content": f"{final['content']}\n{text}"}]


def _examples(tool: Tool) -> list[Message]:
    """A tool's examples as turns of a chat that went before."""
    turns: list[Message] = []
    for index, example in enumerate(tool.examples):
        call = Call(f"example_{tool.name}_{index}", tool.name, json.dumps(example.arguments))
        turns += [
            {"role": "user", "content": example.question},
            {"role": "assistant", "content": None, "tool_calls": [_call_message(call)]},
            {"role": "tool", "tool_call_id": call.id, "content": example.result},
            {"role": "assistant", "content": example.answer},
        ]
    return turns


def _call_message(call: Call) -> Message:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
