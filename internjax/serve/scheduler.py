"""Which request lives in which slot, and what the device does next. Plain Python, no arrays.

First come, first served: a request waits in a bounded queue, takes the first free slot, is
prefilled piece by piece between decoding steps, decodes until it ends, and frees the slot.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from internjax.models.lm import SamplingParams


class QueueFull(RuntimeError):
    """The waiting line is as long as it may get; try again later."""


@dataclass(frozen=True)
class IdLogprob:
    """The log-probability (nats) of one generated id, and its likeliest rivals as (id, nats)."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """News of one request: text that became certain, tokens, and how it ended if it did.

    Fields:
      text: new text; may lag the tokens while a stop string or a letter is incomplete.
      tokens: new ids; logprobs: one entry each if asked for.
      finish_reason: None while it runs; "stop", "length", "cancelled" or "error" at the end.
      error: what went wrong, for "error".
      by_token: whether the last token ended the answer and is no part of its text.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[IdLogprob, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    by_token: bool = False


@dataclass(eq=False)
class Request:
    """A prompt on its way through the engine.

    Fields:
      prompt: token ids, at least one; seed: decides the randomness together with the position.
      emit: called in the engine's thread with every `Delta`; must not block.
      text: turns ids into certain text (`text.TextStream`); matcher: follows the grammar.
      slot: where it lives, None while it waits; prefilled: prompt positions already cached.
      dispatched: decoding steps started; output: ids read back.
      *_seconds: `time.monotonic` of the arrival, the first token and the end.
    """

    id: int
    prompt: Sequence[int]
    params: SamplingParams
    seed: int
    emit: Callable[[Delta], None]
    text: object = None
    matcher: object = None
    slot: int | None = None
    prefilled: int = 0
    seated: bool = False
    dispatched: int = 0
    output: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    cancelled: bool = False
    arrived_seconds: float = field(default_factory=time.monotonic)
    first_token_seconds: float | None = None
    finished_seconds: float | None = None

    @property
    def to_prefill(self) -> int:
        """Prompt positions still to be cached; the last prompt token is fed by the first step."""
        return len(self.prompt) - 1 - self.prefilled

    @property
    def length(self) -> int:
        """Positions of the cache that the next step finds written."""
        return len(self.prompt) - 1 + self.dispatched


class Scheduler:
    """The waiting line and the slots.

    Law: every request is in exactly one of `waiting`, one slot, or nowhere (finished).
    """

    def __init__(self, num_slots: int, max_waiting: int):
        self.max_waiting = max_waiting
        self.waiting: deque[Request] = deque()
        self.slots: list[Request | None] = [None] * num_slots

    def add(self, request: Request) -> None:
        """Puts a request at the end of the line.

        Raises:
          QueueFull: the line holds `max_waiting` requests.
        """
        if len(self.waiting) >= self.max_waiting:
            raise QueueFull(f"{len(self.waiting)} requests are waiting already.")
        self.waiting.append(request)

    def admit(self) -> list[Request]:
        """Moves waiting requests into free slots; returns them."""
        admitted = []
        for slot, holder in enumerate(self.slots):
            if holder is None and self.waiting:
                request = self.waiting.popleft()
                request.slot = slot
                self.slots[slot] = request
                admitted.append(request)
        return admitted

    def release(self, request: Request) -> None:
        """Takes a finished or cancelled request out of its slot or out of the line."""
        if request.slot is not None:
            assert self.slots[request.slot] is request, f"slot {request.slot} holds another request"
            self.slots[request.slot] = None
            request.slot = None
        elif request in self.waiting:
            self.waiting.remove(request)

    def running(self) -> list[Request]:
        """Requests that hold a slot."""
        return [r for r in self.slots if r is not None]

    def to_seat(self) -> list[Request]:
        """Requests in slots whose decoding has not begun, oldest first."""
        unseated = [r for r in self.running() if not r.seated]
        return sorted(unseated, key=lambda r: r.arrived_seconds)

    def to_decode(self) -> list[Request]:
        """Seated requests that still want tokens."""
        return [r for r in self.running() if r.seated and r.dispatched < r.params.max_tokens]

    def all(self) -> list[Request]:
        """Every request that is not finished."""
        return [*self.running(), *self.waiting]


def pick_bucket(size: int, buckets: Sequence[int]) -> int:
    """Returns the smallest bucket that holds `size`, or the largest one."""
    return next((b for b in buckets if b >= size), buckets[-1])


def attend_buckets(context: int, smallest: int = 128) -> tuple[int, ...]:
    """Returns the static cache lengths that programs are compiled for: x2 up to the context.

    Reading twice the needed cache costs more than a compilation each on CPU, so the steps are 2.
    """
    sizes = []
    size = smallest
    while size < context:
        sizes.append(size)
        size *= 2
    return (*sizes, context)
