"""Continuous batching: the host admits, dispatches and reads; the device state never leaves.

`Engine.step` is one round: admit waiting requests, prefill a few pieces of prompts, dispatch one
decoding step for all slots, then read the tokens of the step before, so that the device computes
while the host turns ids into text. A slot under a grammar needs its last token before its next
mask, so its presence makes the round read first. Knows nothing of HTTP, chats or threads.
"""

import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from internjax.errors import UserError
from internjax.kernels.cpu.library import available
from internjax.kernels.cpu.matmul import ACTIVATIONS
from internjax.kernels.platform import not_for_hopper, target
from internjax.models import rope
from internjax.models.cache import in_place
from internjax.models.lm import SamplingParams
from internjax.models.load import Model
from internjax.serve import slots as device
from internjax.serve.bans import ban_row, request_bans
from internjax.serve.grammar import GrammarFailed, Grammars
from internjax.serve.sampling import TOP_LOGPROBS, Sampled, adjusts, scalars
from internjax.serve.scheduler import (
    Delta,
    IdLogprob,
    Request,
    Scheduler,
    attend_buckets,
    pick_bucket,
)
from internjax.serve.text import TextStream
from internjax.tree import Params, unstack_layers
from internjax.weights import QuantWeight, packed, plain, turned

log = logging.getLogger(__name__)

CHUNKS = (32, 64, 128)
"""Lengths of prompt pieces that programs are compiled for."""


