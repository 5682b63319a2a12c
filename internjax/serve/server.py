"""Starts and stops the HTTP server: until a signal comes, or in a thread while a block runs."""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from internjax.errors import Missing, UserError
from internjax.models.load import Model, load
from internjax.serve.engine import Engine, EngineConfig
from internjax.serve.keys import Keys
from internjax.serve.listening import base_url, check_free, listening
from internjax.serve.replicas.config import LOST_EXIT, RouterConfig
from internjax.serve.thread import EngineThread

log = logging.getLogger(__name__)

LOSS_SECONDS = 3.0


@dataclass(frozen=True)
class ServeConfig:
    """How the HTTP server meets the world.

    Fields:
      host: address to listen on; the default is this machine alone.
      port: 0 lets the system choose.
      grpc_port: of the Open Inference Protocol on the same host; 0 likewise, None opens none.
      name: the model's name in the API; "" is the config's own.
      api_key: asked of every client when not empty.
      keys_file: file of `internjax keys`; one of its keys is asked of every client.
      cors_origins: origins of web pages that may ask from a browser; ("*",) lets all.
      requests_per_minute, tokens_per_minute: of each key (each address without keys); 0: no limit.
      default_max_tokens: length of a chat answer when the request names none.
      max_request_tokens: prompt and answers of one request together; 0 sets no limit of its own.
      max_body_bytes: larger requests are refused.
      max_conversations: sessions, and stored responses, that are kept in memory.
      log_text: write prompts and answers into the log.
      hang_seconds: the engine is given up when a round, compilations included, lasts longer; 0
        waits for ever. The process then ends (`run_server`), for others to start it anew.
      drain_seconds: how long running requests may finish after a signal to stop.
      warmup: compile every program before the first request.
      draft: name or path of a smaller model, whose guesses the engine checks (`engine.speculate`).
      replicas: processes with an engine each, behind a router (`serve.replicas`); 0 serves in this
        process.
      router: which replica answers what.
      adapters: LoRA adapters that are served from the start, PEFT folders by their names.
      adapters_dir: folder whose adapters clients may load and unload; "" lets them load none.
      engine: slots, context, cache precision, queue.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    name: str = ""
    api_key: str = ""
    keys_file: str = ""
    cors_origins: tuple[str, ...] = ()
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    default_max_tokens: int = 512
    max_request_tokens: int = 0
    max_body_bytes: int = 4 << 20
    max_conversations: int = 1024
    log_text: bool = False
    hang_seconds: float = 300.0
    drain_seconds: float = 30.0
    warmup: bool = False
    draft: str = ""
    replicas: int = 0
    router: RouterConfig = field(default_factory=RouterConfig)
    adapters: dict[str, str] = field(default_factory=dict)
    adapters_dir: str = ""
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        for name in ("port", "grpc_port"):
            if not 0 <= (getattr(self, name) or 0) < 65536:
                raise UserError(
                    f"{name}={getattr(self, name)}: it must lie in 0..65535, 0 lets the system "
                    "choose."
                )
        if self.hang_seconds < 0:
            raise UserError(f"hang_seconds={self.hang_seconds}: give seconds, or 0 for ever.")
        for name in ("requests_per_minute", "tokens_per_minute", "max_request_tokens"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: give a number, or 0 for no limit.")
        for name in ("default_max_tokens", "max_body_bytes", "max_conversations"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1.")
        if self.grpc_port is not None and (self.requests_per_minute or self.tokens_per_minute):
            raise UserError(
                "grpc_port and a limit a minute: limits are counted over HTTP only, so gRPC would "
                "get around them; give one of the two."
            )
        if bool(self.draft) and not self.engine.speculate:
            raise UserError(
                f"draft={self.draft}: say how many tokens it guesses, for example "
                "engine.speculate=4."
            )
        if self.replicas < 0:
            raise UserError(f"replicas={self.replicas}: it must be at least 0.")
        if self.replicas and self.grpc_port is not None:
            raise UserError(
                "grpc_port and replicas: the router speaks HTTP, gRPC is served by one process; "
                "give one of the two."
            )
        need = max(len(self.adapters), int(bool(self.adapters_dir)))
        if self.engine.adapters < need:
            raise UserError(
                f"engine.adapters={self.engine.adapters}: give the engine at least {need} "
                f"place{'s' * (need > 1)} for the adapters that it is to serve."
            )
        if self.adapters_dir and not Path(self.adapters_dir).is_dir():
            raise Missing(f"adapters_dir={self.adapters_dir}: no such folder.")


def check_outside(config: ServeConfig, *, listens: bool = True) -> None:
    """Refuses a keys file and ports that cannot be used, so that nobody waits for a load first.

    Args:
      listens: whether this process will open the ports; a replica is given a socket.

    Raises:
      UserError: a port is taken or not ours to take, or the keys file cannot be read.
    """
    _keys(config)
    ports = {"port": config.port, "grpc_port": config.grpc_port} if listens else {}
    check_free(config.host, {key: port for key, port in ports.items() if port is not None})


def run_server(
    model: Model,
    config: ServeConfig,
    *,
    on_ready: Callable[[str], None] | None = None,
    on_grpc: Callable[[str], None] | None = None,
    given: socket.socket | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM, then lets running requests finish for `drain_seconds`.

    When the engine hangs or its thread has ended the whole process ends with `LOST_EXIT`.

    Args:
      on_ready: called with the base URL once connections are accepted.
      on_grpc: called before that with "HOST:PORT" of gRPC, where it is served.
      given: listening socket of a replica: all it hears comes through the router's front process.

    Raises:
      UserError: the port is taken or the address cannot be used.
    """
    own = listening(config.host, config.port)
    with contextlib.nullcontext(given) if given else own as listener:
        server, engine = _build(model, config, first=True, behind_front=given is not None)
        engine.on_loss = _end_process
        model = replace(model, params={})  # the engine holds them as it wants them
        try:
            beside = _grpc_beside(config, model, engine, server)
            stopping = _stopping_on_signals(server, engine, config.drain_seconds)
            with beside as grpc_address, stopping:
                if on_grpc and grpc_address:
                    on_grpc(grpc_address)
                if on_ready:
                    on_ready(base_url(listener))
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
    with listening(config.host, config.port) as listener:
        server, worker = _build(model, config, first=False)
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True
        )
        thread.start()
        try:
            _wait_started(server, thread)
            beside = _grpc_beside(config, model, worker, server)
            with beside, contextlib.closing(worker):
                yield base_url(listener)
        finally:
            worker.close()
            server.should_exit = True
            thread.join(timeout=30)


