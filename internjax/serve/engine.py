"""Continuous batching: the host admits, dispatches and reads; the device state never leaves.

`Engine.step` is one round: admit waiting requests, prefill a few pieces of prompts, dispatch one
decoding step for all slots, then read the tokens of the step before, so that the device computes
while the host turns ids into text. A slot under a grammar needs its last token before its next
mask, so its presence makes the round read first. Knows nothing of HTTP, chats or threads.
"""

import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from internjax.models import rope
from internjax.models.lm import SamplingParams
from internjax.models.load import Model
from internjax.serve.adapters import Adapters
from internjax.serve.bans import request_bans
from internjax.serve.blocks import BlockPool, salt_of
from internjax.serve.budget import count_blocks, fit_context
from internjax.serve.checks import check_prompt, check_request
from internjax.serve.chosen import Chosen
from internjax.serve.config import EngineConfig, EngineStats
from internjax.serve.drafts import DraftModel, PromptLookup, check_draft, may_guess
from internjax.serve.grammar import GrammarFailed, Grammars
from internjax.serve.prepare import prepare_params
from internjax.serve.programs import Piece, Programs
from internjax.serve.sampling import Sampled, slot_row
from internjax.serve.scheduler import Delta, IdLogprob, Request, Scheduler
from internjax.serve.tensor import lay_out, make_tensor_mesh
from internjax.serve.text import TextStream
from internjax.tree import Params