@dataclass(frozen=True)
class EngineConfig:
    """How much runs at once, and in what precision.

    Fields:
      slots: requests decoded together; every step has this shape whoever is there.
      context: positions a slot holds, prompt and answer together; 0 is the model's, at most 2048.
      kv_dtype: "float32", "bfloat16" or "int8" (a scale per token and head).
      max_waiting: requests that may wait for a slot before new ones are refused.
      prefill_tokens: prompt tokens prefilled between two decoding steps.
      weights: "keep" computes with quantized or adapted weights as they are, "expand" turns them
        into plain float arrays once, "pack" lays integers out for the CPU kernels, "turn" for those
        of Hopper GPUs. "auto" packs or turns where those run; on a CPU without them it expands, for
        unpacking at every step costs more than reading the floats.
      activations: what products with packed weights round their activations to: "int8" by groups,
        "bf16", or "f32" for none.
    """

    slots: int = 16
    context: int = 0
    kv_dtype: str = "float32"
    max_waiting: int = 256
    prefill_tokens: int = 256
    weights: str = "auto"
    activations: str = "int8"

    def __post_init__(self):
        for name in ("slots", "max_waiting", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1.")
        if self.kv_dtype not in ("float32", "bfloat16", "int8"):
            raise UserError(f"kv_dtype={self.kv_dtype!r}: legal are float32, bfloat16, int8.")
        if self.weights not in ("auto", "keep", "expand", "pack", "turn"):
            raise UserError(f"weights={self.weights!r}: legal are auto, keep, expand, pack, turn.")
        if self.activations not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise UserError(f"activations={self.activations!r}: legal are {names}.")
        if self.weights == "pack" and not available():
            raise UserError("weights=pack needs the CPU kernels: keep, expand or auto run without.")
        if self.weights == "turn" and (why := not_for_hopper()):
            raise UserError(f"weights=turn is for the GPU kernels: {why}")


@dataclass
class EngineStats:
    """Counters since the start, for /metrics and benchmarks.

    `grammar_seconds` is what the engine's thread spent on masks for `grammar_tokens` tokens; steps
    with a constrained slot also wait for the step before.
    """

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    max_in_flight: int = 0
    programs: int = 0
    grammar_tokens: int = 0
    grammar_seconds: float = 0.0


class Engine:
    """One model and its slots.

    `submit` and `cancel` may be called from any thread, everything else from the engine's own.
    """

    def __init__(self, model: Model, config: EngineConfig | None = None):
        config = config or EngineConfig()
        self.config, self.cfg, self.tokenizer = config, model.cfg, model.tokenizer
        self.context = _context(config, model)
        self.params = prepare_params(model.params, config, model.cfg.dtype)
        self.scheduler = Scheduler(config.slots, config.max_waiting)
        self.stats = EngineStats()
        self.grammars = Grammars(model.tokenizer, model.cfg.vocab_size)
        self.work = threading.Condition()
        self._ids = itertools.count(1)
        whole = in_place(self.cfg, config.kv_dtype)
        self._attends = (self.context,) if whole else attend_buckets(self.context)
        self._programs: set[tuple] = set()
        self._pending: deque[tuple[Sampled, list[Request]]] = deque()
        self._words = -(-model.cfg.vocab_size // 32)
        self._reset_device()

    # Called from any thread -------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        emit: Callable[[Delta], None],
        *,
        continues: bool = False,
    ) -> Request:
        """Checks a request and puts it in line.

        Args:
          emit: called in the engine's thread with news of the request; must not block.
          continues: the answer goes on with the prompt's text (keeps the space of its first word).

        Raises:
          UserError: the request cannot be run as it is, whatever the load.
          QueueFull: too many are waiting.
        """
        self._check(prompt, params)
        request = Request(
            id=next(self._ids),
            prompt=tuple(prompt),
            params=params,
            seed=_seed(params),
            emit=emit,
            text=TextStream.of(self.tokenizer, params, prompt[-1] if continues else None),
            matcher=self.grammars.matcher(params.grammar) if params.grammar else None,
        )
        with self.work:
            self.scheduler.add(request)
            self.stats.requests += 1
            self.stats.prompt_tokens += len(prompt)
            self.work.notify()
        return request

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises `UserError` for a prompt that is empty, too long or not of this vocabulary."""
        if not prompt:
            raise UserError("the prompt is empty: give at least one token.")
        if len(prompt) > self.context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens but the context holds {self.context}."
            )
        _check_ids("prompt", prompt, self.cfg.vocab_size)

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
        batch = self.scheduler.to_decode()
        masks = None
        if any(r.matcher for r in batch):
            self._read(keep=0)
            masks = self._masks(self.scheduler.to_decode())
            batch = self.scheduler.to_decode()
        if batch:
            self._dispatch(batch, masks)
        self._read(keep=1 if batch else 0)
        return True

    def fail_all(self, error: str) -> None:
        """Ends every running request with an error and starts from empty slots.

        Requests that still wait are not touched: nothing was lost for them.
        """
        self._pending.clear()
        for request in self.scheduler.running():
            self._finish(request, "error", error=error)
        self._reset_device()

    def warm_up(self) -> list[str]:
        """Compiles every program ahead of the first request; returns their names."""
        assert not self.in_flight(), "warm_up needs an idle engine"
        zero, freq = jnp.int32(0), self._inv_freq(1)
        for attend in self._attends:
            for size in (c for c in CHUNKS if c <= attend):
                self._run_prefill(0, np.zeros(size, np.int32), 0, 1, freq, attend)
            self._run_step(np.zeros(self.config.slots, bool), None, attend)
        for params in (SamplingParams(), SamplingParams(logit_bias={0: 0.0})):
            self._run_seat(0, zero, zero, freq, self._row(params, (0,), 0))
        jax.block_until_ready(self._slots)
        return sorted(" ".join(map(str, p)) for p in self._programs)

    def _prefill_some(self) -> None:
        """Prefills up to `prefill_tokens` of the oldest prompts; seats those that are complete."""
        budget = self.config.prefill_tokens
        for request in self.scheduler.to_seat():
            freq = self._inv_freq(len(request.prompt) + request.params.max_tokens)
            while request.to_prefill and budget > 0:
                budget -= self._prefill_piece(request, freq)
            if not request.to_prefill:
                self._seat(request, freq)
            if budget <= 0:
                return

    def _prefill_piece(self, request: Request, freq: np.ndarray) -> int:
        size = pick_bucket(request.to_prefill, CHUNKS)
        start, count = request.prefilled, min(size, request.to_prefill)
        tokens = np.zeros(size, np.int32)
        tokens[:count] = request.prompt[start : start + count]
        attend = pick_bucket(start + size, self._attends)
        if start + size > attend:  # a padded piece would stick out of the last bucket
            size, tokens = count, tokens[:count]
        self._run_prefill(request.slot, tokens, start, count, freq, attend)
        request.prefilled += count
        return size

    def _seat(self, request: Request, freq: np.ndarray) -> None:
        row = self._row(request.params, request.prompt, request.seed)
        length, token = len(request.prompt) - 1, request.prompt[-1]
        self._run_seat(request.slot, np.int32(length), np.int32(token), freq, row)
        request.seated = True

    def _row(self, params: SamplingParams, prompt: Sequence[int], seed: int) -> dict:
        row = scalars(params, seed)
        row |= ban_row(request_bans(params, self.tokenizer, len(prompt)))
        if adjusts(params):
            row["in_prompt"] = np.zeros(self.cfg.vocab_size, bool)
            row["in_prompt"][list(prompt)] = True
            row["bias"] = np.zeros(self.cfg.vocab_size, np.float32)
            for token, value in (params.logit_bias or {}).items():
                row["bias"][token] = value
        return row

    def _dispatch(self, batch: list[Request], masks) -> None:
        active = np.zeros(self.config.slots, bool)
        active[[r.slot for r in batch]] = True
        attend = pick_bucket(1 + max(r.length for r in batch), self._attends)
        out = self._run_step(active, masks, attend)
        for request in batch:
            request.dispatched += 1
        self._pending.append((out, batch))
        self.stats.steps += 1

    def _masks(self, batch: list[Request]) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns the packed token masks of the slots under a grammar; None when there are none.

        A request whose grammar cannot be followed any further fails alone.
        """
        constrained = [r for r in batch if r.matcher]
        if not constrained:
            return None
        started = time.perf_counter()
        words = np.zeros((self.config.slots, self._words), np.uint32)
        masked = np.zeros(self.config.slots, bool)
        for request in constrained:
            slot = request.slot
            try:
                request.matcher.fill(words[slot])
                masked[slot] = True
            except GrammarFailed as error:
                self._finish(request, "error", error=f"the grammar cannot be followed: {error}")
        self.stats.grammar_tokens += len(constrained)
        self.stats.grammar_seconds += time.perf_counter() - started
        return words, masked

    def _read(self, keep: int) -> None:
        """Reads back dispatched steps, oldest first, but leaves `keep` of them running."""
        while len(self._pending) > keep:
            out, batch = self._pending.popleft()
            tokens, finite, allowed = map(np.asarray, (out.token, out.finite, out.allowed))
            asked = any(r.params.logprobs is not None for r in batch)
            rivals = jax.device_get((out.logprob, out.top_ids, out.top_logprobs)) if asked else None
            for request in batch:
                if request.finish_reason:  # ended while this step was on its way
                    continue
                slot = request.slot
                if not finite[slot]:
                    self._poisoned(request)
                elif not allowed[slot]:
                    message = "bad_words and the grammar together allow no token here"
                    self._finish(request, "error", error=message)
                else:
                    self._take(request, int(tokens[slot]), _logprob(request, tokens, rivals))

    def _take(self, request: Request, token: int, logprob: IdLogprob | None) -> None:
        """Books one new token of a request and tells its owner."""
        if request.first_token_seconds is None:
            request.first_token_seconds = time.monotonic()
        request.output.append(token)
        self.stats.output_tokens += 1
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
        self._slots = device.wipe(self._slots, np.int32(request.slot))
        message = f"the model's logits became NaN or infinite after {len(request.output)} tokens"
        self._finish(request, "error", error=message)

    def _drop_cancelled(self) -> None:
        for request in [r for r in self.scheduler.all() if r.cancelled]:
            self._finish(request, "cancelled")

    # Programs ---------------------------------------------------------------------------------

    def _reset_device(self) -> None:
        config = self.config
        self._slots = device.init_slots(self.cfg, config.slots, self.context, config.kv_dtype)
        self._no_mask = (
            jnp.zeros((config.slots, self._words), jnp.uint32),
            jnp.zeros(config.slots, bool),
        )

    def _run_prefill(self, slot, tokens, start, count, freq, attend) -> None:
        self._meet("prefill", len(tokens), attend)
        self._slots = device.prefill(
            self.params,
            self._slots,
            np.int32(slot),
            tokens,
            np.int32(start),
            np.int32(count),
            freq,
            cfg=self.cfg,
            attend=attend,
        )

    def _run_seat(self, slot, length, token, freq, row) -> None:
        self._meet("seat", len(row))
        self._slots = device.seat(self._slots, np.int32(slot), length, token, freq, row)

    def _run_step(self, active, masks, attend) -> Sampled:
        self._meet("step", attend)
        words, masked = masks or self._no_mask
        self._slots, out = device.step(
            self.params, self._slots, active, words, masked, cfg=self.cfg, attend=attend
        )
        return out

    def _meet(self, *program) -> None:
        """Counts the programs in use: a new one after the warm-up means a compilation."""
        if program not in self._programs:
            self._programs.add(program)
            self.stats.programs = len(self._programs)
            log.info("compiling %s", " ".join(map(str, program)))

    def _inv_freq(self, length: int) -> np.ndarray:
        return rope.inv_freq(self.cfg, min(length, self.context)).astype(np.float32)

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        self.check_prompt(prompt)
        if len(prompt) + params.max_tokens > self.context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and max_tokens={params.max_tokens}, together "
                f"{len(prompt) + params.max_tokens}, but the context holds {self.context}: shorten "
                "the prompt or ask for fewer tokens."
            )
        _check_ids("logit_bias", params.logit_bias or (), self.cfg.vocab_size)
        _check_ids("stop_token_ids", params.stop_token_ids, self.cfg.vocab_size)
        request_bans(params, self.tokenizer, len(prompt))
        if params.logprobs is not None and not 0 <= params.logprobs <= TOP_LOGPROBS:
            raise UserError(f"logprobs={params.logprobs}: it must lie in 0..{TOP_LOGPROBS}.")


