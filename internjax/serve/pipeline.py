"""`pipeline`: a model as a function of prompts; `async_pipeline`: the same in an event loop."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

from internjax.models.lm import Generation, Message, Progress, Prompt, SamplingParams
from internjax.models.load import Model, load
from internjax.serve.engine import EngineConfig
from internjax.serve.local import LocalLM, raise_failed
from internjax.serve.thread import EngineThread, Job, Ticket


class Pipeline:
    """A model as a function: `pipe("Hello")`, `pipe(["a", "b"])`, `pipe.stream("Hello")`.

    A str is a user's message to a chat model; a list of messages is a chat; any other iterable of
    either is a batch. `raw=True` completes text without the chat template.
    """

    def __init__(self, lm: LocalLM, defaults: SamplingParams):
        self.lm, self.defaults = lm, defaults

    def __call__(
        self,
        prompts: str | list[Message] | Iterable[str | list[Message]],
        *,
        raw: bool = False,
        progress: Progress | bool | None = None,
        **sampling,
    ) -> Generation | list[Generation]:
        """Answers one prompt with a `Generation`, a batch with a list of them.

        Args:
          progress: True draws a bar for a batch; or a function of (requests done, in all).
          sampling: fields of `SamplingParams` that differ from the defaults.
        """
        batch = [prompts] if isinstance(prompts, str) else list(prompts)
        single = isinstance(prompts, str) or (bool(batch) and isinstance(batch[0], dict))
        asked = [_as_prompt(batch if isinstance(x, dict) else x, raw) for x in batch]
        asked = asked[:1] if single else asked
        with _bar(len(asked)) if progress is True else contextlib.nullcontext(progress) as shown:
            answers = self.lm.generate(asked, self._params(sampling), shown or None)
        return answers[0] if single else answers

    def stream(
        self, prompt: str | list[Message], *, raw: bool = False, **sampling
    ) -> Iterator[str]:
        """Yields an answer piece by piece."""
        return self.lm.stream(_as_prompt(prompt, raw), self._params(sampling))

    def _params(self, changes: dict) -> SamplingParams:
        return dataclasses.replace(self.defaults, **changes)


class AsyncPipeline:
    """A model as a coroutine: `await pipe("Hello")`; calls at the same time share its steps.

    To be used in one event loop, and closed at the end (`async with`).
    """

    def __init__(self, lm: LocalLM, defaults: SamplingParams):
        self.lm, self.defaults = lm, defaults
        self._engine = EngineThread(lm.engine)
        self._room = asyncio.Semaphore(lm.config.max_waiting)  # more wait here, none is refused

    async def __call__(
        self, prompt: str | list[Message], *, raw: bool = False, **sampling
    ) -> Generation:
        """Answers one prompt; a cancelled call frees its slot.

        Args:
          sampling: fields of `SamplingParams` that differ from the defaults.

        Raises:
          UserError: the prompt does not fit, or the generation failed.
        """
        async with self._room:
            ticket = self._submit(prompt, raw, sampling)
            news = [delta async for _, delta in self._engine.follow(ticket)]
            return self.lm.generation(ticket.requests[0], news)

    async def stream(
        self, prompt: str | list[Message], *, raw: bool = False, **sampling
    ) -> AsyncIterator[str]:
        """Yields an answer piece by piece; leaving the loop cancels it."""
        async with self._room:
            ticket = self._submit(prompt, raw, sampling)
            async for _, delta in self._engine.follow(ticket):
                raise_failed(delta)
                if delta.text:
                    yield delta.text

    async def __aenter__(self) -> "AsyncPipeline":
        return self

    async def __aexit__(self, *error) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Ends what runs and the engine's thread."""
        self._engine.close()

    def _submit(self, prompt, raw: bool, changes: dict) -> Ticket:
        asked = _as_prompt(prompt, raw)
        params = dataclasses.replace(self.defaults, **changes)
        job = Job(self.lm.encode(asked), params, continues=isinstance(asked, str))
        return self._engine.submit_all([job], asyncio.get_running_loop())


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Progress]:
    """Draws a bar on standard error while the block runs."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("answers", total=total)
        yield lambda done, _: bar.update(task, completed=done)


def _as_prompt(prompt: str | list[Message], raw: bool) -> Prompt:
    if isinstance(prompt, str) and not raw:
        return [{"role": "user", "content": prompt}]
    return prompt


def pipeline(
    model: str | Path | Model,
    *,
    slots: int = 4,
    context: int = 0,
    kv_dtype: str = "float32",
    **sampling,
) -> Pipeline:
    """Makes a function that answers with a model.

    Args:
      model: a published name, a path, or what `load` returned.
      slots, context, kv_dtype: see `EngineConfig`.
      sampling: defaults of `SamplingParams`, for example `max_tokens=200, temperature=0.7`.
    """
    if not isinstance(model, Model):
        model = load(model)
    config = EngineConfig(slots=slots, context=context, kv_dtype=kv_dtype)
    return Pipeline(LocalLM(model, config), SamplingParams(**sampling))


def async_pipeline(model: str | Path | Model, **options) -> AsyncPipeline:
    """Makes a coroutine function that answers with a model; see `pipeline` for the options."""
    made = pipeline(model, **options)
    return AsyncPipeline(made.lm, made.defaults)
