"""Which request lives in which slot and blocks, and what comes next. Plain Python, no arrays.

First come, first served: a request waits in a bounded queue, takes the first free slot, takes the
blocks that its tokens need (those of an earlier prompt that began alike among them), is prefilled
piece by piece between decoding steps, decodes until it ends, and lets go. When blocks run out, the
request that came last gives its own back and waits again; its tokens are computed anew.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from internjax.models.lm import SamplingParams
from internjax.serve.blocks import BlockPool, Key, OutOfBlocks, block_key


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
      text: turns ids into certain text (`text.TextStream`); matcher: follows the grammar;
        mask: the tokens that it allows next, packed `[W]`.
      lookup: guesses from its own text, see `drafts.PromptLookup`.
      freq: rotary frequencies `[H/2]`; salt: what decides its keys and values besides weights
        and tokens, see `blocks.block_key`.
      adapter: the place of its LoRA adapter, -1 for none.
      slot: where it lives, None while it waits; prefilled: positions already cached.
      root: what the names of its blocks begin with: the salt, and the weights it started with.
      blocks: of the cache, in order; keys: names of the full ones; reused: positions found cached.
      dispatched: tokens that decoding steps were started for; output: ids read back.
      preempted: how often it had to give its blocks back.
      *_seconds: `time.monotonic` of the arrival, the first token and the end.
    """

    id: int
    prompt: Sequence[int]
    params: SamplingParams
    seed: int
    emit: Callable[[Delta], None]
    text: object = None
    matcher: object = None
    mask: object = None
    lookup: object = None
    freq: object = None
    salt: bytes = b""
    adapter: int = -1
    slot: int | None = None
    root: bytes = b""
    blocks: list[int] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    prefilled: int = 0
    reused: int = 0
    preempted: int = 0
    seated: bool = False
    dispatched: int = 0
    output: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    cancelled: bool = False
    arrived_seconds: float = field(default_factory=time.monotonic)
    first_token_seconds: float | None = None
    finished_seconds: float | None = None

    @property
    def tokens(self) -> list[int]:
        """All ids so far."""
        return [*self.prompt, *self.output]

    @property
    def to_prefill(self) -> int:
        """Positions still to be cached before it decodes; the first step feeds the last token."""
        return len(self.prompt) + len(self.output) - 1 - self.prefilled

    @property
    def length(self) -> int:
        """Positions of the cache that the next step finds written."""
        return len(self.prompt) - 1 + self.dispatched


class Scheduler:
    """The waiting line, the slots and the blocks.

    Laws: every request is in exactly one of `waiting`, one slot, or nowhere (finished); those in no
    slot hold no block; a block's name says what its sequence's tokens are.
    """

    def __init__(self, num_slots: int, max_waiting: int, pool: BlockPool, block: int):
        self.max_waiting, self.pool, self.block = max_waiting, pool, block
        self.version = 0  # of the weights
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

    def start(self, request: Request, *, reuse: bool = True) -> bool:
        """Takes the blocks for a request's tokens; returns False where it must wait for some.

        One block for each that decodes is left over, or the next steps would take these back.

        Args:
          reuse: look for blocks that hold the same tokens; counted by `request.reused`.
        """
        tokens = request.tokens
        request.root, request.keys = request.salt + self.version.to_bytes(8, "little"), []
        # The last token is fed by a step, which writes: its block must be the request's own.
        request.keys = self._keys(request, tokens, (len(tokens) - 1) // self.block)
        found = self.pool.match(request.keys) if reuse else []
        need = -(-len(tokens) // self.block) - len(found)
        others = sum(r.seated for r in self.running())
        if need + others > self.pool.available:
            self.pool.release(found)
            return False
        request.blocks = [*found, *self.pool.allocate(need)]
        request.prefilled = request.reused = len(found) * self.block
        return True

    def grow(self, request: Request, positions: int) -> bool:
        """Sees that a request has blocks for so many positions; returns False if none are left."""
        try:
            need = -(-positions // self.block) - len(request.blocks)
            request.blocks += self.pool.allocate(max(0, need))
        except OutOfBlocks:
            return False
        return True

    def name_full(self, request: Request, positions: int) -> None:
        """Names the blocks that the first `positions` tokens fill, so that others find them."""
        full = positions // self.block
        if full > len(request.keys):
            request.keys = self._keys(request, request.tokens, full)
        for block, key in list(zip(request.blocks, request.keys, strict=False))[:full]:
            self.pool.name(block, key)

    def _keys(self, request: Request, tokens: Sequence[int], full: int) -> list[Key]:
        keys = request.keys[:full]
        for at in range(len(keys), full):
            parent = keys[-1] if keys else request.root
            keys.append(block_key(parent, tokens[at * self.block : (at + 1) * self.block]))
        return keys

    def forget(self) -> None:
        """Sees that nothing cached so far is found by who starts from now on: other weights."""
        self.version += 1
        self.pool.forget()

    def youngest(self) -> Request:
        """Returns the request with blocks that came last."""
        holders = [r for r in self.running() if r.blocks]
        return max(holders, key=lambda r: (r.arrived_seconds, r.id))

    def preempt(self, request: Request) -> None:
        """Takes a request's slot and blocks, and puts it at the head of the line."""
        self.release(request)
        request.prefilled, request.seated = 0, False
        request.preempted += 1
        self.waiting.appendleft(request)

    def discard(self, request: Request) -> list[int]:
        """Takes the names off a request's blocks; returns those that nobody else holds.

        It keeps them until it is released.
        """
        self.pool.unname(request.blocks)
        return [block for block in request.blocks if self.pool.holders(block) == 1]

    def release(self, request: Request) -> None:
        """Takes a finished or cancelled request out of its slot or out of the line."""
        self.pool.release(request.blocks)
        request.blocks = []
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
        return sorted(unseated, key=lambda r: (r.arrived_seconds, r.id))

    def to_decode(self) -> list[Request]:
        """Seated requests that still want tokens, oldest first."""
        ready = (r for r in self.running() if r.seated and r.dispatched < r.params.max_tokens)
        return sorted(ready, key=lambda r: (r.arrived_seconds, r.id))

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
