"""`/v1/chat/completions`: conversations, with tools, streamed or whole."""

from collections.abc import AsyncIterator

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from internjax.errors import UserError
from internjax.serve.answers import Answer, chat_choice, chat_logprobs, usage
from internjax.serve.http.requests import collect, head_of, submit
from internjax.serve.http.service import Service, check_model
from internjax.serve.http.streaming import stream
from internjax.serve.schema import ChatBody
from internjax.serve.thread import Job, Ticket
from internjax.serve.tools import plan_tools, prompt_ids


async def chat(service: Service, body: ChatBody, http: Request) -> Response:
    check_model(service, body.model)
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
    ticket = await submit(service, jobs)
    answers = [Answer(service.tokenizer, plan) for _ in jobs]
    head = head_of(service, "chatcmpl", "chat.completion")
    if body.stream:
        return stream(_chat_chunks(service, body, ticket, answers, head, len(ids)))
    await collect(service, ticket, answers, http)
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
