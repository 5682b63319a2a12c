"""Who answers a chat: what that is, and an OpenAI-compatible server as one (`local` is the other).

Both stream `Text` and close with one `End`. Knows nothing of screens and histories, nor of JAX.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from internjax.agents.loop import connect
from internjax.errors import Missing, UserError
from internjax.models.lm import SamplingParams

Message = dict[str, Any]
MOST_TOKENS = 512
"""Of an answer whose length nobody chose, here as on our server."""


@dataclass(frozen=True)
class Params:
    """How answers are drawn; what every OpenAI-compatible server understands.

    Fields:
      temperature: 0 takes the likeliest token; top_p: share of the probability mass, in (0, 1].
      max_tokens: of one answer, refused where the context has no room; None: what fits, at most 512
        (of a stranger's server: its own default).
      seed: of the randomness; None draws one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int | None = None
    seed: int | None = None

    def __post_init__(self):
        try:
            self.sampling(1 if self.max_tokens is None else self.max_tokens)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error

    def sampling(self, max_tokens: int) -> SamplingParams:
        """The engine's form."""
        return SamplingParams(**{**asdict(self), "max_tokens": max_tokens})

    def fields(self) -> dict[str, Any]:
        """The API's form."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class End:
    """How an answer ended.

    Fields:
      reason: "stop", "length", or what an agent ran out of.
      prompt_tokens, completion_tokens: None where a server does not count.
    """

    reason: str
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float

    def __str__(self) -> str:
        counts = (self.prompt_tokens, self.completion_tokens)
        tokens = "" if None in counts else f"{counts[0]} + {counts[1]} tokens, "
        cut = "" if self.reason == "stop" else f", ended by {self.reason}"
        return f"{tokens}{self.seconds:.1f} s{cut}"


@runtime_checkable
class Source(Protocol):
    """Answers chats."""

    api_key: str

    def models(self) -> list[str]:
        """What can be chosen."""
        ...

    def choose(self, name: str) -> str:
        """Makes a model or an adapter ready; returns the name under which it is asked."""
        ...

    def answer(self, model: str, messages: list[Message], params: Params) -> Iterator[Text | End]:
        """Streams an answer; closing the iterator ends it on the server, too."""
        ...

    def endpoint(self) -> str:
        """The address at which agents may ask the same model."""
        ...

    def close(self) -> None:
        """Ends what runs."""
        ...


class Remote:
    """An OpenAI-compatible server; adapters are models of its list."""

    def __init__(self, url: str, api_key: str = "none"):
        self.url, self.api_key = url.rstrip("/"), api_key
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"url={url}: give it whole, such as http://127.0.0.1:8000/v1.")
        self._client = connect(self.url, api_key=api_key)

    def models(self) -> list[str]:
        """The names that the server lists.

        Raises:
          Missing: no server answers.
        """
        with explained(self.url):
            return [card.id for card in self._client.models.list().data]

    def choose(self, name: str) -> str:
        """Raises UserError for a name that the server does not list."""
        names = self.models()
        if name not in names:
            raise UserError(f"{self.url} serves no {name!r}; it has {', '.join(names)}.")
        return name

    def answer(self, model: str, messages: list[Message], params: Params) -> Iterator[Text | End]:
        start, reason, usage = time.perf_counter(), "", None
        with explained(self.url), self._stream(model, messages, params) as chunks:
            for chunk in chunks:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    if choice.delta.content:
                        yield Text(choice.delta.content)
                    reason = choice.finish_reason or reason
        if not reason:
            raise UserError(f"{self.url} ended its stream without ending the answer.")
        counts = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
        yield End(reason, *counts, time.perf_counter() - start)

    def endpoint(self) -> str:
        return self.url

    def close(self) -> None:
        self._client.close()

    def _stream(self, model: str, messages: list[Message], params: Params):
        return self._client.chat.completions.create(
            model=model,
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            **params.fields(),
        )


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns what the openai client says against a request into one line for the user."""
    import openai

    try:
        yield
    except openai.APITimeoutError as error:
        raise UserError(f"{url} took too long to answer.") from error
    except openai.APIConnectionError as error:
        raise Missing(f"{url} does not answer: is the server running?") from error
    except openai.APIStatusError as error:
        said = error.body.get("message") if isinstance(error.body, dict) else None
        raise UserError(f"{url} refused ({error.status_code}): {said or error.message}") from error
    except openai.APIError as error:  # told within a stream
        raise UserError(f"{url} broke off: {error.message}") from error
