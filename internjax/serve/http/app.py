"""The HTTP interface over an engine: which path goes where.

Bodies are read in `serve.schema` and its neighbours, answers written in `serve.answers`, tools
planned in `serve.tools`. A request that cannot be obeyed is refused with the reason; nothing is
accepted and ignored.
"""

from collections.abc import Sequence

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
    _add_openai(app, service)
    _add_responses(app, service)
    _add_lmdeploy(app, service)
    return app


def _add_openai(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def _chat(body: ChatBody, http: Request) -> Response:
        return await chat(service, body, http)

    @app.post("/v1/completions")
    async def _completions(body: CompletionBody, http: Request) -> Response:
        return await completions(service, body, http)

    @app.post("/v1/embeddings")
    async def _embeddings(body: EmbeddingBody, http: Request) -> Response:
        return await embeddings(service, body, http)


def _add_responses(app: FastAPI, service: Service) -> None:
    @app.post("/v1/responses")
    async def _responses(body: ResponseBody, http: Request) -> Response:
        return await responses(service, body, http)

    @app.get("/v1/responses/{name}")
    async def _stored(name: str, http: Request) -> Response:
        return JSONResponse(stored_response(service, name, call_of(http)).record)

    @app.delete("/v1/responses/{name}")
    async def _delete(name: str, http: Request) -> Response:
        return JSONResponse(delete_response(service, name, call_of(http)))


def _add_lmdeploy(app: FastAPI, service: Service) -> None:
    @app.post("/generate")
    async def _generate(body: GenerateBody, http: Request) -> Response:
        return await generate(service, body, http)

    @app.post("/v1/chat/interactive")
    async def _interactive(body: InteractiveBody, http: Request) -> Response:
        return await interactive(service, body, http)