def _build(model: Model, config: ServeConfig, *, first: bool, behind_front: bool = False):
    """Returns a uvicorn server whose shutdown drains the engine, and the engine at work.

    Args:
      first: see `build_app`.
      behind_front: all requests come through a front process, which says whose they are.
    """
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise Missing(f"The server needs {error.name}: pip install 'internjax[serve]'") from error

    app, worker = build_app(model, config, first=first)
    options = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=max(1, round(config.drain_seconds)),
        lifespan="off",
        ws="none",
        forwarded_allow_ips="*" if behind_front else None,
    )
    return uvicorn.Server(options), worker


def build_app(model: Model, config: ServeConfig, *, first: bool = True):
    """Returns the ASGI application over a model, and the engine at work behind it.

    Args:
      first: compile what a first short request needs, also without `config.warmup`.
    """
    try:
        from internjax.serve.http.app import make_app
    except ModuleNotFoundError as error:
        raise Missing(f"The server needs {error.name}: pip install 'internjax[serve]'") from error

    draft = load(config.draft, dtype=model.cfg.dtype, packed=True) if config.draft else None
    engine = Engine(model, config.engine, draft=draft)
    for name, folder in config.adapters.items():
        if name == (config.name or model.cfg.name):
            raise UserError(f"adapters.{name}: the model itself is called so; name it otherwise.")
        engine.adapters.load(name, Path(folder))
    if config.warmup or first:
        start = time.monotonic()
        programs = engine.warm_up(least=not config.warmup)
        names = "\n  ".join(["", *programs])
        log.info("%d programs in %.1f s%s", len(programs), time.monotonic() - start, names)
    worker = EngineThread(engine, config.hang_seconds)
    return make_app(_service(model, config, worker), config.cors_origins), worker


