"""A model in this process as the one who answers a chat."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from internjax.chat.source import MOST_TOKENS, End, Message, Params, Remote, Text
from internjax.models.load import Model
from internjax.serve.engine import EngineConfig
from internjax.serve.local import LocalLM
from internjax.serve.scheduler import Request


class Local:
    """A model in this process; a server of its own starts when agents ask for one.

    Args:
      adapt: attaches the LoRA adapter of a folder to the model.
      engine: its shape; one slot is enough for one person.
    """

    api_key = "none"

    def __init__(self, model: Model, adapt: Callable[[Model, Path], Model], engine: EngineConfig):
        self._base, self._adapt, self._config = model, adapt, engine
        self._lm, self._name = LocalLM(model, self._config), model.cfg.name
        self._remote: Remote | None = None
        self._running = contextlib.ExitStack()

    def models(self) -> list[str]:
        """The model, and it with the adapter that was chosen."""
        return list(dict.fromkeys([self._base.cfg.name, self._name]))

    def choose(self, name: str) -> str:
        """Takes the model's own name, or the folder of a LoRA adapter.

        Raises:
          Missing: no adapter there.
          UserError: it does not fit the model.
        """
        base = self._base.cfg.name
        if name == self._name:
            return name
        model = self._base if name == base else self._adapt(self._base, Path(name).expanduser())
        self.close()
        self._lm, self._name = LocalLM(model, self._config), name
        return name

    def answer(self, model: str, messages: list[Message], params: Params) -> Iterator[Text | End]:
        if self._remote:
            yield from self._remote.answer(model, messages, params)
            return
        start, context = time.perf_counter(), self._lm.engine.context
        length = len(self._lm.encode(messages))
        fits = max(1, min(MOST_TOKENS, context - length))
        sampling = params.sampling(params.max_tokens or fits)
        pieces = self._lm.stream(messages, sampling)
        with contextlib.closing(pieces):
            request = yield from _as_text(pieces)
        seconds = time.perf_counter() - start
        yield End(request.finish_reason, length, len(request.output), seconds)

    def endpoint(self) -> str:
        if self._remote is None:
            from internjax.serve.server import serving

            server = serving(self._lm.model, name=self._name, engine=self._config)
            self._remote = Remote(self._running.enter_context(server))
            self._running.callback(self._remote.close)
        return self._remote.url

    def close(self) -> None:
        self._remote = None
        self._running.close()


def _as_text(pieces: Generator[str, None, Request]) -> Generator[Text, None, Request]:
    """Wraps pieces; returns what their generator returns."""
    try:
        while True:
            yield Text(next(pieces))
    except StopIteration as done:
        return done.value
