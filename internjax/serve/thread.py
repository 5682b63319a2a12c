"""Runs an engine's rounds in a thread of its own and brings its news to other threads and loops."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from internjax.models.lm import SamplingParams
from internjax.serve.engine import Engine
from internjax.serve.scheduler import Delta, Request

log = logging.getLogger(__name__)


class EngineClosed(RuntimeError):
    """The engine takes no new requests: it is shutting down."""


@dataclass(frozen=True)
class Job:
    """What `Engine.submit` takes.

    Fields:
      continues: the answer goes on with the prompt's text; adapter: "" is the model itself.
    """

    prompt: Sequence[int]
    params: SamplingParams
    continues: bool = False
    adapter: str = ""


@dataclass
class Timing:
    """How long one request took; times are seconds of `time.monotonic`.

    Fields:
      first: when its first token came, None if none did.
      finish_reason: see `Delta`.
    """

    arrived: float = field(default_factory=time.monotonic)
    first: float | None = None
    finished: float = 0.0
    tokens: int = 0
    finish_reason: str = ""

    def take(self, delta: Delta) -> None:
        """Books news at the moment they come."""
        now = time.monotonic()
        if delta.tokens and self.first is None:
            self.first = now
        self.tokens += len(delta.tokens)
        if delta.finish_reason:
            self.finished, self.finish_reason = now, delta.finish_reason


@dataclass(frozen=True)
class Ticket:
    """Requests submitted together from an event loop, and the queue where their news arrive."""

    requests: list[Request]
    news: asyncio.Queue


class EngineThread:
    """An engine at work. All methods may be called from any thread.

    Fields:
      observers: called in the engine's thread with the `Timing` of every request that has ended.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.observers: list[Callable[[Timing], None]] = []
        self._closing = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    @property
    def closing(self) -> bool:
        """Whether new requests are refused."""
        return self._closing.is_set()

    @property
    def alive(self) -> bool:
        """Whether rounds are done; once they are not, only a new process helps."""
        return self._thread.is_alive()

    def submit(self, job: Job, emit: Callable[[Delta], None]) -> Request:
        """See `Engine.submit`.

        Raises:
          EngineClosed: after `close` was called.
        """
        if self.closing:
            raise EngineClosed("the engine is shutting down.")
        timing = Timing()

        def told(delta: Delta) -> None:
            timing.take(delta)
            if delta.finish_reason:
                for observe in self.observers:
                    observe(timing)
            emit(delta)

        options = {"continues": job.continues, "adapter": job.adapter}
        return self.engine.submit(job.prompt, job.params, told, **options)

    def stream(self, job: Job) -> Iterator[Delta]:
        """Yields the news of one request until its last; leaving the loop cancels it."""
        news: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        request = self.submit(job, news.put)
        try:
            while True:
                delta = news.get()
                yield delta
                if delta.finish_reason:
                    return
        finally:
            self.engine.cancel(request)

    def submit_all(self, jobs: Sequence[Job], loop: asyncio.AbstractEventLoop) -> Ticket:
        """Submits all or none; `follow` gives the news in `loop`.

        Raises:
          UserError, QueueFull, EngineClosed: none of the jobs runs.
        """
        ticket = Ticket([], asyncio.Queue())

        def emitter(index: int) -> Callable[[Delta], None]:
            def emit(delta: Delta) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(ticket.news.put_nowait, (index, delta))

            return emit

        try:
            for index, job in enumerate(jobs):
                ticket.requests.append(self.submit(job, emitter(index)))
        except Exception:
            self.cancel(ticket)
            raise
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends what still runs of a ticket."""
        for request in ticket.requests:
            self.engine.cancel(request)

    async def follow(self, ticket: Ticket) -> AsyncIterator[tuple[int, Delta]]:
        """Yields (index of the job, news) until all have ended; leaving the loop cancels them."""
        running = len(ticket.requests)
        try:
            while running:
                index, delta = await ticket.news.get()
                running -= delta.finish_reason is not None
                yield index, delta
        finally:
            self.cancel(ticket)

    def close(self, drain_seconds: float = 0.0) -> None:
        """Refuses new requests, lets the old ones finish for a while, cancels the rest, stops."""
        self._closing.set()
        deadline = time.monotonic() + drain_seconds
        while self.engine.in_flight() and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        with self.engine.work:
            for request in self.engine.scheduler.all():
                request.cancelled = True
            self._ended = True
            self.engine.work.notify()
        self._thread.join(timeout=60)

    def _loop(self) -> None:
        engine = self.engine
        while not (self._ended and not engine.in_flight()):
            try:
                busy = engine.step()
            except Exception as error:  # the process's border: what ran fails, serving goes on
                log.exception("a round of the engine failed")
                engine.fail_all(f"the engine failed: {type(error).__name__}: {error}")
                continue
            if not busy:
                with engine.work:
                    if not self._ended and not engine.scheduler.all():
                        engine.work.wait()
