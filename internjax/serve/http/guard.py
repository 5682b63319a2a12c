"""Refuses what has no key or is too large, before it is read."""

import hashlib
import hmac

from fastapi.responses import JSONResponse

from internjax.serve.http.errors import ApiError
from internjax.serve.http.service import Service


class Guard:
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