def _service(model: Model, config: ServeConfig, worker: EngineThread):
    from internjax.serve.http.limits import Limits
    from internjax.serve.http.memory import Memory
    from internjax.serve.http.service import Models, Service
    from internjax.serve.metrics import Metrics

    models = Models(config.name or model.cfg.name)
    for name in config.adapters:
        models.add(name, name)
    return Service(
        models=models,
        engine=worker,
        tokenizer=model.tokenizer,
        template=model.template,
        metrics=Metrics(worker),
        keys=_keys(config),
        limits=Limits(config.requests_per_minute, config.tokens_per_minute),
        sessions=Memory(config.max_conversations),
        responses=Memory(config.max_conversations),
        adapters_dir=Path(config.adapters_dir) if config.adapters_dir else None,
        max_body_bytes=config.max_body_bytes,
        max_request_tokens=config.max_request_tokens,
        default_max_tokens=config.default_max_tokens,
        log_text=config.log_text,
    )


def _keys(config: ServeConfig) -> Keys:
    return Keys(Path(config.keys_file) if config.keys_file else None, config.api_key)


def _grpc_beside(config: ServeConfig, model: Model, engine: EngineThread, server):
    """The gRPC server over the same engine, if asked for; it drains when the HTTP server does."""
    if config.grpc_port is None:
        return contextlib.nullcontext()
    try:
        from internjax.serve.grpc.server import Face, serving_grpc
    except ModuleNotFoundError as error:
        raise Missing(f"gRPC needs {error.name}: pip install 'internjax[grpc]'") from error
    keys = _keys(config)
    face = Face(
        name=config.name or model.cfg.name,
        engine=engine,
        tokenizer=model.tokenizer,
        template=model.template,
        default_max_tokens=config.default_max_tokens,
        max_request_tokens=config.max_request_tokens,
        knows=None if keys.open else lambda key: keys.owner(key) is not None,
        max_message_bytes=config.max_body_bytes,
    )
    phase = lambda: server.should_exit + server.force_exit  # noqa: E731
    return serving_grpc(face, config.host, config.grpc_port, config.drain_seconds, phase)


def _end_process(reason: str) -> None:
    """Ends the process after a moment in which answers leave and whoever asks is told the reason.

    At once and without clearing up: a hanging thread holds whatever it holds (JAX would wait for
    it), and nothing is left to save.
    """
    log.error("the process ends in %g s with exit code %d", LOSS_SECONDS, LOST_EXIT)
    time.sleep(LOSS_SECONDS)
    sys.stdout.flush()
    os._exit(LOST_EXIT)


@contextlib.contextmanager
def _stopping_on_signals(server, engine: EngineThread, drain_seconds: float) -> Iterator[None]:
    """Lets SIGINT and SIGTERM drain the server, and a second one stop it at once.

    While it drains it still listens, so that new requests are told to go elsewhere (503). uvicorn
    would stop listening, and raise the signal again after its shutdown, with the engine unclosed.
    """

    def drain() -> None:
        log.info(
            "draining: running requests may finish for %g s; a second signal stops at once",
            drain_seconds,
        )
        engine.close(drain_seconds)
        server.should_exit = True

    def stop(number, frame) -> None:
        if stopping:
            server.force_exit = server.should_exit = True
        else:
            stopping.append(threading.Thread(target=drain, name="drain", daemon=True))
            stopping[0].start()

    stopping: list[threading.Thread] = []
    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    server.capture_signals = contextlib.nullcontext
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _wait_started(server, thread: threading.Thread, timeout_seconds: float = 30) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the HTTP server did not start; its log says why")
        time.sleep(0.005)
