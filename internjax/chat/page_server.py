"""Serves the web page on loopback, and lets the browser load nothing from anywhere else."""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from internjax.chat.source import Source
from internjax.errors import Missing, UserError

# Read when gradio and huggingface_hub are imported: no usage statistics, no look for a new version.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

# What the browser may load. Gradio's own page needs scripts and styles within the document; an
# answer's Markdown could name a picture on another host, and would tell that host by loading it.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


@dataclass(frozen=True)
class PageConfig:
    """Where the page is served.

    Fields:
      host: address to listen on; the default is this machine alone.
      port: 0 lets the system choose.
    """

    host: str = "127.0.0.1"
    port: int = 7860

    def __post_init__(self):
        if not 0 <= self.port < 65536:
            raise UserError(f"port={self.port}: it must lie in 0..65535, 0 lets the system choose.")


def make_app(sources: list[Source], config: PageConfig, *, policy: str = "react"):
    """The page as an ASGI application, which only answers to its own names.

    Raises:
      Missing: the extra `ui`.
    """
    try:
        import gradio
        from fastapi import FastAPI
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ModuleNotFoundError as error:
        raise Missing(f"The page needs {error.name}: pip install 'internjax[ui]'") from error
    from internjax.chat.page import CSS, THEME, make_page

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Confined)
    if config.host in ("127.0.0.1", "localhost"):
        # A page of another site whose name was made to point here is not this page.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    page = make_page(sources, policy=policy)
    return gradio.mount_gradio_app(
        app,
        page,
        "/",
        server_name=config.host,
        theme=THEME,
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size=0,
    )


class _Confined:
    """Adds the policy to every answer."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def with_policy(message):
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", POLICY.encode())]
                more += [
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        await self.app(scope, receive, with_policy)


def run_page(sources: list[Source], config: PageConfig, *, policy: str, on_ready) -> None:
    """Serves until Ctrl-C or SIGTERM.

    Args:
      on_ready: called with the page's address once connections are accepted.

    Raises:
      UserError: the port is taken or the address cannot be used.
    """
    with _listening(config) as listener:
        server = _server(sources, config, policy)
        on_ready(_address(listener))
        server.run(sockets=[listener])


@contextlib.contextmanager
def page_serving(
    sources: list[Source], config: PageConfig | None = None, *, policy: str = "react"
) -> Iterator[str]:
    """Serves in a background thread while the block runs; yields "http://127.0.0.1:PORT"."""
    config = config or PageConfig(port=0)
    with _listening(config) as listener:
        server = _server(sources, config, policy)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the page did not start; its log says why")
                time.sleep(0.01)
            yield _address(listener)
        finally:
            server.should_exit = True
            thread.join(timeout=30)


def _server(sources: list[Source], config: PageConfig, policy: str):
    app = make_app(sources, config, policy=policy)
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """Cuts off open tabs, each of which holds a stream: that is no error to tell."""
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    options = {"log_level": "warning", "ws": "none", "timeout_graceful_shutdown": 1}
    return Server(uvicorn.Config(app, **options))


@contextlib.contextmanager
def _listening(config: PageConfig) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {config.host}:{config.port} ({error.strerror}): another program "
                "may hold the port; give port=0 or another one."
            ) from error
        listener.listen(128)
        yield listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{host}:{port}"
