"""A chat's question answered with tools: the agent loop as a stream of rows, then the answer.

What went before in the chat goes along; the run can be stopped between two tokens.
"""

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from internjax.agents import protocol
from internjax.agents.loop import Budget, Message, Policy, Reply, Result, Row, Trace, connect, run
from internjax.agents.policies import ReAct, make_policy
from internjax.agents.tool import Tool
from internjax.chat.source import End, Params, Source, Text, explained

BREATH_SECONDS = 0.3
"""An empty piece of text follows so much silence: only a generator that yields can be closed."""


def act(
    source: Source,
    model: str,
    messages: list[Message],
    params: Params,
    tools: list[Tool],
    *,
    policy: str = "react",
) -> Iterator[Row | Text | End]:
    """Yields thoughts, calls and results as they come, then the answer.

    Args:
      messages: the chat up to and with the question.
      params: `max_tokens` is of one step.

    Raises:
      UserError: what the server says against a request.
    """
    *earlier, question = messages
    start, news, stop = time.perf_counter(), queue.SimpleQueue(), threading.Event()
    chatting = InChat(make_policy(policy), tuple(earlier), params)
    budget = Budget(step_tokens=params.max_tokens or Budget.step_tokens)
    url = source.endpoint()

    def work() -> Trace:
        with explained(url), connect(url, api_key=source.api_key) as client:
            asked = (Streamed(client, stop), model, question["content"], tools, chatting)
            return run(*asked, budget=budget, on_step=news.put)

    pool = ThreadPoolExecutor(1)
    running = pool.submit(work)
    running.add_done_callback(lambda _: news.put(None))
    try:
        while True:
            try:
                step = news.get(timeout=BREATH_SECONDS)
            except queue.Empty:
                yield Text("")
                continue
            if step is None:
                break
            yield from step.rows()
    finally:  # the reader may have gone: the run stops at its next token, nobody waits for that
        stop.set()
        pool.shutdown(wait=False)
    yield from _ending(running.result(), time.perf_counter() - start)


def _ending(trace: Trace, seconds: float) -> Iterator[Row | Text | End]:
    if trace.answer is None:
        yield Row("error", f"no answer: out of {trace.finish}")
    else:
        yield Text(trace.answer)
    prompt = sum(step.prompt_tokens for step in trace.steps)
    completion = sum(step.completion_tokens for step in trace.steps)
    yield End("stop" if trace.answer is not None else trace.finish, prompt, completion, seconds)


@dataclass(frozen=True)
class InChat:
    """A policy whose question stands at the end of a chat, drawn with the chat's parameters.

    Fields:
      policy: how tools are asked for and read.
      earlier: the system text, if any, then questions and answers in turn.
    """

    policy: Policy
    earlier: tuple[Message, ...]
    params: Params

    @property
    def name(self) -> str:
        return self.policy.name

    def opening(self, question: str, tools: dict[str, Tool]) -> list[Message]:
        """Examples first, then the chat: what was said last stands nearest the question."""
        system, *shown, asked = self.policy.opening(question, tools)
        own = [m["content"] for m in self.earlier if m["role"] == "system"]
        system = {**system, "content": "\n\n".join([*own, system["content"]])}
        said = [self._said(m) for m in self.earlier if m["role"] != "system"]
        return [system, *shown, *said, asked]

    def _said(self, message: Message) -> Message:
        if not isinstance(self.policy, ReAct):
            return message
        asked, text = message["role"] == "user", message["content"]
        return {**message, "content": protocol.question(text) if asked else f"Final Answer: {text}"}

    def request(
        self, messages: list[Message], tools: dict[str, Tool], *, first: bool, last: bool
    ) -> dict[str, Any]:
        drawn = {k: v for k, v in self.params.fields().items() if k != "max_tokens"}
        return drawn | self.policy.request(messages, tools, first=first, last=last)

    def read(self, message: Any, *, cut_off: bool) -> Reply:
        return self.policy.read(message, cut_off=cut_off)

    def report(self, reply: Reply, results: list[Result]) -> list[Message]:
        return self.policy.report(reply, results)


class Stopped(RuntimeError):
    """Nobody waits for the answer any more."""


class Streamed:
    """As much of the openai client as the loop uses; it streams, so that it can be stopped."""

    def __init__(self, client: Any, stop: threading.Event):
        self._client, self._stop = client, stop
        self.chat = self.completions = self

    def create(self, **asked: Any) -> SimpleNamespace:
        """One completion, put together from its pieces.

        Raises:
          Stopped: between two pieces.
        """
        options = {"stream": True, "stream_options": {"include_usage": True}}
        with self._client.chat.completions.create(**asked, **options) as chunks:
            return join(self._unless_stopped(chunks))

    def _unless_stopped(self, chunks: Iterator[Any]) -> Iterator[Any]:
        for chunk in chunks:
            if self._stop.is_set():
                raise Stopped
            yield chunk


def join(chunks: Iterator[Any]) -> SimpleNamespace:
    """Returns the completion that a stream's chunks add up to, with what the loop reads of one."""
    text, calls, reason = "", {}, None
    usage = SimpleNamespace(prompt_tokens=0, completion_tokens=0)
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for part in choice.delta.tool_calls or ():
                call = calls.setdefault(part.index, SimpleNamespace(id="", name="", arguments=""))
                call.id = part.id or call.id
                call.name += part.function.name or ""
                call.arguments += part.function.arguments or ""
    made = [
        SimpleNamespace(id=c.id, function=SimpleNamespace(name=c.name, arguments=c.arguments))
        for _, c in sorted(calls.items())
    ]
    message = SimpleNamespace(content=text, tool_calls=made)
    return SimpleNamespace(
        choices=[SimpleNamespace(message=message, finish_reason=reason)], usage=usage
    )