class Engine:
    """One model and its slots.

    The first part's methods may be called from any thread, the others from the engine's own.
    """

    def __init__(
        self, model: Model, config: EngineConfig | None = None, *, draft: Model | None = None
    ):
        """Allocates the cache and readies the weights.

        Args:
          draft: a smaller model of the same vocabulary, whose guesses `speculate` checks.

        Raises:
          UserError: settings that do not fit the model, or a draft of another vocabulary.
        """
        config = config or EngineConfig()
        self.config, self.cfg, self.tokenizer = config, model.cfg, model.tokenizer
        self.context = fit_context(config, model.cfg)
        self._mesh = make_tensor_mesh(config.tensor)
        self.work = threading.Condition()
        used = lambda: {r.adapter for r in self.scheduler.all()}  # noqa: E731
        base = self._prepared(model.params)
        self.adapters = Adapters(model.cfg, config, base, self.work, used)
        pool = BlockPool(count_blocks(config, model.cfg, self.context))
        self.scheduler = Scheduler(config.slots, config.max_waiting, pool, config.block)
        self.stats = EngineStats(blocks=pool.total)
        self.grammars = Grammars(model.tokenizer, model.cfg.vocab_size)
        self._ids = itertools.count(1)
        self._pending: deque[tuple[Sampled, list[Piece]]] = deque()
        sizes = self.context, pool.total
        self.programs = Programs(self.cfg, config, self.params, *sizes, self.stats)
        self._guesser = None
        if draft is not None and config.speculate:
            check_draft(model, draft)
            self._guesser = DraftModel(draft, config, *sizes, self.stats)

    @property
    def params(self) -> Params:
        """The weights, as the steps compute with them."""
        return self.adapters.params

    # Called from any thread -------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        emit: Callable[[Delta], None],
        *,
        continues: bool = False,
        adapter: str = "",
    ) -> Request:
        """Checks a request and puts it in line.

        Args:
          emit: called in the engine's thread with news of the request; must not block.
          continues: the answer goes on with the prompt's text (keeps the space of its first word).
          adapter: name of a loaded adapter; "" is the model itself.

        Raises:
          UserError: the request cannot be run as it is, whatever the load.
          QueueFull: too many are waiting.
        """
        check_request(prompt, params, self.context, self.cfg.vocab_size)
        request_bans(params, self.tokenizer, len(prompt))  # refuses those that cannot be
        freq = rope.inv_freq(self.cfg, len(prompt) + params.max_tokens).astype(np.float32)
        request = Request(
            id=next(self._ids),
            prompt=tuple(prompt),
            params=params,
            seed=_seed(params),
            emit=emit,
            text=TextStream.of(self.tokenizer, params, prompt[-1] if continues else None),
            matcher=self.grammars.matcher(params.grammar) if params.grammar else None,
            freq=freq,
        )
        with self.work:  # a place must not change its adapter before the request is known
            place = self.adapters.find(adapter)
            request.adapter = place.index
            request.salt = salt_of(freq.tobytes(), self.config.kv_dtype, place.version)
            self.scheduler.add(request)
            self.stats.requests += 1
            self.stats.prompt_tokens += len(prompt)
            self.work.notify()
        return request

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises `UserError` for a prompt that is empty, too long or not of this vocabulary."""
        check_prompt(prompt, self.context, self.cfg.vocab_size)

    def cancel(self, request: Request) -> None:
        """Ends a request at the next round; does nothing to one that has ended."""
        with self.work:
            request.cancelled = True
            self.work.notify()

    def in_flight(self) -> int:
        """Requests that wait or run."""
        with self.work:
            return len(self.scheduler.all())

    # Called from the engine's thread ----------------------------------------------------------

    def step(self) -> bool:
        """Does one round; returns False when there was nothing to do."""
        with self.work:
            self._drop_cancelled()
            self.scheduler.admit()
            running = len(self.scheduler.running())
        self.stats.max_in_flight = max(self.stats.max_in_flight, running)
        if not running and not self._pending:
            return False
        self._prefill_some()
        if constrained := [r for r in self.scheduler.to_decode() if r.matcher]:
            self._read(keep=0)
            self._fill_masks(r for r in constrained if not r.finish_reason)
        if self.config.speculate:
            self._read(keep=0)
        pieces = self._decoding()
        if self.programs.one_way:
            pieces += self._prompts(self.programs.sizes[-1] - sum(len(p.tokens) for p in pieces))
        if pieces:
            self._pending.append((self.programs.step(self.params, pieces), pieces))
            self.stats.steps += 1
        self._read(keep=1 if pieces else 0)
        self._count_blocks()
        return True

    def fail_all(self, error: str) -> None:
        """Ends every running request with an error and starts from empty slots.

        Requests that still wait are not touched: nothing was lost for them.
        """
        self._pending.clear()
        for request in self.scheduler.running():
            self._finish(request, "error", error=error)
        self.scheduler.pool.forget()
        self.programs.reset()
        if self._guesser:
            self._guesser.programs.reset()
        self._count_blocks()

    def set_params(self, params: Params) -> None:
        """Takes other weights for the steps to come, as reinforcement learning hands them over.

        Requests that run go on with them over keys and values of the old ones; what was cached of
        others is forgotten.

        Args:
          params: a tree like the one that the engine was made with.
        """
        base = self._prepared(params)
        with self.work:
            self.adapters.set_base(base)
            self.scheduler.forget()

    def warm_up(self, *, least: bool = False) -> list[str]:
        """Compiles every program ahead of the first request; returns their names.

        Args:
          least: only those that a first short request needs.
        """
        assert not self.in_flight(), "warm_up needs an idle engine"
        asked = (SamplingParams(), SamplingParams(logit_bias={0: 0.0}))[: 1 if least else 2]
        rows = [self._row(params, (0,), (), 0) for params in asked]
        if self._guesser:
            self._guesser.warm_up(rows, least=least)
        if not least:
            self.adapters.warm_up()
        return self.programs.warm_up(self.params, rows, least=least)

    def _prepared(self, params: Params) -> Params:
        return lay_out(prepare_params(params, self.config, self.cfg.dtype), self.cfg, self._mesh)

    def _prefill_some(self) -> None:
        """Prefills the oldest prompts as far as the budgets go; seats those that are complete."""
        tokens, attended = self.config.prefill_tokens, self.config.attend_tokens or 2**62
        full = False  # who came later does not take the blocks that an older one waits for
        for request in self.scheduler.to_seat():
            if not request.blocks:
                full = full or not self._start(request)
                if full:
                    continue
            waits = self.programs.one_way  # for `_prompts`
            while request.to_prefill and tokens > 0 and attended > 0 and not waits:
                count, size = self.programs.prefill(self.params, request)
                request.prefilled += count
                self.scheduler.name_full(request, request.prefilled)
                tokens, attended = tokens - size, attended - size * request.prefilled
            if not request.to_prefill:
                self._seat(request)
            if tokens <= 0 or attended <= 0:
                return

    def _start(self, request: Request) -> bool:
        with self.work:
            started = self.scheduler.start(request, reuse=self.config.prefix_cache)
        self.stats.prefix_tokens += request.reused if started else 0
        return started

    def _seat(self, request: Request) -> None:
        row = self._row(request.params, request.prompt, request.output, request.seed)
        self.programs.seat(request.slot, row)
        if self._guesser:
            self._guesser.prefill(request)
        request.seated = True

    def _fill_masks(self, requests: Iterable[Request]) -> None:
        """Asks each grammar for the tokens that may come; one that has no answer fails alone."""
        started = time.perf_counter()
        for request in requests:
            request.mask = np.zeros(-(-self.cfg.vocab_size // 32), np.uint32)
            try:
                request.matcher.fill(request.mask)
            except GrammarFailed as error:
                self._finish(request, "error", error=f"the grammar cannot be followed: {error}")
            self.stats.grammar_tokens += 1
        self.stats.grammar_seconds += time.perf_counter() - started

    def _decoding(self) -> list[Piece]:
        """Returns what the next step runs, every token of it with room in the cache.

        Where blocks run out the youngest request gives its own back.
        """
        for request in self.scheduler.to_decode():
            while request.slot is not None and not self._grow(request):
                if self._pending:  # some may end by what is on its way; all tokens must be known
                    self._read(keep=0)
                    continue
                with self.work:
                    self.scheduler.preempt(self.scheduler.youngest())
                self.stats.preempted += 1
        batch = self.scheduler.to_decode()
        guesses = self._guesses(batch) if self.config.speculate else {}
        pieces = []
        for request in batch:
            known = request.dispatched == len(request.output)
            token = request.tokens[-1] if known else -1
            more = guesses.get(request.id, ())
            pieces.append(Piece(request, (token, *more), request.length))
            request.dispatched += 1
            self.stats.guessed += len(more)
        return pieces

    def _guesses(self, batch: list[Request]) -> dict[int, Sequence[int]]:
        """Returns guesses by request; only for as many tokens as it may still get room for."""
        room = {}
        for request in filter(may_guess, batch):
            left = request.params.max_tokens - len(request.output) - 1
            room[request] = min(self.config.speculate, left)
        wanted = [(r, n) for r, n in room.items() if n > 0 and self._grow(r, n)]
        if self._guesser:
            return self._guesser.guess(wanted)
        for request, _ in wanted:
            request.lookup = request.lookup or PromptLookup()
        return {r.id: r.lookup.guess(r.tokens, n) for r, n in wanted}

    def _prompts(self, room: int) -> list[Piece]:
        """Returns tokens of the oldest prompts for the rows of a step that are left over."""
        pieces = []
        for request in self.scheduler.to_seat():
            count = min(room, request.to_prefill) if request.blocks else 0
            if count:
                start = request.prefilled
                tokens = request.tokens[start : start + count]
                pieces.append(Piece(request, tokens, start, chooses=False))
                request.prefilled, room = start + count, room - count
                self.scheduler.name_full(request, request.prefilled)
        return pieces

    def _grow(self, request: Request, guesses: int = 0) -> bool:
        with self.work:
            return self.scheduler.grow(request, request.length + 1 + guesses)

    def _row(
        self, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], seed: int
    ) -> dict:
        bans = request_bans(params, self.tokenizer, len(prompt))
        return slot_row(params, seed, prompt, output, bans, self.cfg.vocab_size)

    def _read(self, keep: int) -> None:
        """Reads back dispatched steps, oldest first, but leaves `keep` of them running."""
        while len(self._pending) > keep:
            sampled, pieces = self._pending.popleft()
            asked = any(p.request.params.logprobs is not None for p in pieces)
            chosen = Chosen.read(sampled, logprobs=asked)
            for piece in pieces:
                for row in range(piece.row, piece.row + len(piece.tokens)):
                    if not piece.chooses or piece.request.finish_reason:
                        break  # a piece of a prompt; or ended while this step was on its way
                    if row > piece.row:
                        if piece.tokens[row - piece.row] != piece.request.output[-1]:
                            break  # a wrong guess: so are all behind it
                        piece.request.dispatched += 1
                        self.stats.accepted += 1
                    self._judge(piece.request, row, chosen)

    def _judge(self, request: Request, row: int, chosen: Chosen) -> None:
        """Takes a row's choice, or fails the request that it cannot be taken for."""
        token = int(chosen.token[row])
        if not chosen.finite[row]:
            self._poisoned(request)
        elif not chosen.allowed[row]:
            message = "bad_words and the grammar together allow no token here"
            self._finish(request, "error", error=message)
        elif token >= self.tokenizer.vocab_size:
            message = f"the model chose id {token}, which its tokenizer does not have"
            self._finish(request, "error", error=message)
        else:
            self._take(request, token, chosen.scored(row, request.params.logprobs))

    def _take(self, request: Request, token: int, logprob: IdLogprob | None) -> None:
        """Books one new token of a request and tells its owner."""
        if request.first_token_seconds is None:
            request.first_token_seconds = time.monotonic()
        request.output.append(token)
        self.stats.output_tokens += 1
        cached = len(request.prompt) + len(request.output) - 1
        if cached % self.config.block == 0:
            self.scheduler.name_full(request, cached)
        news = {"tokens": (token,), "logprobs": (logprob,) if logprob else ()}
        ends = request.matcher is not None or not request.params.ignore_eos
        is_eos = token in self.tokenizer.eos_ids and ends  # a grammar has it at its end only
        if is_eos or token in request.params.stop_token_ids:
            self._finish(request, "stop", text=request.text.flush(), by_token=True, **news)
            return
        text = request.text.push(token)
        try:
            complete = request.matcher is not None and request.matcher.advance(token)
        except GrammarFailed as error:
            self._finish(request, "error", error=f"the grammar cannot be followed: {error}")
            return
        if request.text.stopped or complete:
            self._finish(request, "stop", text=text + request.text.flush(), **news)
        elif len(request.output) == request.params.max_tokens:
            self._finish(request, "length", text=text + request.text.flush(), **news)
        else:
            request.emit(Delta(text, **news))

    def _finish(self, request: Request, reason: str, *, error: str | None = None, **news) -> None:
        with self.work:
            self.scheduler.release(request)
            request.finish_reason = reason
            request.finished_seconds = time.monotonic()
            field = {"cancelled": "cancelled", "error": "failed"}.get(reason, "finished")
            setattr(self.stats, field, getattr(self.stats, field) + 1)
        request.emit(Delta(finish_reason=reason, error=error, **news))

    def _poisoned(self, request: Request) -> None:
        """Fails a request whose logits are NaN or infinite, and cleans what it left behind."""
        with self.work:
            left = self.scheduler.discard(request)
        for block in left:
            self.programs.wipe(block)
        self.stats.poisoned += 1
        message = f"the model's logits became NaN or infinite after {len(request.output)} tokens"
        self._finish(request, "error", error=message)

    def _drop_cancelled(self) -> None:
        for request in [r for r in self.scheduler.all() if r.cancelled]:
            self._finish(request, "cancelled")

    def _count_blocks(self) -> None:
        pool = self.scheduler.pool
        self.stats.held_blocks, self.stats.cached_blocks = pool.held, pool.cached


def _seed(params: SamplingParams) -> int:
    return int.from_bytes(os.urandom(4)) if params.seed is None else params.seed % 2**32
