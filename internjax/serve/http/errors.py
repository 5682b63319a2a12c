"""Errors in OpenAI's shape, whatever went wrong."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from internjax.errors import UserError

RETRY_SECONDS = 1


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


def add_errors(app: FastAPI) -> None:
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
