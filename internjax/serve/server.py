"""Starts and stops the HTTP server: until a signal comes, or in a thread while a block runs."""

import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from internjax.errors import Missing, UserError
from internjax.models.load import Model
from internjax.serve.engine import Engine, EngineConfig
from internjax.serve.thread import EngineThread

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeConfig:
    """How the HTTP server meets the world.

    Fields:
      host: address to listen on; the default is this machine alone.
      port: 0 lets the system choose.
      name: the model's name in the API; "" is the config's own.
      api_key: asked of every client when not empty.
      default_max_tokens: length of a chat answer when the request names none.
      max_body_bytes: larger requests are refused.
      drain_seconds: how long running requests may finish after a signal to stop.
      warmup: compile every program before the first request.
      engine: slots, context, cache precision, queue.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    api_key: str = ""
    default_max_tokens: int = 512
    max_body_bytes: int = 4 << 20
    drain_seconds: float = 30.0
    warmup: bool = False
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        if not 0 <= self.port < 65536:
            raise UserError(f"port={self.port}: it must lie in 0..65535, 0 lets the system choose.")


def run_server(model: Model, config: ServeConfig, *, on_ready=None) -> None:
    """Serves until SIGINT or SIGTERM, then lets running requests finish for `drain_seconds`.

    Args:
      on_ready: called with the base URL once connections are accepted.

    Raises:
      UserError: the port is taken or the address cannot be used.
    """
    with _listening(config) as listener:
        server, engine = _build(model, config)
        if on_ready:
            on_ready(_base_url(listener))
        try:
            with _stopping_on_signals(server):
                server.run(sockets=[listener])
        finally:
            engine.close()


@contextlib.contextmanager
def serving(
    model: Model,
    *,
    port: int = 0,
    name: str = "",
    api_key: str = "",
    engine: EngineConfig | None = None,
    **options,
) -> Iterator[str]:
    """Serves in a background thread while the block runs; yields "http://127.0.0.1:PORT/v1".

    Args:
      port: 0 lets the system choose.
      options: other fields of `ServeConfig`.

    Raises:
      UserError: the port is taken.
    """
    options |= {"port": port, "name": name, "api_key": api_key}
    config = ServeConfig(engine=engine or EngineConfig(), **options)
    with _listening(config) as listener:
        server, worker = _build(model, config)
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True
        )
        thread.start()
        try:
            _wait_started(server, thread)
            yield _base_url(listener)
        finally:
            worker.close()
            server.should_exit = True
            thread.join(timeout=30)


def _build(model: Model, config: ServeConfig):
    """Returns a uvicorn server whose shutdown drains the engine, and the engine at work."""
    try:
        import uvicorn

        from internjax.serve.http.app import make_app
        from internjax.serve.http.service import Service
    except ModuleNotFoundError as error:
        raise Missing(f"The server needs {error.name}: pip install 'internjax[serve]'") from error

    engine = Engine(model, config.engine)
    if config.warmup:
        start = time.monotonic()
        programs = engine.warm_up()
        log.info("compiled %d programs in %.1f s", len(programs), time.monotonic() - start)
    worker = EngineThread(engine)
    service = Service(
        name=config.name or model.cfg.name,
        engine=worker,
        tokenizer=model.tokenizer,
        template=model.template,
        api_key=config.api_key,
        max_body_bytes=config.max_body_bytes,
        default_max_tokens=config.default_max_tokens,
        created=int(time.time()),
    )
    options = uvicorn.Config(
        make_app(service),
        log_level="warning",
        timeout_graceful_shutdown=max(1, round(config.drain_seconds)),
        lifespan="off",
        ws="none",
    )
    return uvicorn.Server(options), worker


@contextlib.contextmanager
def _stopping_on_signals(server) -> Iterator[None]:
    """Lets SIGINT and SIGTERM drain the server, and a second one stop it at once.

    uvicorn would raise the signal again after its shutdown, and the engine would die unclosed.
    """

    def stop(number, frame) -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    server.capture_signals = contextlib.nullcontext
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _listening(config: ServeConfig) -> Iterator[socket.socket]:
    listener = socket.socket(socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {config.host}:{config.port} ({error.strerror}): another program may "
            "hold the port; give port=0 or another one."
        ) from error
    try:
        listener.listen(128)
        yield listener
    finally:
        listener.close()


def _base_url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{host}:{port}/v1"


def _wait_started(server, thread: threading.Thread, timeout_seconds: float = 30) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the HTTP server did not start; its log says why")
        time.sleep(0.005)
