"""Serves a model over HTTP in OpenAI's API until SIGINT or SIGTERM.

internjax serve smollm2-135m-instruct serve.port=8000
"""

import dataclasses
import logging
import sys
from dataclasses import dataclass, field

import hydra
from omegaconf import DictConfig

from internjax.experiments.compilation_cache import enable_compilation_cache
from internjax.experiments.config import build
from internjax.serve.server import ServeConfig


@dataclass(frozen=True)
class ServeRun:
    """Which model, and how; each key is explained in configs/serve.yaml."""

    model: str
    dtype: str = "float32"
    serve: ServeConfig = field(default_factory=ServeConfig)


@hydra.main(config_path="../configs", config_name="serve", version_base=None)
def main(raw: DictConfig) -> None:
    """Loads, listens, serves, drains."""
    cfg = build(ServeRun, raw)
    _write_log("internjax", "%(asctime)s %(name)s %(message)s")
    _write_log("internjax.requests", "%(message)s")  # a line of JSON and nothing else
    enable_compilation_cache()

    from internjax.models.load import load
    from internjax.serve.server import run_server

    model = load(cfg.model, dtype=cfg.dtype, packed=True)
    serve = cfg.serve if cfg.serve.name else dataclasses.replace(cfg.serve, name=cfg.model)

    def ready(url: str) -> None:
        print(f"{serve.name} at {url} ({serve.engine.slots} slots; stop with Ctrl-C)", flush=True)

    def ready_grpc(address: str) -> None:
        print(f"gRPC at {address}", flush=True)

    run_server(model, serve, on_ready=ready, on_grpc=ready_grpc)
    print("stopped.", flush=True)


def _write_log(name: str, form: str) -> None:
    """Sends a logger's lines to standard error; the root's handlers are those of libraries."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(form))
    log = logging.getLogger(name)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


if __name__ == "__main__":  # the same program as `internjax serve`
    from internjax.cli import run

    sys.exit(run(["serve", *sys.argv[1:]]))
