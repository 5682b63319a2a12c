"""From a body to the engine and back: submit, gather, leave when the client has left."""

import asyncio
import time
import uuid
from typing import Any

from fastapi import Request

from internjax.serve.answers import Answer, AnswerFailed
from internjax.serve.http.errors import ApiError
from internjax.serve.http.service import Service
from internjax.serve.scheduler import QueueFull
from internjax.serve.thread import EngineClosed, Job, Ticket


def head_of(service: Service, prefix: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.name,
    }


async def submit(service: Service, jobs: list[Job]) -> Ticket:
    """Submits all or none; a grammar is compiled off the event loop, for that may take long."""
    loop = asyncio.get_running_loop()
    try:
        if any(job.params.grammar for job in jobs):
            return await asyncio.to_thread(service.engine.submit_all, jobs, loop)
        return service.engine.submit_all(jobs, loop)
    except QueueFull as error:
        raise ApiError(429, f"{error} Try again in a moment.", code="queue_full") from error
    except EngineClosed as error:
        raise ApiError(503, "the server is shutting down.", code="closing") from error


async def collect(service: Service, ticket: Ticket, answers: list[Answer], http: Request) -> None:
    """Gathers whole answers; a client that has gone away ends its requests."""

    async def gather() -> None:
        async for index, delta in service.engine.follow(ticket):
            answers[index].take(delta)

    gathering, leaving = asyncio.create_task(gather()), asyncio.create_task(_left(http))
    try:
        await asyncio.wait((gathering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not gathering.done():
            raise ApiError(499, "the client has gone away.")
        gathering.result()
    except AnswerFailed as error:
        raise ApiError(500, f"{error} (request {_names(ticket)})", code="engine") from error
    finally:
        gathering.cancel()
        leaving.cancel()
        service.engine.cancel(ticket)


def _names(ticket: Ticket) -> str:
    return ", ".join(str(request.id) for request in ticket.requests)


async def _left(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
