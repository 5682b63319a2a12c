"""`/v1/chat/completions`: conversations, with tools, streamed or whole."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from internjax.errors import UserError
from internjax.serve.answers import Answer, chat_choice, chat_logprobs, usage
from internjax.serve.http.call import Call, call_of
from internjax.serve.http.requests import collect, follow, head_of, make_job, reserve, submit
from internjax.serve.http.service import Served, Service
from internjax.serve.http.streaming import stream
from internjax.serve.schema import ChatBody
from internjax.serve.thread import Job, Ticket
from internjax.serve.tools import ToolPlan, plan_tools, prompt_ids


@dataclass(frozen=True)
class Turn:
    """A conversation's next answers, ready for the engine.

    Fields:
      ids: the prompt, the same for all; logprobs: see `SamplingParams`.
    """

    ids: list[int]
    jobs: list[Job]
    plan: ToolPlan
    logprobs: int | None

    def answers(self, service: Service) -> list[Answer]:
        """Empty answers, one a job."""
        return [Answer(service.tokenizer, self.plan) for _ in self.jobs]


async def chat(service: Service, body: ChatBody, http: Request) -> Response:
    """Answers a conversation."""
    served, call = service.models.find(body.model), call_of(http)
    call.model = served.name
    turn = await asyncio.to_thread(prepare, service, served, body)
    reserve(service, call, len(turn.ids), turn.jobs)
    ticket = await submit(service, call, turn.jobs, len(turn.ids))
    answers = turn.answers(service)
    head = head_of(served.name, "chatcmpl", "chat.completion")
    if body.stream:
        chunks = _chat_chunks(service, call, body, ticket, answers, head)
        return stream(service, call, ticket, chunks)
    await collect(service, ticket, answers, http)
    with_logprobs = turn.logprobs is not None
    choices = [chat_choice(i, a, logprobs=with_logprobs) for i, a in enumerate(answers)]
    spent = usage(len(turn.ids), call.completion_tokens, call.cached_tokens)
    return JSONResponse({**head, "choices": choices, "usage": spent})


def prepare(service: Service, served: Served, body: ChatBody) -> Turn:
    """Reads a body into jobs; takes a while for long conversations.

    Raises:
      UserError: it cannot be obeyed.
    """
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    asked = body.asked_grammar()
    plan = plan_tools(
        tools,
        body.tool_choice,
        service.template.tool_style,
        tokenizer=service.tokenizer,
        parallel=body.parallel_tool_calls is not False,
        asked=asked,
    )
    ids = prompt_ids(service.tokenizer, service.template, body.messages, plan.tools)
    max_tokens = body.max_completion_tokens or body.max_tokens
    if max_tokens is None:
        room = service.engine.engine.context - len(ids)
        max_tokens = max(1, min(service.default_max_tokens, room))
    if body.top_logprobs is not None and not body.logprobs:
        raise UserError("top_logprobs needs logprobs=true.")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    options = {"logprobs": logprobs, "grammar": plan.grammar or asked, "markers": plan.markers}
    several = range(body.n or 1)
    jobs = [make_job(served, ids, body.sampling(max_tokens, index=i, **options)) for i in several]
    return Turn(ids, jobs, plan, logprobs)


async def _chat_chunks(
    service: Service,
    call: Call,
    body: ChatBody,
    ticket: Ticket,
    answers: list[Answer],
    head: dict,
) -> AsyncIterator[dict]:
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(index: int, delta: dict, reason: str | None = None, logprobs: dict | None = None):
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice]}

    for index in range(len(answers)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, delta in follow(service, call, ticket):
        answer, before = answers[index], len(answers[index].logprobs)
        answer.take(delta)
        new = answer.logprobs[before:]
        entries = chat_logprobs(service.tokenizer, new) if new else None
        text = answer.newly_certain()
        if text or entries:
            yield chunk(index, {"content": text}, logprobs=entries)
        for piece in answer.new_call_pieces():
            yield chunk(index, {"tool_calls": [piece]})
        if answer.finish_reason:
            yield chunk(index, {}, answer.result()[2])
    if body.wants_usage:
        spent = usage(call.prompt_tokens, call.completion_tokens, call.cached_tokens)
        yield {**head, "choices": [], "usage": spent}
