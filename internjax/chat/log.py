"""What the web page shows of a chat, as data: an answer with its steps grows event by event.

Knows messages in the form of Gradio's chatbot, but not Gradio.
"""

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

from internjax.agents.loop import Row
from internjax.agents.tools import make_tools
from internjax.chat.acting import act
from internjax.chat.source import End, Message, Params, Source, Text
from internjax.errors import UserError

Log = list[dict[str, Any]]
"""Messages as the page shows them; those with "metadata" are steps of an agent."""

FRAME_SECONDS = 0.04
"""Between two pictures of a growing answer: each carries news to the browser."""


def reply(
    sources: list[Source],
    policy: str,
    question: str,
    chosen: str | None,
    log: Log,
    system: str,
    temperature: float,
    top_p: float,
    max_tokens: str,
    seed: str,
    tools: list[str],
) -> Iterator[tuple[Log, str, Log]]:
    """Yields the growing log, twice: to be shown and to be kept; between them what it cost."""
    cost, log = "", [*log, {"role": "user", "content": question}]
    yield log, cost, log
    drawn = time.monotonic()
    try:
        source, model = pick(sources, chosen)
        params = Params(temperature, top_p, whole(max_tokens), whole(seed))
        messages = [*_system(system), *turns(log[:-1]), log[-1]]
        if tools:
            events = act(source, model, messages, params, make_tools(tools), policy=policy)
        else:
            events = source.answer(model, messages, params)
        with contextlib.closing(events):
            for event in events:
                if isinstance(event, End):
                    cost = f"`{model}` {event}"
                log = shown(log, event)
                if not isinstance(event, Text) or time.monotonic() - drawn > FRAME_SECONDS:
                    yield log, cost, log
                    drawn = time.monotonic()
    except UserError as error:
        log = [*log, _step("error", str(error))]
    yield log, cost, log


def shown(log: Log, event: Row | Text | End) -> Log:
    """Returns the log with what an event adds to it.

    A tool's result joins its call: one line that opens to both.
    """
    if isinstance(event, End) or event == Text(""):
        return log
    if isinstance(event, Text):
        if log[-1]["role"] == "assistant" and "metadata" not in log[-1]:
            return [*log[:-1], {**log[-1], "content": log[-1]["content"] + event.text}]
        return [*log, {"role": "assistant", "content": event.text}]
    if event.kind == "call":
        return [*log, _step(event.name, _block(event.text, "json"), status="pending")]
    if event.name:  # the result of the call before it
        content = f"{log[-1]['content']}\n{event.kind}\n{_block(event.text)}"
        short = event.text if len(event.text) <= 60 else f"{event.text[:60]}…"
        done = {"log": f"{event.kind}: {short}", "duration": event.seconds}
        return [*log[:-1], _step(event.name, content, status="done", **done)]
    return [*log, _step(event.kind, event.text)]


def turns(log: Log) -> list[Message]:
    """What was said, in turn: no steps of agents, no question that got no answer."""
    said, asked = [], None
    for message in log:
        if message["role"] == "user":
            asked = message
        elif asked and "metadata" not in message:
            said += [asked, message]
            asked = None
    return said


def whole(text: str) -> int | None:
    """Reads a whole number; None where none was written.

    Raises:
      UserError: it is something else.
    """
    try:
        return int(text) if text.strip() else None
    except ValueError as error:
        raise UserError(f"{text!r} is no whole number: write one, or nothing.") from error


def pick(sources: list[Source], chosen: str | None) -> tuple[Source, str]:
    """Returns the source and the model that a menu's value names.

    Raises:
      UserError: it names none; a browser may send anything.
    """
    number, _, model = (chosen or "").partition(" ")
    if not (number.isdecimal() and int(number) < len(sources) and model):
        raise UserError("choose a model above; if there is none, no server answers: start one.")
    return sources[int(number)], model


def undone(log: Log) -> tuple[Log, str]:
    """Returns the log up to its last question, and that question; "" if there is none."""
    asked = [index for index, message in enumerate(log) if message["role"] == "user"]
    return (log[: asked[-1]], log[asked[-1]]["content"]) if asked else (log, "")


def _system(text: str) -> list[Message]:
    return [{"role": "system", "content": text.strip()}] if text.strip() else []


def _step(title: str, content: str, **more: str | float | None) -> Message:
    """A step of an agent: a line with a title that opens to its content."""
    metadata = {"title": title, **{key: value for key, value in more.items() if value is not None}}
    return {"role": "assistant", "content": content, "metadata": metadata}


def _block(text: str, language: str = "") -> str:
    """Text as a code block of Markdown that it cannot break out of."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
