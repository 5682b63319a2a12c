"""An `LM` that asks an OpenAI-compatible server, so that what is deployed can be evaluated itself.

Chats go to chat/completions; raw prompts and log-likelihoods to the older completions, which can
echo the prompt with its log-probabilities. Needs the `openai` client (extra `agents`).
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from internjax.errors import Missing, UserError
from internjax.models.lm import (
    Generation,
    Loglik,
    Progress,
    Prompt,
    RequestFailed,
    SamplingParams,
    TokenLogprob,
)

STANDARD = ("max_tokens", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")
EXTRA = (
    "top_k", "min_p", "typical_p", "repetition_penalty", "ignore_eos", "stop_token_ids",
    "min_tokens", "bad_words", "skip_special_tokens",
)  # fmt: skip
"""Sampling options that OpenAI's API does not have; sent only when they differ from the default."""


class HttpLM:
    """One model of one server.

    Args:
        base_url: up to and with `/v1`.
        model: the name the server lists.
        api_key: sent as bearer token.
        name: keys cached scores; a server's address does not tell which weights it serves.
        concurrency: requests in flight at once.
        timeout_seconds, retries: of one request; retries cover refused, overloaded and 5xx answers.
        bos: text the server reads as the token that opens a document; rolling scores need it.
        echo_tokens: tokens to generate where only the echo is wanted; 0 is cheaper where it is
            allowed (our server), 1 works everywhere.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str = "none",
        *,
        name: str | None = None,
        concurrency: int = 8,
        timeout_seconds: float = 600.0,
        retries: int = 3,
        bos: str = "",
        echo_tokens: int = 1,
    ):
        try:
            import openai
        except ImportError:
            raise Missing("Asking a server needs: pip install 'internjax[agents]'") from None
        self.name = name or f"{model}@{base_url}"
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=base_url, api_key=api_key, timeout=timeout_seconds, max_retries=retries
        )
        self._url, self._model = base_url, model
        self._concurrency, self._bos, self._echo_tokens = concurrency, bos, echo_tokens

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, progress: Progress | None = None
    ) -> list[Generation]:
        """Answers all prompts, `concurrency` at a time."""
        return self._all(lambda prompt: self._generate(prompt, params), prompts, progress)

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """Yields the answer as the server sends it."""
        with self._named("stream"):
            for event in self._create(prompt, params, stream=True):
                choice = event.choices[0] if event.choices else None
                piece = choice and (
                    choice.text if isinstance(prompt, str) else choice.delta.content
                )
                if piece:
                    yield piece

    def loglikelihood(
        self, pairs: Sequence[tuple[str, str]], progress: Progress | None = None
    ) -> list[Loglik]:
        """Scores continuations from the echoed log-probabilities of context + continuation.

        White space that ends a context counts to the continuation, and so does a token that lies
        across the boundary.
        """
        return self._all(lambda pair: self._loglik(*pair), pairs, progress)

    def loglikelihood_rolling(
        self, texts: Sequence[str], progress: Progress | None = None
    ) -> list[float]:
        """Nats of whole texts, each opened by `bos`."""
        if not self._bos:
            raise UserError(
                "bits per byte over HTTP need bos= (such as '<|endoftext|>'): a server gives no "
                "log-probability for the first token of a prompt."
            )
        return [s.sum for s in self._all(lambda t: self._loglik(self._bos, t), texts, progress)]

    # ------------------------------------------------------------------------------ one request

    def _generate(self, prompt: Prompt, params: SamplingParams) -> Generation:
        reply = self._create(prompt, params)
        choice = reply.choices[0]
        text = choice.text if isinstance(prompt, str) else choice.message.content
        usage = reply.usage
        return Generation(
            text=text or "",
            token_ids=(),
            finish_reason=choice.finish_reason,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            logprobs=_logprobs(choice.logprobs) if params.logprobs is not None else None,
            completion_tokens=usage.completion_tokens if usage else 0,
        )

    def _create(self, prompt: Prompt, params: SamplingParams, *, stream: bool = False) -> Any:
        options = _options(params, not isinstance(prompt, str)) | {
            "stream": stream,
            "model": self._model,
        }
        if isinstance(prompt, str):
            if params.logprobs is not None:
                options["logprobs"] = params.logprobs
            return self._client.completions.create(prompt=prompt, **options)
        if params.logprobs is not None:
            options |= {"logprobs": True, "top_logprobs": params.logprobs}
        return self._client.chat.completions.create(messages=prompt, **options)

    def _loglik(self, context: str, continuation: str) -> Loglik:
        reply = self._complete(context + continuation, logprobs=1)
        logprobs, length = reply.choices[0].logprobs, reply.usage.prompt_tokens
        if not logprobs or len(logprobs.token_logprobs) < length:
            raise UserError(
                f"{self._url} does not echo the prompt's log-probabilities, so it cannot score "
                "choices: use generation tasks, or a server whose completions support echo."
            )
        before = context.rstrip()
        start = _split(logprobs.tokens[:length], before, context + continuation)
        if start is None:
            start = self._complete(before).usage.prompt_tokens
        return _added(logprobs, start, length)

    def _complete(self, prompt: str, **options: Any) -> Any:
        return self._client.completions.create(
            model=self._model,
            prompt=prompt,
            max_tokens=self._echo_tokens,
            temperature=0.0,
            echo=True,
            **options,
        )

    def _all(self, ask: Callable, requests: Sequence, progress: Progress | None) -> list:
        """Runs `ask` over all requests, in order of the requests; the first failure is raised."""

        def one(numbered: tuple[int, Any]) -> Any:
            index, request = numbered
            with self._named(f"request {index + 1} of {len(requests)}"):
                return ask(request)

        results = []
        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                for result in pool.map(one, enumerate(requests)):
                    results.append(result)
                    if progress:
                        progress(len(results), len(requests))
            except (RequestFailed, UserError):
                pool.shutdown(cancel_futures=True)
                raise
        return results

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Turns the client's errors into ours: what failed, where, and whether to ask again."""
        openai = self._openai
        try:
            yield
        except openai.APITimeoutError:
            raise RequestFailed(f"{what} to {self._url} timed out") from None
        except openai.APIConnectionError:
            raise Missing(f"No server answers at {self._url}: is it running?") from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise UserError(f"{self._url} refuses the key: {error}") from None
        except openai.NotFoundError as error:
            raise Missing(f"{self._url} has no model {self._model!r}: {error}") from None
        except openai.OpenAIError as error:
            raise RequestFailed(f"{what} to {self._url} failed: {error}") from None