def prepare_params(params: Params, config: EngineConfig, dtype: str) -> Params:
    """Returns the tree that decoding wants, its weights packed or expanded as `config` says.

    Layers become one dict each; packed weights stay one stack that the dicts share.
    """
    how = config.weights
    if how == "auto" and target().platform == "cpu":
        how = "pack" if available() else "expand"
    if how == "auto" and not_for_hopper() is None:
        how = "turn"
    if how == "expand":
        special = [x for x in jax.tree.leaves(params, is_leaf=_is_weight) if _is_weight(x)]
        if special:
            log.info("expanding %d packed or adapted weights to %s", len(special), dtype)
        expand = lambda x: plain(x, jnp.dtype(dtype)) if _is_weight(x) else x  # noqa: E731
        params = jax.tree.map(expand, params, is_leaf=_is_weight)
    elif how == "pack":
        fit = lambda x: packed(x, config.activations, dtype) if _is_weight(x) else x  # noqa: E731
        params = jax.tree.map(fit, params, is_leaf=_is_weight)
    elif how == "turn":
        integers = lambda x: isinstance(x, QuantWeight)  # noqa: E731
        turn = jax.jit(turned)  # in passing: the nibbles by themselves are four times as much
        fit = lambda x: turn(x) if integers(x) else x  # noqa: E731
        params = jax.tree.map(fit, params, is_leaf=integers)
    return unstack_layers(params)


