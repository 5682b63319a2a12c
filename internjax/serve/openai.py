"""The OpenAI-compatible HTTP interface over an engine.

Routes only: bodies are read in `schema`, answers written in `answers`, tools planned in `tools`.
A request that cannot be obeyed is refused with the reason; nothing is accepted and ignored.
"""

import asyncio
import hashlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from internjax.data.chat import encode_prompt
from internjax.data.templates import ChatTemplate
from internjax.data.tokenizer import Tokenizer
from internjax.errors import UserError
from internjax.serve.answers import (
    Answer,
    AnswerFailed,
    chat_choice,
    chat_logprobs,
    completion_logprobs,
    usage,
)
from internjax.serve.scheduler import QueueFull
from internjax.serve.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from internjax.serve.score import prompt_logprobs
from internjax.serve.thread import EngineClosed, EngineThread, Job, Ticket
from internjax.serve.tools import plan_tools, prompt_ids

RETRY_SECONDS = 1


@dataclass(frozen=True)
class Service:
    """What the routes need.

    Fields:
      name: the one model that is served; created: when, in seconds since 1970.
      api_key: asked of every client when not empty; max_body_bytes: of one request.
      default_max_tokens: length of a chat answer when the request names none.
    """

    name: str
    engine: EngineThread
    tokenizer: Tokenizer
    template: ChatTemplate
    api_key: str = ""
    max_body_bytes: int = 4 << 20
    default_max_tokens: int = 512
    created: int = 0


