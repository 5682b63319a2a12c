"""The HTTP interface over an engine: which path goes where.

Bodies are read in `serve.schema` and its neighbours, answers written in `serve.answers`, tools
planned in `serve.tools`. A request that cannot be obeyed is refused with the reason; nothing is
accepted and ignored.
"""

from collections.abc import Callable, Sequence

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.middleware.cors import CORSMiddleware

from internjax.serve.http.adapters import add_adapters
from internjax.serve.http.call import call_of
from internjax.serve.http.chat import chat
from internjax.serve.http.completions import completions
from internjax.serve.http.embeddings import embeddings
from internjax.serve.http.errors import add_errors
from internjax.serve.http.guard import Guard
from internjax.serve.http.info import add_info
from internjax.serve.http.lmdeploy import generate, interactive
from internjax.serve.http.responses import delete_response, responses, stored_response
from internjax.serve.http.service import Service
from internjax.serve.lmdeploy_schema import GenerateBody, InteractiveBody
from internjax.serve.responses_schema import ResponseBody
from internjax.serve.schema import ChatBody, CompletionBody, EmbeddingBody
from internjax.version import __version__

ALLOWED_HEADERS = ("authorization", "content-type", "x-request-id")
POSTS: dict[str, tuple[Callable, type]] = {
    "/v1/chat/completions": (chat, ChatBody),
    "/v1/completions": (completions, CompletionBody),
    "/v1/embeddings": (embeddings, EmbeddingBody),
    "/v1/responses": (responses, ResponseBody),
    "/generate": (generate, GenerateBody),
    "/v1/chat/interactive": (interactive, InteractiveBody),
}
"""Calls that the engine answers, and their bodies."""


def make_app(service: Service, cors_origins: Sequence[str] = ()) -> FastAPI:
    """Builds the ASGI application.

    Args:
      cors_origins: web pages of these origins may ask from a browser; ("*",) lets all.
    """
    app = FastAPI(title="InternJAX", version=__version__, docs_url=None, redoc_url=None)
    add_errors(app)
    app.add_middleware(Guard, service=service)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=[*ALLOWED_HEADERS],
            expose_headers=["x-request-id", "retry-after"],
        )
    add_info(app, service)
    add_adapters(app, service)
    for path, (answer, kind) in POSTS.items():
        _add_post(app, service, path, answer, kind)
    _add_stored(app, service)
    return app


def _add_post(app: FastAPI, service: Service, path: str, answer: Callable, kind: type) -> None:
    """Adds the route of a call whose body is of some kind, see `POSTS`."""

    async def post(body: kind, http: Request) -> Response:
        return await answer(service, body, http)

    app.add_api_route(path, post, methods=["POST"], name=answer.__name__)


def _add_stored(app: FastAPI, service: Service) -> None:
    @app.get("/v1/responses/{name}")
    async def stored(name: str, http: Request) -> Response:
        return JSONResponse(stored_response(service, name, call_of(http)).record)

    @app.delete("/v1/responses/{name}")
    async def delete(name: str, http: Request) -> Response:
        return JSONResponse(delete_response(service, name, call_of(http)))
