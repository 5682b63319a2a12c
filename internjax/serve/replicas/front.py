"""The ASGI application in front of the replicas. It holds no keys: the replicas guard routes.

Only /health is answered without one; /metrics is joined from what the replicas say to the client's
own key, and everything else is theirs.
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import httpx2

from internjax.serve.replicas.config import FrontConfig
from internjax.serve.replicas.everywhere import Everywhere
from internjax.serve.replicas.metrics import merge, written
from internjax.serve.replicas.process import DOWN, Replica
from internjax.serve.replicas.relay import (
    Cut,
    Incoming,
    NotSent,
    Send,
    relay,
    respond,
    respond_json,
)
from internjax.serve.replicas.route import choose, key_of
from internjax.serve.replicas.stored import holder, response_id

log = logging.getLogger(__name__)

type Receive = Callable[[], Awaitable[dict]]
_SCRAPE_SECONDS = 5.0
_OWN_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # a harmless id of the client's own is kept


class Front:
    """Answers for all replicas. `closing`: no new requests are taken."""

    def __init__(self, replicas: Sequence[Replica], config: FrontConfig):
        self.replicas, self.config = replicas, config
        self.closing = False
        self.everywhere = Everywhere()

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        incoming = Incoming(
            method=scope["method"],
            path=scope["path"],
            target=_target(scope),
            headers=scope["headers"],
            body=b"",
            id=given if _OWN_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}",
            client=(scope.get("client") or ("",))[0],
        )
        reads = incoming.method in ("GET", "HEAD")
        if reads and incoming.path == "/health":
            await self._health(send)
            return
        body = await _read(receive, headers, self.config.max_body_bytes)
        if isinstance(body, int):
            message = f"the body is larger than {body} bytes."
            await respond(send, 413, message, incoming.id, code="body_too_large")
        elif body is not None:
            metrics = reads and incoming.path == "/metrics"
            work = self._metrics if metrics else self._answer
            await _while_present(work(replace(incoming, body=body), send), receive)

    async def _answer(self, incoming: Incoming, send: Send) -> None:
        """Finds a replica and relays; another one is asked only if nothing reached the first."""
        if self.everywhere.takes(incoming) and not self.closing:
            await self.everywhere.tell(self.replicas, incoming, send)
            return
        key, home = key_of(incoming.path, incoming.body), None
        if (id := response_id(incoming)) is not None:
            home = await holder(self.replicas, incoming, id)
        while True:
            replica = home or choose(self.replicas, key, self.config.router.spread)
            home = None
            if replica is None or self.closing:
                message = _unavailable(self.closing, key is not None and key.bound)
                code = "closing" if self.closing else "not_ready"
                await respond(send, 503, message, incoming.id, code=code)
                return
            replica.in_flight += 1
            replica.requests += 1
            start = time.monotonic()
            try:
                await relay(replica, incoming, send)
                return
            except NotSent:
                replica.state = DOWN  # until its next good health check
            finally:
                replica.in_flight -= 1
                log.debug(
                    "%s %s %s: replica %d, %.3f s", incoming.id, incoming.method, incoming.path,
                    replica.index, time.monotonic() - start,
                )  # fmt: skip

    async def _health(self, send: Send) -> None:
        states = [r.state for r in self.replicas]
        well = "ready" in states and not self.closing
        status = "closing" if self.closing else "ok" if well else "starting"
        replicas = [
            {"replica": r.index, "state": r.state, "restarts": r.restarts, "in_flight": r.in_flight}
            for r in self.replicas
        ]
        await respond_json(send, 200 if well else 503, {"status": status, "replicas": replicas})

    async def _metrics(self, incoming: Incoming, send: Send) -> None:
        ready = [r for r in self.replicas if r.ready]
        if not ready:
            message = _unavailable(self.closing, bound=False)
            await respond(send, 503, message, incoming.id, code="not_ready")
            return
        keys = [(k, v) for k, v in incoming.headers if k == b"authorization"]
        found = await asyncio.gather(*(_scrape(r, keys) for r in ready))
        answers = {r.index: a for r, a in zip(ready, found, strict=True) if a is not None}
        refused = next((a for a in answers.values() if a.status_code != 200), None)
        if refused is not None:
            status, text = refused.status_code, refused.text
        else:
            status = 200
            text = _own_metrics(self.replicas) + merge({i: a.text for i, a in answers.items()})
        kind = "text/plain; version=0.0.4" if refused is None else "application/json"
        headers = [(b"content-type", kind.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})


def _own_metrics(replicas: Sequence[Replica]) -> str:
    rows = [
        ("ready", "gauge", "Whether the replica answers.", lambda r: float(r.ready)),
        ("in_flight", "gauge", "Requests it is answering.", lambda r: r.in_flight),
        ("requests_total", "counter", "Requests sent to it.", lambda r: r.requests),
        ("failed_total", "counter", "Requests that died with it.", lambda r: r.failed),
        ("restarts_total", "counter", "Times it was started again.", lambda r: r.restarts),
        ("losses_total", "counter", "Times its engine hung or died.", lambda r: r.losses),
    ]
    return "".join(
        written(f"internjax_replica_{name}", kind, meaning, [(r.index, of(r)) for r in replicas])
        for name, kind, meaning, of in rows
    )


async def _scrape(replica: Replica, headers) -> httpx2.Response | None:
    try:
        url = f"{replica.url}/metrics"
        return await replica.client.get(url, headers=headers, timeout=_SCRAPE_SECONDS)
    except httpx2.TransportError:
        return None  # it has just died, or is too busy: its numbers are missing this time


async def _read(receive: Receive, headers: dict, limit: int) -> bytes | int | None:
    """Returns the body; the limit when it is larger; None when the client left before its end."""
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit:
        return limit
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > limit:
            return limit
    return b"".join(parts)


async def _while_present(work, receive: Receive) -> None:
    """Does the work, or drops it when the client leaves; a `Cut` breaks the connection."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
        results = await asyncio.gather(working, leaving, return_exceptions=True)
    if isinstance(results[0], Cut):
        log.error("%s", results[0])  # returning unfinished makes the server close the connection
    elif isinstance(results[0], Exception):
        raise results[0]


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _target(scope: dict) -> bytes:
    query = scope.get("query_string", b"")
    return scope["raw_path"] + (b"?" + query if query else b"")


def _unavailable(closing: bool, bound: bool) -> str:
    if closing:
        return "the server is shutting down."
    if bound:
        return "the replica that held this session is not there; its history is lost."
    return "no replica is ready yet: try again in a moment."
