"""Loads a model and serves it in this process."""

import dataclasses
import socket
from dataclasses import dataclass, field

from internjax.experiments.compilation_cache import enable_compilation_cache
from internjax.models.load import Model, load
from internjax.serve.server import ServeConfig, check_outside, run_server


@dataclass(frozen=True)
class ServeRun:
    """Which model, and how; each key is explained in configs/serve.yaml."""

    model: str
    dtype: str = "float32"
    serve: ServeConfig = field(default_factory=ServeConfig)


def load_served(cfg: ServeRun) -> tuple[Model, ServeConfig]:
    """Loads the model; it is served under the name that was asked for, unless another is given."""
    cut = cfg.serve.engine.tensor > 1  # weights go in parts where they belong, never whole
    model = load(cfg.model, dtype=cfg.dtype, packed=not cut, on_host=cut)
    serve = cfg.serve if cfg.serve.name else dataclasses.replace(cfg.serve, name=cfg.model)
    return model, serve


def serve_model(cfg: ServeRun, *, given: socket.socket | None = None) -> None:
    """Serves until a signal comes; says where, unless a listening socket was given."""
    check_outside(cfg.serve, listens=given is None)
    enable_compilation_cache()
    model, serve = load_served(cfg)

    def ready(url: str) -> None:
        print(f"{serve.name} at {url} ({serve.engine.slots} slots; stop with Ctrl-C)", flush=True)

    def ready_grpc(address: str) -> None:
        print(f"gRPC at {address}", flush=True)

    loaded = [model]
    del model  # the engine packs the weights: nobody holds them as they were stored
    run_server(
        loaded.pop(), serve, on_ready=None if given else ready, on_grpc=ready_grpc, given=given
    )
