"""`/v1/responses`: OpenAI's newer call, whose conversations the server may keep.

A response is stored unless `store` is false, and goes on with `previous_response_id`; a bounded
number is kept, in memory, and only for the key that made it.
"""

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from internjax.serve.answers import Answer, AnswerFailed, chat_logprobs
from internjax.serve.http.call import Call, call_of
from internjax.serve.http.chat import prepare
from internjax.serve.http.errors import ApiError
from internjax.serve.http.memory import Talk
from internjax.serve.http.requests import collect, failure, follow, reserve, submit
from internjax.serve.http.service import Service
from internjax.serve.http.streaming import named_event, stream
from internjax.serve.responses_schema import ResponseBody
from internjax.serve.thread import Ticket


@dataclass
class Reply:
    """One response while it is made.

    Fields:
      messages: the conversation before it, without the instructions.
      answer: what the engine has said; logprobs: whether they were asked for.
      message_id: of the item that holds the text.
    """

    body: ResponseBody
    messages: list[dict[str, Any]]
    answer: Answer
    logprobs: bool
    id: str = field(default_factory=lambda: _new("resp"))
    message_id: str = field(default_factory=lambda: _new("msg"))
    created: int = field(default_factory=lambda: int(time.time()))

    def record(
        self, call: Call, status: str, output: list[dict], error: dict | None = None
    ) -> dict:
        """The response object as it stands."""
        body = self.body
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        ended = status in ("completed", "incomplete")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": error,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": call.model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": _text_config(body),
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": _usage(call) if ended else None,
        }

    def message(self, text: str, status: str) -> dict[str, Any]:
        """The item that holds the text."""
        content = [self.part(text)] if status != "in_progress" else []
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def part(self, text: str) -> dict[str, Any]:
        """The text of an item, with log-probabilities if they were asked for."""
        logprobs = []
        if self.logprobs and text:
            logprobs = chat_logprobs(self.answer.tokenizer, self.answer.logprobs)["content"]
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    @functools.cached_property
    def ended(self) -> tuple[str, list[dict], str]:
        """The words, the calls as items, and the status of an answer that has ended."""
        words, calls, reason = self.answer.result()
        items = [
            {
                "id": _new("fc"),
                "type": "function_call",
                "call_id": call["id"],
                "name": call["function"]["name"],
                "arguments": call["function"]["arguments"],
                "status": "completed",
            }
            for call in calls
        ]
        return words, items, "incomplete" if reason == "length" else "completed"

    def output(self) -> tuple[list[dict], str]:
        """Returns all items of an answer that has ended, and its status."""
        words, items, status = self.ended
        if words or not items:
            items = [self.message(words, status), *items]
        return items, status

    def keep(self, service: Service, call: Call, record: dict) -> None:
        """Stores the conversation with its answer, if the client did not forbid it."""
        if self.body.store is False:
            return
        words, items, _ = self.ended
        said: dict[str, Any] = {"role": "assistant", "content": words}
        if items:
            said["tool_calls"] = [
                {
                    "id": item["call_id"],
                    "type": "function",
                    "function": {"name": item["name"], "arguments": item["arguments"]},
                }
                for item in items
            ]
        talk = Talk([*self.messages, said], record=record)
        service.responses.keep(call.caller, self.id, talk)


async def responses(service: Service, body: ResponseBody, http: Request) -> Response:
    """Answers in one turn, whole or as events."""
    served, call = service.models.find(body.model), call_of(http)
    call.model = served.name
    messages = [*_before(service, call, body), *body.new_messages()]
    turn = await asyncio.to_thread(prepare, service, served, body.chat(messages))
    reserve(service, call, len(turn.ids), turn.jobs)
    ticket = await submit(service, call, turn.jobs, len(turn.ids))
    (answer,) = turn.answers(service)
    reply = Reply(body, messages, answer, turn.logprobs is not None)
    if body.stream:
        events = _numbered(_events(service, call, ticket, reply))
        return stream(service, call, ticket, events, written=named_event, end="")
    await collect(service, ticket, [answer], http)
    output, status = reply.output()
    record = reply.record(call, status, output)
    reply.keep(service, call, record)
    return JSONResponse(record)