def _is_weight(x) -> bool:
    return not isinstance(x, (dict, tuple, jax.Array, np.ndarray))


def _context(config: EngineConfig, model: Model) -> int:
    limit = model.cfg.max_context
    context = config.context or min(limit, 2048)
    if context > limit and model.cfg.rope.kind == "default":
        raise UserError(
            f"context={context} is longer than the model's {limit}: give at most that, or a model "
            "whose rope is stretched."
        )
    # A multiple of the longest piece: a padded piece of a prompt must fit before the end.
    return context if context < CHUNKS[-1] else context // CHUNKS[-1] * CHUNKS[-1]


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise UserError(f"{name}: token id {wrong} is outside 0..{vocab_size - 1}.")


def _seed(params: SamplingParams) -> int:
    return int.from_bytes(os.urandom(4)) if params.seed is None else params.seed % 2**32


def _logprob(request: Request, tokens: np.ndarray, rivals) -> IdLogprob | None:
    if request.params.logprobs is None:
        return None
    logprob, top_ids, top_logprobs = rivals
    slot, wanted = request.slot, request.params.logprobs
    pairs = zip(top_ids[slot, :wanted], top_logprobs[slot, :wanted], strict=True)
    top = tuple((int(i), float(x)) for i, x in pairs)
    return IdLogprob(int(tokens[slot]), float(logprob[slot]), top)
