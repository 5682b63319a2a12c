"""The HTTP interface over an engine: which path goes where.

Bodies are read in `serve.schema`, answers written in `serve.answers`, tools planned in
`serve.tools`. A request that cannot be obeyed is refused with the reason; nothing is accepted and
ignored.
"""

from fastapi import FastAPI, Request
from fastapi.responses import Response

from internjax.serve.http.chat import chat
from internjax.serve.http.completions import completions
from internjax.serve.http.errors import add_errors
from internjax.serve.http.guard import Guard
from internjax.serve.http.info import add_info
from internjax.serve.http.service import Service
from internjax.serve.schema import ChatBody, CompletionBody


def make_app(service: Service) -> FastAPI:
    """Builds the ASGI application."""
    app = FastAPI(title="InternJAX", docs_url=None, redoc_url=None)
    add_errors(app)
    app.add_middleware(Guard, service=service)
    add_info(app, service)

    @app.post("/v1/chat/completions")
    async def _chat(body: ChatBody, http: Request) -> Response:
        return await chat(service, body, http)

    @app.post("/v1/completions")
    async def _completions(body: CompletionBody, http: Request) -> Response:
        return await completions(service, body, http)

    return app
