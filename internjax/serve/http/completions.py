"""`/v1/completions`: raw text and token ids go on; what evaluation harnesses score with."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from internjax.errors import UserError
from internjax.serve.answers import Answer, completion_logprobs, usage
from internjax.serve.http.requests import collect, head_of, submit
from internjax.serve.http.service import Service, check_model, encode
from internjax.serve.http.streaming import stream
from internjax.serve.schema import CompletionBody
from internjax.serve.score import prompt_logprobs
from internjax.serve.thread import Job, Ticket


async def completions(service: Service, body: CompletionBody, http: Request) -> Response:
    check_model(service, body.model)
    n = body.n or 1
    if body.suffix:
        raise UserError("suffix: this model does not fill gaps.")
    if body.best_of not in (None, n):
        raise UserError(f"best_of={body.best_of}: only best_of = n (here {n}) is served.")
    given = body.prompts()
    prompts = [encode(service, p) if isinstance(p, str) else list(p) for p in given]
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise UserError("max_tokens=0 asks for nothing: set echo=true, or at least 1.")
    _check_scored(service, prompts)
    params = [
        body.sampling(max(max_tokens, 1), logprobs=body.logprobs, grammar=body.grammar, index=i)
        for i in range(n)
    ]
    jobs = [Job(ids, p, continues=True) for ids in prompts for p in params] if max_tokens else []
    ticket = await submit(service, jobs)
    echoes = [await _echo(service, body, ids) for ids in prompts for _ in range(n)]
    answers = [Answer(service.tokenizer) for _ in echoes]
    head = head_of(service, "cmpl", "text_completion")
    counted = sum(map(len, prompts))
    if body.stream:
        return stream(_completion_chunks(service, body, ticket, answers, echoes, head, counted))
    await collect(service, ticket, answers, http)
    choices = [
        _completion_choice(service, body, i, answer, echo)
        for i, (answer, echo) in enumerate(zip(answers, echoes, strict=True))
    ]
    spent = usage(counted, sum(len(a.tokens) for a in answers))
    return JSONResponse({**head, "choices": choices, "usage": spent})


@dataclass(frozen=True)
class _Echo:
    """A prompt as it is repeated before its answer; empty without `echo`."""

    text: str = ""
    ids: tuple[int, ...] = ()
    entries: tuple = ()


def _check_scored(service: Service, prompts: list[list[int]]) -> None:
    """Checks what is only echoed as strictly as what is continued."""
    for ids in prompts:
        service.engine.engine.check_prompt(ids)


async def _echo(service: Service, body: CompletionBody, ids: list[int]) -> _Echo:
    if not body.echo:
        return _Echo()
    text = service.tokenizer.decode(ids)
    if body.logprobs is None:
        return _Echo(text, tuple(ids))
    engine = service.engine.engine
    score = asyncio.to_thread(prompt_logprobs, engine.params, engine.cfg, ids, body.logprobs)
    return _Echo(text, tuple(ids), tuple(await score))


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
    body: CompletionBody,
    ticket: Ticket,
    answers: list[Answer],
    echoes: list[_Echo],
    head: dict,
    prompt_tokens: int,
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
    async for index, delta in service.engine.follow(ticket):
        answer, before = answers[index], len(answers[index].logprobs)
        offset = len(echoes[index].text) + len(answer.text)
        answer.take(delta)
        new = answer.logprobs[before:]
        if delta.text or new or delta.finish_reason:
            ids = [entry.id for entry in new]
            yield chunk(index, delta.text, delta.finish_reason, new, ids, offset)
    if body.wants_usage:
        spent = usage(prompt_tokens, sum(len(a.tokens) for a in answers))
        yield {**head, "choices": [], "usage": spent}