def _options(params: SamplingParams, chat: bool) -> dict[str, Any]:
    """Sampling parameters in the words of the OpenAI API, common extensions and ours in extra_body.

    A JSON schema of a chat is OpenAI's response_format; other grammars are our server's `grammar`.
    """
    options: dict[str, Any] = {key: getattr(params, key) for key in STANDARD}
    options["stop"] = list(params.stop) or None
    if params.logit_bias:
        options["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    plain = SamplingParams()
    extra = {k: getattr(params, k) for k in EXTRA if getattr(params, k) != getattr(plain, k)}
    if params.grammar and not (chat and "json_schema" in params.grammar):
        extra["grammar"] = params.grammar
    elif params.grammar:
        schema = {"name": "answer", "schema": params.grammar["json_schema"], "strict": True}
        options["response_format"] = {"type": "json_schema", "json_schema": schema}
    if extra:
        options["extra_body"] = extra
    return {key: value for key, value in options.items() if value is not None}


def _split(tokens: Sequence[str], before: str, whole: str) -> int | None:
    """Index of the first token that reaches beyond `before`.

    None where the tokens' texts do not join to the prompt, as with a token that is part of a letter
    or an opening token the server adds: then the tokens have to be counted.
    """
    if "".join(tokens) != whole:
        return None
    end = 0
    for index, token in enumerate(tokens):
        end += len(token)
        if end > len(before):
            return index
    return len(tokens)


def _added(logprobs: Any, start: int, stop: int) -> Loglik:
    values = logprobs.token_logprobs[start:stop]
    if None in values:
        raise UserError("A prompt's first token has no log-probability: give a context or bos=.")
    bests = [max(top.values()) for top in logprobs.top_logprobs[start:stop]]
    return Loglik(sum(values), len(values), all(map(operator.ge, values, bests)))


def _logprobs(reply: Any) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of an answer, from either form of the API."""
    if reply is None:
        return ()
    if getattr(reply, "content", None) is not None:
        return tuple(
            TokenLogprob(t.token, t.logprob, tuple((r.token, r.logprob) for r in t.top_logprobs))
            for t in reply.content
        )
    tops = reply.top_logprobs or [{}] * len(reply.tokens)
    return tuple(
        TokenLogprob(token, value, tuple((top or {}).items()))
        for token, value, top in zip(reply.tokens, reply.token_logprobs, tops, strict=True)
    )
