"""What the routes share: the engine, the tokenizer, the limits, the names that are served."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

from internjax.data.templates import ChatTemplate
from internjax.data.tokenizer import Tokenizer
from internjax.serve.http.errors import ApiError
from internjax.serve.http.limits import Limits
from internjax.serve.http.memory import Memory
from internjax.serve.keys import Keys
from internjax.serve.metrics import Metrics
from internjax.serve.thread import EngineThread


@dataclass(frozen=True)
class Served:
    """A name that clients may ask for; `adapter` is "" for the model itself."""

    name: str
    adapter: str = ""
    created: int = 0


class Models:
    """The names that are served: the model's own, and one an adapter."""

    def __init__(self, base: str):
        self._served = {base: Served(base, created=int(time.time()))}
        self.base = base

    def add(self, name: str, adapter: str) -> None:
        """Serves an adapter under a name.

        Raises:
          ApiError: the name is taken.
        """
        self.check_new(name)
        self._served[name] = Served(name, adapter, int(time.time()))

    def check_new(self, name: str) -> None:
        """Raises `ApiError` for a name that is taken."""
        if name in self._served:
            raise ApiError(400, f"a model named {name!r} is served already.", param="lora_name")

    def remove(self, name: str) -> Served:
        """Stops serving an adapter; returns what was served.

        Raises:
          ApiError: it is not there, or it is the model itself.
        """
        served = self.find(name)
        if not served.adapter:
            raise ApiError(400, f"{name!r} is the model itself: only adapters can be unloaded.")
        return self._served.pop(name)

    def find(self, name: str) -> Served:
        """Returns what a name stands for.

        Raises:
          ApiError: 404, with the names that are there.
        """
        if name not in self._served:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; served: {', '.join(self._served)}.",
                code="model_not_found",
                param="model",
            )
        return self._served[name]

    def cards(self, context: int) -> list[dict]:
        """Every name as `/v1/models` shows it."""
        return [self.card(name, context) for name in self._served]

    def card(self, name: str, context: int) -> dict:
        """One name as `/v1/models` shows it; an adapter names its model as its parent."""
        served = self.find(name)
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "internjax",
            "root": self.base,
            "parent": self.base if served.adapter else None,
            "max_model_len": context,
        }


@dataclass
class Aside:
    """The line of those who want something computed beside the engine's steps."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0


@dataclass(frozen=True)
class Service:
    """What the routes need.

    Fields:
      keys: who may ask; limits: how much.
      sessions, responses: conversations that the server keeps for its clients.
      aside: the line of what is computed beside the engine's steps.
      adapters_dir: where adapters that clients load must lie; None: they load none.
      max_body_bytes: of one request.
      max_request_tokens: prompt and answers of one request together; 0 sets no limit.
      default_max_tokens: length of a chat answer when the request names none.
      log_text: whether prompts and answers are written into the log.
    """

    models: Models
    engine: EngineThread
    tokenizer: Tokenizer
    template: ChatTemplate
    metrics: Metrics
    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    sessions: Memory = field(default_factory=Memory)
    responses: Memory = field(default_factory=Memory)
    aside: Aside = field(default_factory=Aside)
    adapters_dir: Path | None = None
    max_body_bytes: int = 4 << 20
    max_request_tokens: int = 0
    default_max_tokens: int = 512
    log_text: bool = False

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Returns the ids of raw text."""
        return self.tokenizer.encode(text, bos=add_bos and self.tokenizer.adds_bos)
