"""`LocalLM`: the LM protocol over a model in this process."""

import functools
import hashlib
import queue
from collections.abc import Generator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from internjax.data.chat import encode_prompt
from internjax.errors import UserError
from internjax.models.lm import (
    Generation,
    Loglik,
    Progress,
    Prompt,
    SamplingParams,
    TokenLogprob,
)
from internjax.models.load import Model
from internjax.serve.engine import Engine, EngineConfig
from internjax.serve.scheduler import Delta, IdLogprob, Request
from internjax.serve.score import score_pairs
from internjax.tree import Params


class LocalLM:
    """A model that scores and generates here. Not for several threads at once: that is a server.

    Law: what it generates is what the server generates, it is the same engine.
    """

    def __init__(self, model: Model, config: EngineConfig | None = None, *, name: str = ""):
        """Wraps a model; the engine's slots are allocated at the first generation.

        Args:
          name: keys cached scores; "" makes one of the config's name and the weights' fingerprint.
        """
        self.model = model
        self.config = config or EngineConfig()
        self._name = name

    @functools.cached_property
    def name(self) -> str:
        """The given name, or one that tells two models' weights apart."""
        return self._name or f"{self.model.cfg.name}@{fingerprint(self.model.params)}"

    @functools.cached_property
    def engine(self) -> Engine:
        """The engine, made when first asked for."""
        return Engine(self.model, self.config)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, progress: Progress | None = None
    ) -> list[Generation]:
        """Completes raw prompts (str), answers chats (lists of messages).

        Raises:
          UserError: a prompt does not fit, or a generation failed.
        """
        jobs = [(self.encode(prompt), isinstance(prompt, str)) for prompt in prompts]
        results: list[Generation | None] = [None] * len(jobs)
        waiting, running, done = list(range(len(jobs)))[::-1], 0, 0
        texts: dict[int, list[Delta]] = {}
        requests: dict[int, Request] = {}
        try:
            while waiting or running:
                while waiting and running < 2 * self.config.slots:
                    index = waiting.pop()
                    ids, continues = jobs[index]
                    texts[index] = []
                    requests[index] = self.engine.submit(
                        ids, params, texts[index].append, continues=continues
                    )
                    running += 1
                self.engine.step()
                for index in [i for i, r in requests.items() if r.finish_reason]:
                    request = requests.pop(index)
                    results[index] = self.generation(request, texts.pop(index))
                    running, done = running - 1, done + 1
                    if progress:
                        progress(done, len(jobs))
        finally:
            self._abandon(requests.values())
        return results

    def stream(self, prompt: Prompt, params: SamplingParams) -> Generator[str, None, Request]:
        """Yields the answer's text piece by piece; returns the finished request."""
        news: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        request = self.engine.submit(
            self.encode(prompt), params, news.put, continues=isinstance(prompt, str)
        )
        try:
            while request.finish_reason is None or not news.empty():
                if news.empty():
                    self.engine.step()
                    continue
                delta = news.get()
                raise_failed(delta)
                if delta.text:
                    yield delta.text
            return request
        finally:
            self._abandon([request])

    def loglikelihood(
        self, pairs: Sequence[tuple[str, str]], progress: Progress | None = None
    ) -> list[Loglik]:
        """Scores each continuation after its context; texts that are too long lose their head."""
        encoded = [self._fit(*self._encode_pair(*pair)) for pair in pairs]
        scores = score_pairs(self._plain_params, self.model.cfg, encoded, progress)
        return [Loglik(float(x.sum(dtype=np.float64)), len(x), greedy) for x, greedy in scores]

    def loglikelihood_rolling(
        self, texts: Sequence[str], progress: Progress | None = None
    ) -> list[float]:
        """Returns the log-likelihood (nats, <= 0) of each whole text.

        A text longer than the context is cut as lm-eval cuts it: windows of full length with one
        token of overlap, the last one reaching back as far as it may.
        """
        windows, owner = [], []
        for index, text in enumerate(texts):
            ids = self.model.tokenizer.encode(text)
            for window in rolling_windows(ids, self._first_id, self._limit):
                windows.append(window)
                owner.append(index)
        sums = [0.0] * len(texts)
        scores = score_pairs(self._plain_params, self.model.cfg, windows, progress)
        for index, (logprobs, _) in zip(owner, scores, strict=True):
            sums[index] += float(logprobs.sum(dtype=np.float64))
        return sums

    def encode(self, prompt: Prompt) -> list[int]:
        """Returns the ids of a raw prompt or of a chat up to where its answer begins."""
        tokenizer = self.model.tokenizer
        if isinstance(prompt, str):
            return tokenizer.encode(prompt, bos=tokenizer.adds_bos)
        return encode_prompt(tokenizer, self.model.template, prompt)

    @property
    def _limit(self) -> int:
        """Longest text that is scored in one piece."""
        return min(self.model.cfg.max_context, 2048)

    @property
    def _first_id(self) -> int:
        """What stands before a text that has no context: BOS, else EOS (as in lm-eval)."""
        tokenizer = self.model.tokenizer
        first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if first is None:
            raise UserError("this vocabulary has neither BOS nor EOS: scoring needs a context.")
        return first

    @functools.cached_property
    def _plain_params(self) -> Params:
        """The stacked tree: scanned layers compile fast, and batches hide the copies."""
        return self.model.params

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        tokenizer = self.model.tokenizer
        if not continuation:
            raise UserError("loglikelihood: an empty continuation has no score.")
        bos = tokenizer.adds_bos
        if not context:
            return [self._first_id], tokenizer.encode(continuation)
        trimmed = context.rstrip()
        continuation = context[len(trimmed) :] + continuation
        head = tokenizer.encode(trimmed, bos=bos)
        whole = tokenizer.encode(trimmed + continuation, bos=bos)
        if not head:  # a context of blanks only
            return [self._first_id], whole
        return head, whole[len(head) :]

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Drops the head of the context so that all but the last token fit the model."""
        room = self._limit + 1 - len(continuation)
        if room < 1:
            raise UserError(
                f"loglikelihood: the continuation has {len(continuation)} tokens but the context "
                f"holds {self._limit}."
            )
        return context[-room:], continuation

    def generation(self, request: Request, news: list[Delta]) -> Generation:
        """Sums up the news of a request that has ended."""
        raise_failed(news[-1])
        logprobs = None
        if request.params.logprobs is not None:
            logprobs = tuple(self._named(x) for delta in news for x in delta.logprobs)
        return Generation(
            text="".join(delta.text for delta in news),
            token_ids=tuple(request.output),
            finish_reason=request.finish_reason,
            prompt_tokens=len(request.prompt),
            logprobs=logprobs,
            completion_tokens=len(request.output),
        )

    def _named(self, entry: IdLogprob) -> TokenLogprob:
        name = lambda i: self.model.tokenizer.token_bytes(i).decode(errors="replace")  # noqa: E731
        top = tuple((name(i), logprob) for i, logprob in entry.top)
        return TokenLogprob(name(entry.id), entry.logprob, top)

    def _abandon(self, requests) -> None:
        for request in requests:
            self.engine.cancel(request)
        while self.engine.step():
            pass


def rolling_windows(
    ids: Sequence[int], first: int, limit: int
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Cuts a text into (context, continuation) pairs that score every token exactly once.

    Args:
      first: id before the text; limit: tokens that one window may feed.
    """
    if not ids:
        return []
    windows = [([first], ids[:limit])]
    done = len(windows[0][1])
    while done < len(ids):
        end = min(done + limit, len(ids))
        windows.append((ids[max(0, end - limit - 1) : done], ids[done:end]))
        done = end
    return windows


def fingerprint(params: Params) -> str:
    """Returns 12 hex digits that differ for different weights: moments of every array."""

    @jax.jit
    def moments(leaves):
        wide = [jnp.ravel(x).astype(jnp.float32) for x in leaves]
        # The third moment weighs places: it tells two orders of the same numbers apart.
        places = [jnp.cos(jnp.arange(x.size, dtype=jnp.float32)) for x in wide]
        pairs = zip(wide, places, strict=True)
        return [jnp.stack([x.sum(), jnp.vdot(x, x), jnp.vdot(x, p)]) for x, p in pairs]

    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    digest = hashlib.sha256(repr(paths).encode())
    for values in moments(jax.tree.leaves(params)):
        digest.update(np.asarray(values).tobytes())
    return digest.hexdigest()[:12]


def raise_failed(delta: Delta) -> None:
    """Raises UserError for news that a request has failed."""
    if delta.finish_reason == "error":
        raise UserError(f"generation failed: {delta.error}.")
