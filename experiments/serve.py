"""Serves a model over HTTP in OpenAI's API until SIGINT or SIGTERM.

internjax serve smollm2-135m-instruct serve.port=8000
"""

import logging
import sys
from dataclasses import dataclass

import hydra
from omegaconf import DictConfig, OmegaConf

from internjax.errors import Missing
from internjax.experiments.config import build
from internjax.serve.replicas.config import FrontConfig


@dataclass(frozen=True)
class FrontRun:
    """What the front process itself obeys; a replica gets, and checks, the whole."""

    model: str
    serve: FrontConfig


@hydra.main(config_path="../configs", config_name="serve", version_base=None)
def main(raw: DictConfig) -> None:
    """Loads, listens, serves, drains: here, or in the processes that this one looks after."""
    log_to_terminal()
    if raw.serve.replicas:
        _serve_replicas(raw)
    else:
        from internjax.experiments.serve_model import ServeRun, serve_model

        serve_model(build(ServeRun, raw))
    print("stopped.", flush=True)


def _serve_replicas(raw: DictConfig) -> None:
    """The front process: it imports no JAX, so that it answers at once and nothing kills it."""
    try:
        from internjax.serve.replicas.run import run_replicas
    except ModuleNotFoundError as error:
        raise Missing(f"The server needs {error.name}: pip install 'internjax[serve]'") from error

    whole = OmegaConf.to_container(raw, resolve=True)
    own = {key: whole["serve"][key] for key in FrontConfig.__dataclass_fields__}
    cfg = build(FrontRun, {"model": whole["model"], "serve": own})
    whole["serve"]["replicas"] = 0
    name = whole["serve"]["name"] or cfg.model

    def ready(url: str) -> None:
        count = f"{cfg.serve.replicas} replica{'s' * (cfg.serve.replicas > 1)}"
        print(f"{name} at {url} ({count}, starting; stop with Ctrl-C)", flush=True)

    command = [sys.executable, "-m", "internjax.experiments.serve_replica"]
    run_replicas(cfg.serve, command, whole, on_ready=ready)


def log_to_terminal(who: str = "") -> None:
    """Sends the log to the terminal; a request's line is JSON and nothing else.

    Args:
      who: stands in every other line; "" for a process that is alone.
    """
    _write_log("internjax", f"%(asctime)s {who}%(name)s %(message)s")
    _write_log("internjax.requests", "%(message)s")


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
