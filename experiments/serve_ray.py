"""Replicas of a server on a Ray cluster.

    serve run internjax.experiments.serve_ray:application model=MODEL serve.replicas=4

The keys are those of `internjax serve`. `serve.replicas` is the number of Ray's replicas; Ray
starts, watches and replaces them and spreads requests. Address and draining are Ray's own. Each
replica takes the CPUs and GPUs that `cpus=` and `gpus=` say, by default 1 and 0.
"""

import uuid
from collections.abc import Mapping
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from internjax.errors import Missing, UserError
from internjax.experiments.config import build
from internjax.serve.replicas.relay import respond

# Ray's proxy has these; a replica does not listen by itself.
_RAYS_OWN = ("serve.host", "serve.port", "serve.drain_seconds", "serve.router")


def application(args: Mapping[str, Any]):
    """Returns the Ray Serve application for the words of `serve run`, or of `args:` in its YAML.

    Raises:
      UserError: a key that is unknown, or that is Ray's business.
      Missing: the extra `ray` is not installed.
    """
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise Missing(f"This needs {error.name}: pip install 'internjax[serve,ray]'") from error

    given = {str(key): value for key, value in args.items()}
    cpus, gpus = float(given.pop("cpus", 1)), float(given.pop("gpus", 0))
    for key in given:
        if key.startswith(_RAYS_OWN):
            raise UserError(f"{key}: Ray listens, routes and drains; set it in Ray's own config.")
    config = compose_config(given)
    replicas = config["serve"]["replicas"] or 1
    config["serve"]["replicas"] = 0
    engine = config["serve"]["engine"]
    deployment = serve.deployment(
        serve.ingress()(_Replica),
        name="internjax",
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        # The engine's own queue is bounded and answers 429: let requests reach it.
        max_ongoing_requests=engine["slots"] + engine["max_waiting"],
    )
    return deployment.bind(config, alone=replicas == 1)


def compose_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of `internjax serve` with some keys changed, as plain values."""
    with initialize_config_module("internjax.configs", version_base=None):
        raw = compose("serve", [f"{key}={value}" for key, value in given.items()])
    return OmegaConf.to_container(raw, resolve=True)


class _Replica:
    """One of Ray's replicas: loads the model and answers with the same application as ever."""

    def __init__(self, config: dict[str, Any], alone: bool):
        from internjax.experiments.compilation_cache import enable_compilation_cache
        from internjax.experiments.serve_model import ServeRun, load_served
        from internjax.serve.server import build_app

        enable_compilation_cache()
        model, serve = load_served(build(ServeRun, config))
        self._app, self._engine = build_app(model, serve)
        self._alone = alone

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica that raises."""
        if self._engine.lost:
            raise RuntimeError(self._engine.reason)

    def __serve_build_asgi_app__(self):
        """Called by Ray, which serves what this returns."""
        return self._app if self._alone else without_sessions(self._app)

    def __del__(self):
        self._engine.close()


def without_sessions(app):
    """Refuses what needs one memory: the next turn of a session may reach another replica."""

    async def refusing(scope, receive, send) -> None:
        if scope["type"] == "http" and scope["path"] == "/v1/chat/interactive":
            message = (
                "sessions live in the memory of one replica, and Ray may send the next turn to "
                "another: send the whole conversation to /v1/chat/completions."
            )
            await respond(send, 400, message, f"req-{uuid.uuid4().hex}", code="no_sessions")
        else:
            await app(scope, receive, send)

    return refusing
