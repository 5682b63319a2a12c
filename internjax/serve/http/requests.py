"""From a body to the engine and back: submit, gather, leave when the client has left."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request

from internjax.models.lm import SamplingParams
from internjax.serve.answers import Answer, AnswerCancelled, AnswerFailed
from internjax.serve.http.call import Call, call_of
from internjax.serve.http.errors import ApiError
from internjax.serve.http.service import Served, Service
from internjax.serve.scheduler import Delta, QueueFull, Request as EngineRequest
from internjax.serve.thread import EngineClosed, Job, Ticket


def head_of(name: str, prefix: str, kind: str) -> dict[str, Any]:
    """The fields that begin every answer."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": name,
    }


def make_job(
    served: Served, ids: Sequence[int], params: SamplingParams, *, continues: bool = False
) -> Job:
    """What the engine runs for a served name."""
    return Job(ids, params, continues, served.adapter)


async def submit(service: Service, call: Call, jobs: list[Job], prompt_tokens: int) -> Ticket:
    """Submits all or none; a grammar is compiled off the event loop, for that may take long.

    Args:
      prompt_tokens: as the client will be told; choices of one prompt share it.
    """
    loop = asyncio.get_running_loop()
    try:
        if any(job.params.grammar for job in jobs):
            ticket = await asyncio.to_thread(service.engine.submit_all, jobs, loop)
        else:
            ticket = service.engine.submit_all(jobs, loop)
    except QueueFull as error:
        raise ApiError(429, f"{error} Try again in a moment.", code="queue_full") from error
    except EngineClosed as error:
        raise ApiError(503, str(error), code=error.status) from error
    call.prompt_tokens = prompt_tokens
    if service.log_text and jobs:
        call.prompt = service.tokenizer.decode(jobs[0].prompt)
    return ticket


def reserve(service: Service, call: Call, prompt_tokens: int, jobs: Sequence[Job] = ()) -> None:
    """Takes what a request may cost of the caller's allowance; the guard gives back the rest.

    Raises:
      ApiError: more than one request may ask for, or than the caller has left.
    """
    config = service.engine.engine.config
    most = config.slots + config.max_waiting
    if len(jobs) > most:
        raise ApiError(400, f"the request asks for {len(jobs)} answers; at most {most} fit here.")
    tokens = prompt_tokens + sum(job.params.max_tokens for job in jobs)
    if service.max_request_tokens and tokens > service.max_request_tokens:
        raise ApiError(
            400,
            f"the request may take {tokens} tokens, prompts and answers together; at most "
            f"{service.max_request_tokens} are allowed.",
            code="tokens_limit",
        )
    service.limits.take(call.caller, "tokens", tokens)
    call.reserved = tokens


async def follow(service: Service, call: Call, ticket: Ticket) -> AsyncIterator[tuple[int, Delta]]:
    """Yields (choice, news) until all choices have ended, and books what they cost."""
    async for index, delta in service.engine.follow(ticket):
        call.completion_tokens += len(delta.tokens)
        if service.log_text and not index:
            call.answer += delta.text
        if delta.finish_reason:
            call.finish_reasons.append(delta.finish_reason)
            call.cached_tokens = max(call.cached_tokens, _cached(ticket.requests[index]))
        yield index, delta


async def collect(service: Service, ticket: Ticket, answers: list[Answer], http: Request) -> None:
    """Gathers whole answers.

    Raises:
      ApiError: the engine did not finish one, or the client has left.
    """
    try:
        await gather(service, ticket, answers, http)
    except AnswerFailed as error:
        raise failure(error) from error


async def gather(service: Service, ticket: Ticket, answers: list[Answer], http: Request) -> None:
    """Gathers whole answers; a client that has gone away ends its requests.

    Raises:
      AnswerFailed: the engine did not finish one. ApiError: the client has left.
    """

    async def take_all() -> None:
        async for index, delta in follow(service, call_of(http), ticket):
            answers[index].take(delta)

    taking, leaving = asyncio.create_task(take_all()), asyncio.create_task(_left(http))
    try:
        await asyncio.wait((taking, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not taking.done():
            raise ApiError(499, "the client has gone away.", code="client_left")
        taking.result()
    finally:
        taking.cancel()
        leaving.cancel()
        service.engine.cancel(ticket)


def failure(error: AnswerFailed) -> ApiError:
    """What the client is told of an answer that the engine did not finish."""
    if isinstance(error, AnswerCancelled):
        return ApiError(503, "the server is shutting down.", code="closing")
    return ApiError(500, f"{error}.", code="engine")


async def beside(service: Service, work: Callable, *args) -> Any:
    """Computes something beside the engine's steps (scores, embeddings), off the event loop.

    One at a time: it takes the processor from those who decode.

    Raises:
      ApiError: 429 when as many wait for it as may wait for the engine.
    """
    if service.aside.waiting >= service.engine.engine.config.max_waiting:
        raise ApiError(429, "too many scores are waiting already.", code="queue_full")
    service.aside.waiting += 1
    try:
        async with service.aside.turn:
            return await asyncio.to_thread(work, *args)
    finally:
        service.aside.waiting -= 1


def _cached(request: EngineRequest) -> int:
    """Positions of the prompt found in the cache; after a preemption they were its own."""
    return 0 if request.preempted else request.reused


async def _left(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
