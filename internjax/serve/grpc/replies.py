"""From the engine's news to named arrays: one reply for a whole answer, or one a piece of news."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from internjax.serve.grpc.asked import Asked
from internjax.serve.scheduler import Delta, IdLogprob, Request
from internjax.serve.thread import EngineThread, Ticket


class AnswerFailed(RuntimeError):
    """The engine failed while it answered; the message says why and names the request."""


class AnswerStopped(RuntimeError):
    """The server ended a request that it had begun: it is shutting down."""


@dataclass
class Row:
    """What is known of the answer to one prompt.

    Fields:
      index: of the prompt; count: tokens since the beginning, `ids` may hold only the newest.
    """

    index: int
    prompt_tokens: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[IdLogprob] = field(default_factory=list)
    finish_reason: str = ""
    count: int = 0

    def take(self, delta: Delta) -> None:
        """Adds news."""
        self.text += delta.text
        self.ids += delta.tokens
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or ""
        self.count += len(delta.tokens)

    def forget(self) -> None:
        """Drops what has been handed out."""
        self.text, self.ids, self.logprobs = "", [], []


@dataclass(frozen=True)
class Reply:
    """One response.

    Fields:
      arrays: by the names of `contract.OUTPUTS`; final: nothing follows.
    """

    arrays: dict[str, np.ndarray]
    final: bool


async def answer(
    engine: EngineThread, asked: Asked, ended: Callable[[Request], None]
) -> AsyncIterator[Reply]:
    """Runs what was asked; leaving the loop, or its task being cancelled, ends the requests.

    Args:
      ended: called once for every request that was begun.

    Raises:
      UserError, QueueFull, EngineClosed: nothing was begun.
      AnswerFailed, AnswerStopped: it broke off.
    """
    ticket = await _submit(engine, asked)
    rows = [Row(index, len(job.prompt)) for index, job in enumerate(asked.jobs)]
    running = len(rows)
    try:
        async for index, delta in engine.follow(ticket):
            _raise_broken(ticket.requests[index], delta)
            rows[index].take(delta)
            running -= delta.finish_reason is not None
            if asked.stream:
                yield Reply(arrays([rows[index]], asked.outputs), final=not running)
                rows[index].forget()
        if not asked.stream:
            yield Reply(arrays(rows, asked.outputs), final=True)
    finally:
        engine.cancel(ticket)
        for request in ticket.requests:
            ended(request)


def arrays(rows: Sequence[Row], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the asked tensors of some rows, R of them, see `contract.OUTPUTS`."""
    make = {
        "text_output": lambda: _texts([row.text for row in rows]),
        "output_ids": lambda: _padded([row.ids for row in rows]),
        "finish_reason": lambda: _texts([row.finish_reason for row in rows]),
        "num_input_tokens": lambda: np.array([row.prompt_tokens for row in rows], np.uint32),
        "num_output_tokens": lambda: np.array([row.count for row in rows], np.uint32),
        "row": lambda: np.array([row.index for row in rows], np.int32),
        "logprobs": lambda: _texts([json.dumps([_entry(x) for x in r.logprobs]) for r in rows]),
    }
    return {name: make[name]() for name in names}


async def _submit(engine: EngineThread, asked: Asked) -> Ticket:
    """Submits all or none; a grammar is compiled off the event loop, for that may take long."""
    loop = asyncio.get_running_loop()
    if not any(job.params.grammar for job in asked.jobs):
        return engine.submit_all(asked.jobs, loop)
    submitting = asyncio.ensure_future(asyncio.to_thread(engine.submit_all, asked.jobs, loop))
    try:
        return await asyncio.shield(submitting)
    except asyncio.CancelledError:  # a thread cannot be stopped: what it begins is ended after it
        submitting.add_done_callback(lambda x: x.exception() or engine.cancel(x.result()))
        raise


def _raise_broken(request: Request, delta: Delta) -> None:
    if delta.finish_reason == "error":
        raise AnswerFailed(f"{delta.error} (request {request.id})")
    if delta.finish_reason == "cancelled":
        raise AnswerStopped("the server is shutting down.")


def _texts(texts: Sequence[str]) -> np.ndarray:
    return np.array([text.encode() for text in texts], np.object_)


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out


def _entry(entry: IdLogprob) -> dict:
    """JSON has no infinity: a forbidden token is written as OpenAI's API does."""
    finite = lambda x: max(x, -9999.0)  # noqa: E731
    top = [[i, finite(x)] for i, x in entry.top]
    return {"id": entry.id, "logprob": finite(entry.logprob), "top": top}
