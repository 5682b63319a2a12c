"""What evaluation and agents ask of a language model, whoever answers: our engine or a server.

Text in, text and log-probabilities out; no tokenizer, array or device appears here. The protocol is
implemented by `internjax.serve.local.LocalLM` and `internjax.evals.http_lm.HttpLM`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from internjax.data.templates import Message

Prompt = str | list[Message]
"""A str is completed as it stands; a list of messages goes through the model's chat template."""

Progress = Callable[[int, int], None]
"""Called with (requests done, requests in all) while a long call runs."""


class RequestFailed(RuntimeError):
    """A model gave no answer (server down, time-out, refused): to be asked again, never scored."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token, in the vocabulary of the OpenAI and vLLM servers.

    Attributes:
        max_tokens: most tokens to generate, > 0.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this, in (0, 1].
        min_p: drop tokens less likely than this share of the likeliest one, in [0, 1).
        typical_p: of what is left, keep the tokens whose surprise is nearest to the expected one,
            up to this share of the probability, in (0, 1]; 1 keeps all (arXiv:2202.00666).
        seed: of this request's randomness; None lets the engine draw one.
        stop: strings that end the text; none of them is part of it.
        stop_token_ids: tokens that end the text as the end token does, also under `ignore_eos`.
        min_tokens: no end token, stop token or stop string ends the text before so many tokens.
        bad_words: may not be written as the tokenizer spells them, at a line's start or after a
            space; a spelling by other tokens is not seen.
        repetition_penalty: > 1 makes every token already seen less likely (arXiv:1909.05858).
        presence_penalty: subtracted once from the logit of a token generated before.
        frequency_penalty: subtracted from the logit for each time the token was generated.
        logit_bias: added to logits, by token id.
        logprobs: likeliest alternatives to report at each position; None reports nothing.
        ignore_eos: generate `max_tokens` whatever comes; for benchmarks.
        grammar: one of {"json_schema": dict}, {"regex": str}, {"choice": [str]}, {"lark": str}.
        skip_special_tokens: leave special tokens out of the text.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    bad_words: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    grammar: dict | None = None
    skip_special_tokens: bool = True

    def __post_init__(self):
        _within("max_tokens", self.max_tokens, self.max_tokens >= 1, ">= 1")
        _within("temperature", self.temperature, self.temperature >= 0, ">= 0 (0 is greedy)")
        _within("top_k", self.top_k, self.top_k >= 0, ">= 0 (0 keeps all tokens)")
        _within("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _within("min_p", self.min_p, 0 <= self.min_p < 1, "in [0, 1)")
        _within("typical_p", self.typical_p, 0 < self.typical_p <= 1, "in (0, 1]")
        _within(
            "min_tokens",
            self.min_tokens,
            0 <= self.min_tokens <= self.max_tokens,
            f"in 0..max_tokens (here {self.max_tokens})",
        )
        _within(
            "repetition_penalty",
            self.repetition_penalty,
            self.repetition_penalty > 0,
            "> 0",
        )
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"{name}={value!r} is one string: give a tuple, ({value!r},).")
        if self.min_tokens and self.grammar:
            raise ValueError("min_tokens: a grammar says itself when its text ends; give one.")


def _within(name: str, value: float, legal: bool, rule: str) -> None:
    if not legal:
        raise ValueError(f"{name}={value} is not legal: it must be {rule}.")


@dataclass(frozen=True)
class TokenLogprob:
    """One generated token with its log-probability (nats) and its likeliest rivals."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Generation:
    """One finished answer.

    Attributes:
        text: what was generated, without stop strings and special tokens.
        token_ids: ids of every generated token; empty when a server does not tell them.
        finish_reason: "stop" (end token or stop string), "length" or "tool_calls".
        prompt_tokens: length of the prompt in tokens.
        logprobs: one entry a generated token if `SamplingParams.logprobs` asked for them.
        completion_tokens: number of generated tokens (also known where the ids are not).
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    completion_tokens: int = 0


@dataclass(frozen=True)
class Loglik:
    """Log-probability of a continuation after its context.

    Attributes:
        sum: nats, over the continuation's tokens.
        num_tokens: tokens of the continuation.
        is_greedy: whether every token was the likeliest one at its place.
    """

    sum: float
    num_tokens: int
    is_greedy: bool


@runtime_checkable
class LM(Protocol):
    """A language model that answers batches; results come in the order of the requests."""

    @property
    def name(self) -> str:
        """Published name, or a name that tells two models' weights apart: it keys cached scores."""
        ...

    def loglikelihood(
        self, pairs: Sequence[tuple[str, str]], progress: Progress | None = None
    ) -> list[Loglik]:
        """Scores each continuation after its context (both raw text, no chat template).

        The boundary is that of lm-evaluation-harness: white space that ends the context counts to
        the continuation, whose tokens are those of the whole text beyond as many as encode the
        context alone.
        """
        ...

    def loglikelihood_rolling(
        self, texts: Sequence[str], progress: Progress | None = None
    ) -> list[float]:
        """Log-likelihood (nats, <= 0) of each whole text, its first token after BOS (or EOS)."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        progress: Progress | None = None,
    ) -> list[Generation]:
        """Completes raw prompts, answers chats."""
        ...

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """Yields the answer's text piece by piece; joined it equals `generate`'s text."""
        ...
