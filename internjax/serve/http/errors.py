"""Errors in OpenAI's shape, whatever went wrong; each names the request it belongs to."""

import difflib
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from internjax.errors import UserError
from internjax.serve.http.call import Call, call_of

RETRY_SECONDS = 1
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(HTTPException):
    """An error in OpenAI's shape; as an `HTTPException` it also passes FastAPI's body reading.

    Args:
      retry_seconds: when to come again, for 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_seconds: int = RETRY_SECONDS,
    ):
        super().__init__(status, message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_seconds = retry_seconds

    def response(self, call: Call) -> JSONResponse:
        """The answer to a call; the error is noted for its log line."""
        body = self.body(call)
        call.error = self.code or body["type"]
        headers = {"Retry-After": str(self.retry_seconds)} if self.status in (429, 503) else None
        return JSONResponse({"error": body}, self.status, headers)

    def body(self, call: Call) -> dict[str, Any]:
        """The error as JSON, also inside a stream."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "message": self.message,
            "type": KINDS.get(self.status, default),
            "param": self.param,
            "code": self.code,
            "request_id": call.id,
        }


def add_errors(app: FastAPI) -> None:
    """Gives every refusal OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api_error(http: Request, error: ApiError) -> Response:
        return error.response(call_of(http))

    @app.exception_handler(UserError)
    async def user_error(http: Request, error: UserError) -> Response:
        return ApiError(400, str(error)).response(call_of(http))

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        message, param = _of_body(http, error.errors())
        return ApiError(400, message, param=param).response(call_of(http))

    @app.exception_handler(HTTPException)
    async def http_error(http: Request, error: HTTPException) -> Response:
        message = _of_route(http, error)
        answer = ApiError(error.status_code, message).response(call_of(http))
        answer.headers.update(error.headers or {})
        return answer


def _of_body(http: Request, errors: Sequence[dict[str, Any]]) -> tuple[str, str | None]:
    """What is wrong with a body, and the field; a misspelt field before one that is missing."""
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    kind, place = first["type"], ".".join(str(part) for part in first["loc"] if part != "body")
    if kind == "json_invalid":
        return f"the body is no JSON: {first['ctx']['error']} at character {place}.", None
    if not place:
        need = "the body must be a JSON object"
        if "json" not in http.headers.get("content-type", ""):
            need += ", sent with the header `content-type: application/json`"
        return f"{need}.", None
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(place, _fields(http), n=1)
        return f"{place}: no such field{f'; did you mean {near[0]}?' if near else '.'}", place
    return f"{place}: {first['msg']}", place


def _fields(http: Request) -> list[str]:
    """The names that a route's body may have at its top."""
    return list(http.scope["route"].body_field.field_info.annotation.model_fields)


def _of_route(http: Request, error: HTTPException) -> str:
    what = f"{http.method} {http.url.path}"
    if error.status_code == 404:
        return f"{what}: nothing is here; the API begins at /v1, /openapi.json lists every path."
    if error.status_code == 405:
        return f"{what}: this path takes {(error.headers or {}).get('Allow', 'another method')}."
    return f"{what}: {error.detail}"
