"""LMDeploy's own calls: `/generate`, and `/v1/chat/interactive` whose history the server keeps."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from internjax.data.chat import encode_prompt
from internjax.errors import UserError
from internjax.serve.answers import Answer, AnswerCancelled, AnswerFailed
from internjax.serve.http.call import Call, call_of
from internjax.serve.http.errors import ApiError
from internjax.serve.http.memory import Talk
from internjax.serve.http.requests import (
    collect,
    failure,
    follow,
    gather,
    make_job,
    reserve,
    submit,
)
from internjax.serve.http.service import Service
from internjax.serve.http.streaming import line, stream
from internjax.serve.lmdeploy_schema import GenerateBody, InteractiveBody
from internjax.serve.thread import Ticket


async def generate(service: Service, body: GenerateBody, http: Request) -> Response:
    """Continues a raw prompt or ids."""
    served, call = service.models.find(service.models.base), call_of(http)
    call.model = served.name
    if (body.prompt is None) == (body.input_ids is None):
        raise UserError("give prompt or input_ids, one of the two.")
    if body.prompt is not None:
        ids = await asyncio.to_thread(service.encode, body.prompt)
    else:
        ids = body.input_ids
    jobs = [make_job(served, ids, body.sampling(), continues=True)]
    reserve(service, call, len(ids), jobs)
    ticket = await submit(service, call, jobs, len(ids))
    answer = Answer(service.tokenizer)
    if body.stream:
        return stream(service, call, ticket, _generated(service, call, body, ticket, answer))
    await collect(service, ticket, [answer], http)
    return JSONResponse(_output(body, call, answer, answer.text, 0))


async def _generated(
    service: Service, call: Call, body: GenerateBody, ticket: Ticket, answer: Answer
) -> AsyncIterator[dict]:
    async for _, delta in follow(service, call, ticket):
        before = len(answer.tokens)
        answer.take(delta)
        yield _output(body, call, answer, delta.text, before)


def _output(
    body: GenerateBody, call: Call, answer: Answer, text: str, since: int
) -> dict[str, Any]:
    """What has come since a number of tokens."""
    reason = answer.finish_reason
    meta = {
        "prompt_tokens": call.prompt_tokens,
        "completion_tokens": len(answer.tokens),
        "finish_reason": {"type": reason} if reason else None,
    }
    if body.return_logprob:
        new = answer.logprobs[since:]
        meta["output_token_logprobs"] = [[max(e.logprob, -9999.0), e.id] for e in new]
    return {"text": text, "output_ids": answer.tokens[since:], "meta_info": meta}


async def interactive(service: Service, body: InteractiveBody, http: Request) -> Response:
    """Answers the next turn of a session.

    With `interactive_mode` the session goes on; without it this turn is its last one, and with
    `request_output_len` 0 there is not even an answer.
    """
    call = call_of(http)
    name = "" if body.session_id == -1 else str(body.session_id)
    if not name and (body.cancel or body.interactive_mode):
        raise UserError("give a session_id other than -1: there is no session without one.")
    talk = service.sessions.find(call.caller, name) or Talk()
    if body.cancel:
        return _cancel(service, talk)
    if talk.ticket is not None:
        raise ApiError(
            409,
            f"session {name} is writing an answer: wait for its end, or cancel it.",
            code="session_busy",
        )
    if body.request_output_len == 0:
        service.sessions.drop(call.caller, name)
        return JSONResponse(_turn("", 0, 0, talk.tokens, "length"))
    return await _answer(service, body, http, name, talk)


async def _answer(
    service: Service, body: InteractiveBody, http: Request, name: str, talk: Talk
) -> Response:
    served, call = service.models.find(body.adapter_name or service.models.base), call_of(http)
    call.model = served.name
    messages = [*talk.messages, *body.messages()]
    ids = encode_prompt(service.tokenizer, service.template, messages)
    room = service.engine.engine.context - len(ids)
    most = body.request_output_len or max(1, min(service.default_max_tokens, room))
    jobs = [make_job(served, ids, body.sampling(most))]
    reserve(service, call, len(ids), jobs)
    ticket = talk.ticket = await submit(service, call, jobs, len(ids))
    if name:
        service.sessions.keep(call.caller, name, talk)
    answer = Answer(service.tokenizer)
    before, new = talk.tokens, max(0, len(ids) - talk.tokens)

    def close() -> None:
        if talk.ticket is not ticket:  # it was closed before its last line was sent
            return
        talk.ticket = None
        if answer.finish_reason:  # else it failed or its client left: the turn may be asked again
            talk.messages = [*messages, {"role": "assistant", "content": answer.text}]
            talk.tokens = len(ids) + len(answer.tokens)
        if not body.interactive_mode:
            service.sessions.drop(call.caller, name)

    def turn(text: str) -> dict[str, Any]:
        if answer.finish_reason:  # who has read the last line may ask on at once
            close()
        return _turn(text, len(answer.tokens), new, before, answer.finish_reason)

    if body.stream:
        pieces = _pieces(service, call, ticket, answer, turn)
        return stream(service, call, ticket, pieces, written=line, end="", closed=close)
    try:
        await gather(service, ticket, [answer], http)
    except AnswerFailed as error:
        _accept_cancelled(service, answer, error)
    finally:
        close()
    return JSONResponse(turn(answer.text))


async def _pieces(
    service: Service, call: Call, ticket: Ticket, answer: Answer, turn: Callable[[str], dict]
) -> AsyncIterator[dict]:
    try:
        async for _, delta in follow(service, call, ticket):
            answer.take(delta)
            yield turn(delta.text)
    except AnswerCancelled as error:
        _accept_cancelled(service, answer, error)
        yield turn("")


def _accept_cancelled(service: Service, answer: Answer, error: AnswerFailed) -> None:
    """An answer that its client has cancelled is an answer; one that failed is not."""
    if service.engine.status == "closing" or not isinstance(error, AnswerCancelled):
        raise failure(error) from error
    answer.finish_reason = "abort"


def _cancel(service: Service, talk: Talk) -> Response:
    if talk.ticket is not None:
        service.engine.cancel(talk.ticket)
    return JSONResponse(_turn("", 0, 0, talk.tokens, None))


def _turn(text: str, tokens: int, new: int, before: int, reason: str | None) -> dict[str, Any]:
    return {
        "text": text,
        "tokens": tokens,
        "input_tokens": new,
        "history_tokens": before,
        "finish_reason": reason,
    }
