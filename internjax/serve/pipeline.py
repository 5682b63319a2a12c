"""`pipeline`: a model as a function of prompts."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from internjax.models.lm import Generation, Message, Progress, Prompt, SamplingParams
from internjax.models.load import Model, load
from internjax.serve.engine import EngineConfig
from internjax.serve.local import LocalLM


class Pipeline:
    """A model as a function: `pipe("Hello")`, `pipe(["a", "b"])`, `pipe.stream("Hello")`.

    A str is a user's message to a chat model; a list of messages is a chat; a list of either is a
    batch. `raw=True` completes text without the chat template.
    """

    def __init__(self, lm: LocalLM, defaults: SamplingParams):
        self.lm, self.defaults = lm, defaults

    def __call__(
        self,
        prompts: str | list[Message] | Sequence[str | list[Message]],
        *,
        raw: bool = False,
        progress: Progress | None = None,
        **sampling,
    ) -> Generation | list[Generation]:
        """Answers one prompt with a `Generation`, a batch with a list of them.

        Args:
          sampling: fields of `SamplingParams` that differ from the defaults.
        """
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))
        batch = [prompts] if single else list(prompts)
        asked = [_as_prompt(prompt, raw) for prompt in batch]
        answers = self.lm.generate(asked, self._params(sampling), progress)
        return answers[0] if single else answers

    def stream(
        self, prompt: str | list[Message], *, raw: bool = False, **sampling
    ) -> Iterator[str]:
        """Yields an answer piece by piece."""
        return self.lm.stream(_as_prompt(prompt, raw), self._params(sampling))

    def _params(self, changes: dict) -> SamplingParams:
        return dataclasses.replace(self.defaults, **changes)


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
