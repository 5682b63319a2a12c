"""The door: who asks, how much and how often, before a body is read; and what came of it, after."""

import logging
import re
import uuid

from internjax.errors import UserError
from internjax.serve.http.call import Call
from internjax.serve.http.errors import ApiError
from internjax.serve.http.service import Service

log = logging.getLogger(__name__)

OPEN_PATHS = {"/health"}
WHILE_CLOSING = {"/health", "/metrics"}
_OWN_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Guard:
    """ASGI middleware around all routes.

    Every request gets an id and one line in the log; only /health answers without a key.
    """

    def __init__(self, app, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call = _begin(scope)
        answer = _Sender(send, call)
        try:
            self._admit(scope, call)
            await self.app(scope, self._counted(receive), answer)
        except ApiError as error:
            await answer.refuse(error, scope, receive)
        except Exception as error:  # the process's border: one bad request ends none but itself
            log.exception("request %s failed", call.id)
            bad = ApiError(500, f"internal error: {type(error).__name__}.", code="internal")
            await answer.refuse(bad, scope, receive)
        finally:
            self._finish(scope, call)

    def _admit(self, scope, call: Call) -> None:
        """Raises `ApiError` for a request that is not even looked at."""
        headers, path = dict(scope["headers"]), scope["path"]
        call.key = self._owner(headers, path)
        client = scope.get("client") or ("?",)
        call.caller = call.key or f"address {client[0]}"
        engine = self.service.engine
        if not engine.ready and path not in WHILE_CLOSING:
            raise ApiError(503, f"{engine.reason}.", code=engine.status)
        if path not in OPEN_PATHS:
            self.service.limits.take(call.caller, "requests")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.service.max_body_bytes:
            raise self._too_large()

    def _owner(self, headers: dict[bytes, bytes], path: str) -> str:
        keys = self.service.keys
        if keys.open or path in OPEN_PATHS:
            return ""
        kind, _, given = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if kind.lower() != "bearer":
            message = "give the API key as `Authorization: Bearer KEY`."
            raise ApiError(401, message, code="invalid_api_key")
        try:
            owner = keys.owner(given.strip())
        except UserError as error:  # the keys file was damaged while we run: nobody comes in
            log.error("%s", error)
            message = "the keys of this server cannot be read; its log says why."
            raise ApiError(503, message, code="keys") from error
        if owner is None:
            raise ApiError(401, "this API key is not known here.", code="invalid_api_key")
        return owner

    def _too_large(self) -> ApiError:
        limit = self.service.max_body_bytes
        return ApiError(413, f"the body is larger than {limit} bytes.", code="body_too_large")

    def _counted(self, receive):
        """Also stops a body that did not declare its length."""
        taken = 0

        async def counted():
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.service.max_body_bytes:
                raise self._too_large()
            return message

        return counted

    def _finish(self, scope, call: Call) -> None:
        service = self.service
        service.limits.give_back(call.caller, "tokens", call.reserved - call.used)
        route = scope.get("route")
        service.metrics.count_call(route.path if route else "other", call.status)
        call.write(with_text=service.log_text)


class _Sender:
    """Sends an answer, adds the request's id to it and keeps its status."""

    def __init__(self, send, call: Call):
        self.send, self.call = send, call

    async def __call__(self, message) -> None:
        if message["type"] == "http.response.start":
            self.call.status = message["status"]
            own = (b"x-request-id", self.call.id.encode())
            message = {**message, "headers": [*message.get("headers", ()), own]}
        await self.send(message)

    async def refuse(self, error: ApiError, scope, receive) -> None:
        """Answers with an error, unless an answer has begun, which can only be broken off."""
        if self.call.status:
            self.call.error = error.code or "broken off"
            return
        await error.response(self.call)(scope, receive, self)


def _begin(scope) -> Call:
    """Starts the record of a request; a harmless id of the client's own is kept."""
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    name = given if _OWN_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
    call = scope["internjax.call"] = Call(name, method=scope["method"], path=scope["path"])
    return call
