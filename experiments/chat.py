"""Talks with a model in the terminal: answers stream, the chat goes on until Ctrl-D or /exit.

internjax chat smollm2-135m-instruct
internjax chat smollm2-135m-instruct prompt="What is the capital of France?"
internjax chat url=http://127.0.0.1:8000/v1
"""

import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console

from internjax.agents.policies import make_policy
from internjax.agents.tools import make_tools
from internjax.chat.source import Params, Remote, Source
from internjax.chat.talk import Talk
from internjax.chat.terminal import answer, converse
from internjax.errors import UserError
from internjax.experiments.compilation_cache import enable_compilation_cache
from internjax.experiments.config import build


@dataclass(frozen=True)
class ChatConfig:
    """Each key is explained in configs/chat.yaml."""

    model: str = ""
    prompt: str = ""
    url: str = ""
    api_key: str = "none"
    adapter: str = ""
    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int | None = None
    seed: int | None = None
    tools: tuple[str, ...] = ()
    policy: str = "react"
    history: str = "~/.local/state/internjax/chat_history"
    context: int = 0
    activations: str = "int8"
    dtype: str = "float32"


@hydra.main(config_path="../configs", config_name="chat", version_base=None)
def main(raw: DictConfig) -> None:
    """Answers one prompt, or converses."""
    cfg = build(ChatConfig, raw)
    params = Params(cfg.temperature, cfg.top_p, cfg.max_tokens, cfg.seed)
    make_tools(cfg.tools)  # an unknown name, or no sandbox: said before a model loads
    make_policy(cfg.policy)
    with contextlib.closing(Remote(cfg.url, cfg.api_key) if cfg.url else local(cfg)) as source:
        name = cfg.adapter or (cfg.url and cfg.model)
        talk = Talk(source.choose(name or source.models()[0]), cfg.system, (), params, cfg.tools)
        console = Console(highlight=False)
        if cfg.prompt:
            answer(source, talk, cfg.prompt, console, policy=cfg.policy)
        else:
            history = Path(cfg.history).expanduser() if cfg.history else None
            converse(source, talk, console, policy=cfg.policy, history=history)


def local(cfg: ChatConfig) -> Source:
    """The model that `cfg` names, loaded here."""
    if not cfg.model:
        raise UserError("chat needs a model: internjax chat MODEL, or internjax chat url=URL.")
    enable_compilation_cache()

    from internjax.chat.local import Local
    from internjax.models.load import Model, load
    from internjax.serve.engine import EngineConfig

    def adapt(model: Model, folder: Path) -> Model:
        from internjax.adapt.lora import attach
        from internjax.models.peft import load_adapter

        return replace(model, params=attach(model.params, *load_adapter(folder, model.cfg)))

    # One slot: a single stream decodes at the speed of matrix-vector products.
    engine = EngineConfig(slots=1, context=cfg.context, activations=cfg.activations)
    return Local(load(cfg.model, dtype=cfg.dtype, packed=True), adapt, engine)


if __name__ == "__main__":  # the same program as `internjax chat`
    from internjax.cli import run

    sys.exit(run(["chat", *sys.argv[1:]]))
