"""Answers sent piece by piece: server-sent events, or a line of JSON each."""

from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse

from internjax.serve.answers import AnswerFailed
from internjax.serve.http.call import Call
from internjax.serve.http.errors import ApiError
from internjax.serve.http.json_line import one_line
from internjax.serve.http.requests import failure
from internjax.serve.http.service import Service
from internjax.serve.thread import Ticket


class Pieces(StreamingResponse):
    """Ends the requests of a stream however it ends, also when its client left before it began."""

    def __init__(self, lines: AsyncIterator[str], closed: Callable[[], None]):
        super().__init__(lines, media_type="text/event-stream")
        self.headers["cache-control"] = "no-store"
        self._closed = closed

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._closed()


def stream(
    service: Service,
    call: Call,
    ticket: Ticket,
    chunks: AsyncIterator[dict],
    *,
    written: Callable[[dict[str, Any]], str] | None = None,
    end: str = "data: [DONE]\n\n",
    closed: Callable[[], None] = lambda: None,
) -> Pieces:
    """Streams chunks as server-sent events.

    Args:
      written: how one chunk is written; the default is a `data:` event.
      end: what follows the last chunk.
      closed: called once when the stream has ended in whatever way.
    """
    written = written or event

    async def lines() -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield written(chunk)
        except (AnswerFailed, ApiError) as error:
            failed = failure(error) if isinstance(error, AnswerFailed) else error
            call.error = failed.code
            yield written({"error": failed.body(call)})
        if end:
            yield end

    def ended() -> None:
        service.engine.cancel(ticket)
        closed()

    return Pieces(lines(), ended)


def event(chunk: dict[str, Any]) -> str:
    """One chunk as OpenAI's chat stream has it."""
    return f"data: {one_line(chunk)}\n\n"


def named_event(chunk: dict[str, Any]) -> str:
    """One chunk as the stream of `/v1/responses` has it: its type is its name."""
    return f"event: {chunk.get('type', 'error')}\n{event(chunk)}"


def line(chunk: dict[str, Any]) -> str:
    """One chunk as a line of JSON."""
    return one_line(chunk) + "\n"
