"""Lets a model answer a question with tools, and shows every thought, call and result.

`internjax agent smollm2-135m-instruct "What is 347 + 58?" policy=react tools=[calculator,python]`
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console

from internjax.agents.loop import Budget, Trace, connect, run
from internjax.agents.policies import make_policy
from internjax.agents.show import print_ending, print_step
from internjax.agents.tools import make_tools
from internjax.errors import UserError
from internjax.experiments.config import build


@dataclass(frozen=True)
class AgentConfig:
    """Who answers what and how; each key is explained in configs/agent.yaml."""

    model: str = "smollm2-135m-instruct"
    question: str = ""
    policy: str = "react"
    tools: tuple[str, ...] = ("calculator", "python")
    budget: Budget = field(default_factory=Budget)
    url: str = ""
    api_key: str = "none"
    out: Path | None = None


@hydra.main(config_path="../configs", config_name="agent", version_base=None)
def main(raw: DictConfig) -> None:
    """Asks, shows the steps as they come, and keeps the trace where `out` says."""
    cfg = build(AgentConfig, raw)
    if not cfg.question:
        raise UserError('agent needs a question: internjax agent MODEL "What is 347 + 58?"')
    console = Console()
    with endpoint(cfg) as url:
        trace = answer(cfg, url, console)
    print_ending(console, trace)
    if cfg.out:
        cfg.out.parent.mkdir(parents=True, exist_ok=True)
        trace.save(cfg.out)
        console.print(f"[dim]trace: {cfg.out}[/]")


def answer(cfg: AgentConfig, url: str, console: Console) -> Trace:
    """Runs the agent against the server at `url`."""
    from openai import APIConnectionError, APIStatusError

    try:
        return run(
            connect(url, api_key=cfg.api_key),
            cfg.model,
            cfg.question,
            make_tools(cfg.tools),
            make_policy(cfg.policy),
            budget=cfg.budget,
            on_step=lambda step: print_step(console, step),
        )
    except APIConnectionError as error:
        raise UserError(f"url={url}: no server answers there ({error}).") from error
    except APIStatusError as error:
        raise UserError(f"{url} refused the request: {error.message}") from error


@contextlib.contextmanager
def endpoint(cfg: AgentConfig) -> Iterator[str]:
    """The server at `cfg.url`, or one of our own on loopback while the block runs."""
    if cfg.url:
        yield cfg.url
        return
    from internjax.models.load import load
    from internjax.serve.server import serving

    with serving(load(cfg.model, packed=True), name=cfg.model) as url:
        yield url


if __name__ == "__main__":  # the same program as `internjax agent`
    from internjax.cli import run

    sys.exit(run(["agent", *sys.argv[1:]]))
