"""One request to a replica and its answer back, byte for byte; what happens when it dies."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx2

from internjax.serve.replicas.process import Replica

type Headers = list[tuple[bytes, bytes]]
type Send = Callable[[dict], Awaitable[None]]

# RFC 9110 section 7.6.1: they speak of one connection, not of the message.
_HOP = {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te"}
_HOP |= {b"trailer", b"transfer-encoding", b"upgrade", b"proxy-connection"}
_OWN = _HOP | {b"expect", b"content-length"}  # the front has read the body whole
_OWN |= {b"x-request-id", b"x-forwarded-for", b"forwarded"}  # the front says it itself


class NotSent(Exception):
    """No connection to the replica: the request has not left, another replica may take it."""


class Cut(Exception):
    """An answer whose beginning is out cannot be ended: the connection must break."""


@dataclass(frozen=True)
class Incoming:
    """A client's request, read whole.

    Fields:
      target: path and query as they came; id: names the request in answers and logs.
      client: address of the other side; "" if unknown.
    """

    method: str
    path: str
    target: bytes
    headers: Headers
    body: bytes
    id: str
    client: str = ""


async def relay(replica: Replica, incoming: Incoming, send: Send) -> None:
    """Gives the replica's answer to the client as it comes.

    A replica that dies: status 500 if nothing was answered yet; in a stream of events an error
    event. An answer of known length is read whole first, so it comes whole or as a 500.

    Raises:
      NotSent, Cut.
    """
    stream: _Events | None = None
    try:
        async with contextlib.aclosing(await upstream(replica, incoming)) as answer:
            if "content-length" in answer.headers:
                body = b"".join([chunk async for chunk in answer.aiter_raw()])
                await send_whole(send, answer, body, incoming, replica)
                return
            kind = answer.headers.get("content-type", "")
            stream = _Events(send, whole=kind.startswith("text/event-stream"))
            await send(_start(answer, incoming, replica))
            async for chunk in answer.aiter_raw():
                await stream.write(chunk)
                await asyncio.sleep(0)  # much may have come at once: let others in, and see leavers
            await stream.end()
    except httpx2.ConnectError as error:
        raise NotSent from error
    except httpx2.TransportError as error:
        replica.failed += 1
        message = f"the replica that ran request {incoming.id} has died; send the request again."
        if stream is None:
            await respond(send, 500, message, incoming.id, code="replica_died")
        elif stream.whole:
            await stream.fail(_error_event(incoming.path, message))
        else:
            raise Cut(message) from error


async def upstream(replica: Replica, incoming: Incoming) -> httpx2.Response:
    """Sends the request; returns the open answer once its headers are there."""
    headers = [(k, v) for k, v in incoming.headers if k not in _OWN]
    headers.append((b"x-request-id", incoming.id.encode()))
    if incoming.client:
        headers.append((b"x-forwarded-for", incoming.client.encode()))
    url = httpx2.URL(replica.url).copy_with(raw_path=incoming.target)
    content = incoming.body if incoming.body or incoming.method in ("POST", "PUT") else None
    request = httpx2.Request(incoming.method, url, headers=headers, content=content)
    return await replica.client.send(request, stream=True)


class _Events:
    """A stream to the client; of events only whole ones, so that an error can follow any."""

    def __init__(self, send: Send, *, whole: bool):
        self.send, self.whole, self.rest = send, whole, b""

    async def write(self, chunk: bytes) -> None:
        if self.whole:
            events, end, self.rest = (self.rest + chunk).rpartition(b"\n\n")
            chunk = events + end
        if chunk:
            await self._out(chunk, more=True)

    async def end(self) -> None:
        await self._out(self.rest, more=False)

    async def fail(self, event: bytes) -> None:
        await self._out(event, more=False)

    async def _out(self, body: bytes, *, more: bool) -> None:
        await self.send({"type": "http.response.body", "body": body, "more_body": more})


async def send_whole(
    send: Send, answer: httpx2.Response, body: bytes, incoming: Incoming, replica: Replica
) -> None:
    """Gives the client an answer that has been read to its end."""
    await send(_start(answer, incoming, replica))
    await send({"type": "http.response.body", "body": body})


def _start(answer: httpx2.Response, incoming: Incoming, replica: Replica) -> dict:
    """Returns the message that opens an answer; it names the request, and who answers."""
    headers = [(k.lower(), v) for k, v in answer.headers.raw if k.lower() not in _HOP]
    if b"x-request-id" not in dict(headers):
        headers.append((b"x-request-id", incoming.id.encode()))
    headers.append((b"x-replica", str(replica.index).encode()))
    return {"type": "http.response.start", "status": answer.status_code, "headers": headers}


def _error_event(path: str, message: str) -> bytes:
    body = {"message": message, "type": "server_error", "param": None, "code": "replica_died"}
    if path.startswith("/v1/responses"):  # its events carry their type inside
        flat = {"type": "error", "code": body["code"], "message": message, "param": None}
        return f"event: error\ndata: {json.dumps(flat)}\n\n".encode()
    return f"data: {json.dumps({'error': body})}\n\ndata: [DONE]\n\n".encode()


async def respond(send: Send, status: int, message: str, id: str, *, code: str) -> None:
    """Answers for the front itself, in the shape of OpenAI's errors."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    headers = [(b"x-request-id", id.encode())]
    await respond_json(send, status, {"error": error}, headers)


async def respond_json(send: Send, status: int, value: dict, headers: Headers = ()) -> None:
    """Answers with one JSON object; asks for another try where that may help."""
    body = json.dumps(value).encode()
    headers = [*headers, (b"content-type", b"application/json")]
    headers.append((b"content-length", str(len(body)).encode()))
    if status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
