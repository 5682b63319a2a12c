"""`/v1/completions`: raw text and token ids go on; what evaluation harnesses score with."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from internjax.errors import UserError
from internjax.serve.answers import Answer, best, completion_logprobs, usage
from internjax.serve.http.call import Call, call_of
from internjax.serve.http.requests import (
    beside,
    collect,
    follow,
    head_of,
    make_job,
    reserve,
    submit,
)
from internjax.serve.http.service import Served, Service
from internjax.serve.http.streaming import stream
from internjax.serve.schema import CompletionBody
from internjax.serve.score import prompt_logprobs
from internjax.serve.thread import Job, Ticket


async def completions(service: Service, body: CompletionBody, http: Request) -> Response:
    """Continues prompts, scores them, or both."""
    served, call = service.models.find(body.model), call_of(http)
    call.model = served.name
    prompts, jobs = await asyncio.to_thread(_prepare, service, served, body)
    counted = sum(map(len, prompts))
    reserve(service, call, counted, jobs)
    scores = [await _echo(service, served, body, ids) for ids in prompts]
    echoes = [echo for echo in scores for _ in range(body.several)]
    ticket = await submit(service, call, jobs, counted)
    answers = [Answer(service.tokenizer, keeps_end=True) for _ in echoes]
    head = head_of(served.name, "cmpl", "text_completion")
    if body.stream:
        chunks = _completion_chunks(service, call, body, ticket, answers, echoes, head)
        return stream(service, call, ticket, chunks)
    await collect(service, ticket, answers, http)
    groups = range(0, len(answers), body.several)
    kept = [at + i for at in groups for i in best(answers[at : at + body.several], body.n or 1)]
    choices = [
        _completion_choice(service, body, i, answers[at], echoes[at]) for i, at in enumerate(kept)
    ]
    spent = usage(counted, call.completion_tokens, call.cached_tokens)
    return JSONResponse({**head, "choices": choices, "usage": spent})


def _prepare(
    service: Service, served: Served, body: CompletionBody
) -> tuple[list[list[int]], list[Job]]:
    """Returns the prompts' ids and what of them the engine continues.

    Raises:
      UserError: it cannot be obeyed.
    """
    if body.suffix:
        raise UserError("suffix: this model does not fill gaps.")
    prompts = [service.encode(p) if isinstance(p, str) else list(p) for p in body.prompts()]
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise UserError("max_tokens=0 asks for nothing: set echo=true, or at least 1.")
    for ids in prompts:  # what is only echoed is checked as strictly as what is continued
        service.engine.engine.check_prompt(ids)
    # Choosing among answers needs log-probabilities, though the client asked for none.
    chooses = body.several > (body.n or 1) and body.logprobs is None
    options = {"logprobs": 0 if chooses else body.logprobs, "grammar": body.grammar}
    params = [body.sampling(max(max_tokens, 1), index=i, **options) for i in range(body.several)]
    if not max_tokens:
        return prompts, []
    return prompts, [make_job(served, ids, p, continues=True) for ids in prompts for p in params]


@dataclass(frozen=True)
class _Echo:
    """A prompt as it is repeated before its answer; empty without `echo`."""

    text: str = ""
    ids: tuple[int, ...] = ()
    entries: tuple = ()


async def _echo(service: Service, served: Served, body: CompletionBody, ids: list[int]) -> _Echo:
    if not body.echo:
        return _Echo()
    text = service.tokenizer.decode(ids)
    if body.logprobs is None:
        return _Echo(text, tuple(ids))
    engine = service.engine.engine
    params = engine.adapters.params_of(served.adapter)
    work = (prompt_logprobs, params, engine.cfg, ids, body.logprobs)
    return _Echo(text, tuple(ids), tuple(await beside(service, *work)))


def _completion_choice(
    service: Service, body: CompletionBody, index: int, answer: Answer, echo: _Echo
) -> dict[str, Any]:
    entries = None
    if body.logprobs is not None:
        ids = [*echo.ids, *(e.id for e in answer.logprobs)]
        entries = completion_logprobs(service.tokenizer, [*echo.entries, *answer.logprobs], ids)
    reason = answer.finish_reason or "length"
    text = echo.text + answer.text
    return {"index": index, "text": text, "logprobs": entries, "finish_reason": reason}


async def _completion_chunks(
    service: Service,
    call: Call,
    body: CompletionBody,
    ticket: Ticket,
    answers: list[Answer],
    echoes: list[_Echo],
    head: dict,
) -> AsyncIterator[dict]:
    def chunk(index: int, text: str, reason: str | None, entries: list, ids: list[int], offset=0):
        logprobs = None
        if body.logprobs is not None:
            logprobs = completion_logprobs(service.tokenizer, entries, ids, offset)
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice]}

    for index, echo in enumerate(echoes):
        if body.echo:
            reason = None if ticket.requests else "length"
            yield chunk(index, echo.text, reason, list(echo.entries), list(echo.ids))
    async for index, delta in follow(service, call, ticket):
        answer, before = answers[index], len(answers[index].logprobs)
        offset = len(echoes[index].text) + len(answer.text)
        answer.take(delta)
        new = answer.logprobs[before:]
        if delta.text or new or delta.finish_reason:
            ids = [entry.id for entry in new]
            yield chunk(index, delta.text, delta.finish_reason, new, ids, offset)
    if body.wants_usage:
        spent = usage(call.prompt_tokens, call.completion_tokens, call.cached_tokens)
        yield {**head, "choices": [], "usage": spent}