class ApiError(Exception):
    """An error in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param=None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else None
        return JSONResponse({"error": self.body()}, self.status, headers)

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, default)
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}


def make_app(service: Service) -> FastAPI:
    """Builds the ASGI application."""
    app = FastAPI(title="InternJAX", docs_url=None, redoc_url=None)
    _add_errors(app)
    app.add_middleware(_Guard, service=service)
    _add_info(app, service)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: Request) -> Response:
        return await _chat(service, body, http)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, http: Request) -> Response:
        return await _completions(service, body, http)

    return app


def _add_info(app: FastAPI, service: Service) -> None:
    engine = service.engine.engine
    card = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "internjax",
        "max_model_len": engine.context,
    }

    @app.get("/health")
    async def health() -> Response:
        closing = service.engine.closing
        return JSONResponse({"status": "closing" if closing else "ok"}, 503 if closing else 200)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        _check_model(service, name)
        return JSONResponse(card)

    @app.get("/metrics")
    async def metrics() -> Response:
        lines = [f"internjax_{k} {v}" for k, v in asdict(engine.stats).items()]
        lines.append(f"internjax_in_flight {engine.in_flight()}")
        return PlainTextResponse("\n".join(lines) + "\n")

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        if (body.prompt is None) == (body.messages is None):
            raise UserError("give prompt or messages, one of the two.")
        if body.messages is not None:
            ids = encode_prompt(service.tokenizer, service.template, body.messages)
        else:
            ids = _encode(service, body.prompt, body.add_special_tokens)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": engine.context})

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        return JSONResponse({"prompt": service.tokenizer.decode(body.tokens)})


def _encode(service: Service, prompt: str, add_bos: bool = True) -> list[int]:
    return service.tokenizer.encode(prompt, bos=add_bos and service.tokenizer.adds_bos)


def _check_model(service: Service, name: str) -> None:
    if name != service.name:
        raise ApiError(
            404,
            f"the model {name!r} is not served here; the one that is: {service.name!r}.",
            code="model_not_found",
            param="model",
        )


# Chat ---------------------------------------------------------------------------------------


async def _chat(service: Service, body: ChatBody, http: Request) -> Response:
    _check_model(service, body.model)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    plan = plan_tools(tools, body.tool_choice, service.template.tool_style)
    asked = body.asked_grammar()
    if asked and plan.grammar:
        raise UserError("the answer cannot be held to a tool call and to another format at once.")
    ids = prompt_ids(service.tokenizer, service.template, body.messages, plan.tools)
    max_tokens = body.max_completion_tokens or body.max_tokens
    if max_tokens is None:
        room = service.engine.engine.context - len(ids)
        max_tokens = max(1, min(service.default_max_tokens, room))
    if body.top_logprobs is not None and not body.logprobs:
        raise UserError("top_logprobs needs logprobs=true.")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    options = {"logprobs": logprobs, "grammar": plan.grammar or asked}
    n = body.n or 1
    jobs = [Job(ids, body.sampling(max_tokens, index=i, **options)) for i in range(n)]
    ticket = await _submit(service, jobs)
    answers = [Answer(service.tokenizer, plan) for _ in jobs]
    head = _head(service, "chatcmpl", "chat.completion")
    if body.stream:
        return _stream(_chat_chunks(service, body, ticket, answers, head, len(ids)))
    await _collect(service, ticket, answers, http)
    choices = [chat_choice(i, a, logprobs=logprobs is not None) for i, a in enumerate(answers)]
    spent = usage(len(ids), sum(len(a.tokens) for a in answers))
    return JSONResponse({**head, "choices": choices, "usage": spent})


async def _chat_chunks(
    service: Service,
    body: ChatBody,
    ticket: Ticket,
    answers: list[Answer],
    head: dict,
    prompt_tokens: int,
) -> AsyncIterator[dict]:
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(index: int, delta: dict, reason: str | None = None, logprobs: dict | None = None):
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice]}

    for index in range(len(answers)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, delta in service.engine.follow(ticket):
        answer, before = answers[index], len(answers[index].logprobs)
        answer.take(delta)
        new = answer.logprobs[before:]
        entries = chat_logprobs(service.tokenizer, new) if new else None
        text = answer.newly_certain()
        if not answer.finish_reason:
            if text or entries:
                yield chunk(index, {"content": text}, logprobs=entries)
            continue
        words, calls, reason = answer.result()
        if not calls:
            text += words[answer.sent :]
        if text or entries:
            yield chunk(index, {"content": text}, logprobs=entries)
        if calls:
            numbered = [{"index": i, **call} for i, call in enumerate(calls)]
            yield chunk(index, {"tool_calls": numbered})
        yield chunk(index, {}, reason)
    if body.wants_usage:
        spent = usage(prompt_tokens, sum(len(a.tokens) for a in answers))
        yield {**head, "choices": [], "usage": spent}


# Plain completions --------------------------------------------------------------------------


async def _completions(service: Service, body: CompletionBody, http: Request) -> Response:
    _check_model(service, body.model)
    n = body.n or 1
    if body.suffix:
        raise UserError("suffix: this model does not fill gaps.")
    if body.best_of not in (None, n):
        raise UserError(f"best_of={body.best_of}: only best_of = n (here {n}) is served.")
    given = body.prompts()
    prompts = [_encode(service, p) if isinstance(p, str) else list(p) for p in given]
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise UserError("max_tokens=0 asks for nothing: set echo=true, or at least 1.")
    _check_scored(service, prompts)
    params = [
        body.sampling(max(max_tokens, 1), logprobs=body.logprobs, grammar=body.grammar, index=i)
        for i in range(n)
    ]
    jobs = [Job(ids, p, continues=True) for ids in prompts for p in params] if max_tokens else []
    ticket = await _submit(service, jobs)
    echoes = [await _echo(service, body, ids) for ids in prompts for _ in range(n)]
    answers = [Answer(service.tokenizer) for _ in echoes]
    head = _head(service, "cmpl", "text_completion")
    counted = sum(map(len, prompts))
    if body.stream:
        return _stream(_completion_chunks(service, body, ticket, answers, echoes, head, counted))
    await _collect(service, ticket, answers, http)
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


# Shared -------------------------------------------------------------------------------------


def _head(service: Service, prefix: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.name,
    }


async def _submit(service: Service, jobs: list[Job]) -> Ticket:
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


async def _collect(service: Service, ticket: Ticket, answers: list[Answer], http: Request) -> None:
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


def _stream(chunks: AsyncIterator[dict]) -> StreamingResponse:
    async def events() -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        except AnswerFailed as error:
            body = ApiError(500, str(error), code="engine").body()
            yield f"data: {json.dumps({'error': body})}\n\n"
        finally:
            await chunks.aclose()
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(http: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(UserError)
    async def user_error(http: Request, error: UserError) -> Response:
        return ApiError(400, str(error)).response()

    @app.exception_handler(Exception)
    async def unexpected(http: Request, error: Exception) -> Response:
        return ApiError(500, f"internal error: {type(error).__name__}").response()

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        message = f"{place}: {first['msg']}" if place else first["msg"]
        return ApiError(400, message, param=place or None).response()

    @app.exception_handler(HTTPException)
    async def http_error(http: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, f"{http.url.path}: {error.detail}").response()


class _Guard:
    """Refuses what has no key or is too large, before it is read."""

    def __init__(self, app, service: Service):
        self.app, self.limit = app, service.max_body_bytes
        self.key = _digest(service.api_key) if service.api_key else None

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self.key and scope["path"] != "/health" and not self._knows(headers):
            error = ApiError(401, "give the API key as `Authorization: Bearer KEY`.")
            await error.response()(scope, receive, send)
            return
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limit:
            await self._too_large()(scope, receive, send)
            return
        await self._limited(scope, receive, send)

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ").decode("latin-1")
        return hmac.compare_digest(_digest(given), self.key)

    def _too_large(self) -> JSONResponse:
        return ApiError(413, f"the body is larger than {self.limit} bytes.").response()

    async def _limited(self, scope, receive, send) -> None:
        """Counts a body that did not declare its length."""
        taken, started = 0, False

        async def counted():
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.limit:
                raise _TooLarge
            return message

        async def watched(message):
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, counted, watched)
        except _TooLarge:
            assert not started, "bodies are read before answers begin"
            await self._too_large()(scope, receive, send)


class _TooLarge(Exception):
    """A body without a declared length has passed the limit."""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