def stored_response(service: Service, name: str, call: Call) -> Talk:
    """Returns a stored response of the caller.

    Raises:
      ApiError: 404, there is none (any more).
    """
    talk = service.responses.find(call.caller, name)
    if talk is None:
        raise ApiError(404, f"no response {name!r} is stored here (any more).", code="not_found")
    return talk


def delete_response(service: Service, name: str, call: Call) -> dict[str, Any]:
    """Forgets a stored response."""
    stored_response(service, name, call)
    service.responses.drop(call.caller, name)
    return {"id": name, "object": "response.deleted", "deleted": True}


def _before(service: Service, call: Call, body: ResponseBody) -> list[dict[str, Any]]:
    if body.previous_response_id is None:
        return []
    talk = service.responses.find(call.caller, body.previous_response_id)
    if talk is None:
        raise ApiError(
            400,
            f"no response {body.previous_response_id!r} is stored here (any more): the last "
            f"{service.responses.size} are kept until the server stops. Send the whole "
            "conversation as input.",
            code="previous_response_not_found",
            param="previous_response_id",
        )
    return talk.messages


async def _numbered(events: AsyncIterator[tuple[str, dict]]) -> AsyncIterator[dict]:
    number = 0
    async for kind, fields in events:
        yield {"type": f"response.{kind}", "sequence_number": number, **fields}
        number += 1


async def _events(
    service: Service, call: Call, ticket: Ticket, reply: Reply
) -> AsyncIterator[tuple[str, dict]]:
    yield "created", {"response": reply.record(call, "in_progress", [])}
    yield "in_progress", {"response": reply.record(call, "in_progress", [])}
    answer, begun = reply.answer, False
    place = {"item_id": reply.message_id, "output_index": 0, "content_index": 0}
    try:
        async for _, delta in follow(service, call, ticket):
            before = len(answer.logprobs)
            answer.take(delta)
            text = answer.newly_certain()
            if answer.finish_reason:
                text += reply.ended[0][answer.sent :]
            if not begun and (text or (answer.finish_reason and not reply.ended[1])):
                begun = True
                yield "output_item.added", _item(0, reply.message("", "in_progress"))
                yield "content_part.added", {**place, "part": reply.part("")}
            if text:
                new = answer.logprobs[before:] if reply.logprobs else []
                entries = chat_logprobs(answer.tokenizer, new)["content"]
                yield "output_text.delta", {**place, "delta": text, "logprobs": entries}
    except AnswerFailed as error:
        failed = failure(error)
        call.error = failed.code
        told = {"code": "server_error", "message": f"{failed.message} (request {call.id})"}
        yield "failed", {"response": reply.record(call, "failed", [], told)}
        return
    for event in _ending(reply, place, begun):
        yield event
    output, status = reply.output()
    record = reply.record(call, status, output)
    reply.keep(service, call, record)
    yield status, {"response": record}


def _ending(reply: Reply, place: dict, begun: bool) -> list[tuple[str, dict]]:
    """The events that close the text and hand out the calls."""
    words, calls, status = reply.ended
    events = []
    if begun:
        part = reply.part(words)
        events += [
            ("output_text.done", {**place, "text": words, "logprobs": part["logprobs"]}),
            ("content_part.done", {**place, "part": part}),
            ("output_item.done", _item(0, reply.message(words, status))),
        ]
    for index, call in enumerate(calls, int(begun)):
        at = {"item_id": call["id"], "output_index": index}
        arguments, name = call["arguments"], call["name"]
        opened = {**call, "arguments": "", "status": "in_progress"}
        events += [
            ("output_item.added", _item(index, opened)),
            ("function_call_arguments.delta", {**at, "delta": arguments}),
            ("function_call_arguments.done", {**at, "name": name, "arguments": arguments}),
            ("output_item.done", _item(index, call)),
        ]
    return events


def _item(index: int, item: dict) -> dict[str, Any]:
    return {"output_index": index, "item": item}


def _text_config(body: ResponseBody) -> dict[str, Any]:
    form = body.text.format.model_dump(by_alias=True) if body.text else {"type": "text"}
    if form["type"] != "json_schema":
        form = {"type": form["type"]}
    return {"format": form}


def _usage(call: Call) -> dict[str, Any]:
    return {
        "input_tokens": call.prompt_tokens,
        "input_tokens_details": {"cached_tokens": call.cached_tokens},
        "output_tokens": call.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": call.used,
    }


def _new(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
