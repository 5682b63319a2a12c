"""A web page to chat with the models of any OpenAI-compatible server, also two side by side.

internjax ui http://127.0.0.1:8000/v1
internjax ui http://127.0.0.1:8000/v1 http://127.0.0.1:8001/v1
"""

import contextlib
import sys
from dataclasses import dataclass

import hydra
from omegaconf import DictConfig

from internjax.agents.policies import make_policy
from internjax.chat.page_server import PageConfig, run_page
from internjax.chat.source import Remote
from internjax.experiments.config import build, part


@dataclass(frozen=True)
class UiConfig(PageConfig):
    """Whose models, and where the page is; each key is explained in configs/ui.yaml."""

    url: str = "http://127.0.0.1:8000/v1"
    api_key: str = "none"
    policy: str = "react"


@hydra.main(config_path="../configs", config_name="ui", version_base=None)
def main(raw: DictConfig) -> None:
    """Serves the page until Ctrl-C."""
    cfg = build(UiConfig, raw)
    make_policy(cfg.policy)  # an unknown one: said now
    with contextlib.ExitStack() as stack:
        remotes = [Remote(url, cfg.api_key) for url in cfg.url.split()]
        for remote in remotes:
            stack.callback(remote.close)
        run_page(
            list(remotes),
            part(PageConfig, cfg),
            policy=cfg.policy,
            on_ready=lambda page: print(f"page at {page} (stop with Ctrl-C)", flush=True),
        )


if __name__ == "__main__":  # the same program as `internjax ui`
    from internjax.cli import run

    sys.exit(run(["ui", *sys.argv[1:]]))
