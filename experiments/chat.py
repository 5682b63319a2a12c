"""Talks with a model in the terminal: answers stream, the chat goes on until Ctrl-D or /quit.

internjax chat smollm2-135m-instruct
internjax chat smollm2-135m-instruct prompt="What is the capital of France?"
"""

import sys
from dataclasses import dataclass

import hydra
from omegaconf import DictConfig
from rich.console import Console

from internjax.errors import UserError
from internjax.experiments.compilation_cache import enable_compilation_cache
from internjax.experiments.config import build
from internjax.models.lm import SamplingParams


@dataclass(frozen=True)
class ChatConfig:
    """Each key is explained in configs/chat.yaml."""

    model: str
    prompt: str = ""
    system: str = ""
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    context: int = 0
    dtype: str = "float32"


@hydra.main(config_path="../configs", config_name="chat", version_base=None)
def main(raw: DictConfig) -> None:
    """Answers one prompt, or converses."""
    cfg = build(ChatConfig, raw)
    params = SamplingParams(
        max_tokens=cfg.max_tokens, temperature=cfg.temperature, top_p=cfg.top_p, seed=cfg.seed
    )
    enable_compilation_cache()

    from internjax.models.load import load
    from internjax.serve.engine import EngineConfig
    from internjax.serve.local import LocalLM

    # One slot: a single stream decodes at the speed of matrix-vector products.
    model = load(cfg.model, dtype=cfg.dtype, packed=True)
    lm = LocalLM(model, EngineConfig(slots=1, context=cfg.context))
    history = [{"role": "system", "content": cfg.system}] if cfg.system else []
    console = Console(highlight=False)
    if cfg.prompt:
        answer(lm, console, [*history, {"role": "user", "content": cfg.prompt}], params)
    else:
        converse(lm, console, history, params)


def converse(lm, console: Console, history: list[dict], params: SamplingParams) -> None:
    """Reads lines until the end of input; `/clear` forgets the chat, Ctrl-C ends an answer."""
    console.print("[dim]/clear forgets, /quit or Ctrl-D ends, Ctrl-C stops an answer[/]")
    system = list(history)
    while True:
        line = read_line(console)
        if line is None or line == "/quit":
            return
        if line == "/clear":
            history = list(system)
        elif line:
            asked = [*history, {"role": "user", "content": line}]
            try:
                text = answer(lm, console, asked, params)
            except UserError as error:  # too long, for example: the chat so far stays
                console.print(f"error: {error}", markup=False)
                continue
            history = [*asked, {"role": "assistant", "content": text}]


def read_line(console: Console) -> str | None:
    """Returns the next line, "" after Ctrl-C, None at the end of input."""
    try:
        return console.input("[bold cyan]you>[/] " if sys.stdin.isatty() else "").strip()
    except EOFError:
        console.print()
        return None
    except KeyboardInterrupt:
        console.print()
        return ""


def answer(lm, console: Console, messages: list[dict], params: SamplingParams) -> str:
    """Prints an answer as it grows; Ctrl-C keeps what has come so far."""
    text = ""
    room = lm.engine.context - len(lm.encode(messages))
    if 0 < room < params.max_tokens:
        params = SamplingParams(**{**vars(params), "max_tokens": room})
    pieces = lm.stream(messages, params)
    try:
        for piece in pieces:
            text += piece
            console.print(piece, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    finally:
        pieces.close()
    console.print()
    return text


if __name__ == "__main__":  # the same program as `internjax chat`
    from internjax.cli import run

    sys.exit(run(["chat", *sys.argv[1:]]))
