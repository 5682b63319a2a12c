"""Runs an engine's rounds in a thread of its own and brings its news to other threads and loops.

A thread that hangs or ends is given up: its requests end with an error, no new ones are taken.
"""

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
from internjax.serve.watchdog import watch, where

log = logging.getLogger(__name__)


type Emit = Callable[[Delta], None]


class EngineClosed(RuntimeError):
    """The engine takes no new requests; `status` is that of `EngineThread`."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status = status


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
      observers: called with the `Timing` of every request that has ended, in the engine's thread or
        in that of the watchdog.
      on_loss: called once with the reason when the engine was given up and its requests have ended.
    """

    def __init__(self, engine: Engine, hang_seconds: float = 0.0):
        """Starts the thread.

        Args:
          hang_seconds: the engine is given up when a round, compilations included, lasts longer;
            0 waits for ever.
        """
        self.engine, self.hang_seconds = engine, hang_seconds
        self.observers: list[Callable[[Timing], None]] = []
        self.on_loss: Callable[[str], None] | None = None
        self._closing = threading.Event()
        self._ended = False
        self._lost: tuple[str, str] | None = None  # status and reason
        self._begun: float | None = None  # the round that runs
        self._open: set[Emit] = set()  # of the requests that have not ended
        self._lock = threading.Lock()  # of `_open` and `_lost`; not held while others are called
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        if hang_seconds:
            watched = (lambda: self._begun), hang_seconds, self._over, self._hangs
            threading.Thread(target=watch, args=watched, name="watchdog", daemon=True).start()

    @property
    def status(self) -> str:
        """Returns "ok", "closing", "hung" or "dead"; for the last two only a new process helps."""
        if self._lost:
            return self._lost[0]
        return "closing" if self._closing.is_set() else "ok"

    @property
    def reason(self) -> str:
        """Why new requests are refused; "" if they are not."""
        if self._lost:
            return self._lost[1]
        return "the server is shutting down" if self._closing.is_set() else ""

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.status == "ok"

    @property
    def lost(self) -> bool:
        """Whether the engine has been given up."""
        return self._lost is not None

    @property
    def round_seconds(self) -> float:
        """How long the round that runs has lasted; 0 when there is nothing to do."""
        begun = self._begun
        return 0.0 if begun is None else time.monotonic() - begun

    def in_flight(self) -> int:
        """Requests that have not ended; asks for no lock that a hanging engine may hold."""
        return len(self._open)

    def submit(self, job: Job, emit: Emit) -> Request:
        """See `Engine.submit`.

        Raises:
          EngineClosed: after `close` was called, or when the engine was given up.
        """
        timing = Timing()

        def tell(delta: Delta) -> None:
            timing.take(delta)
            if delta.finish_reason:
                for observe in self.observers:
                    observe(timing)
            emit(delta)

        def hear(delta: Delta) -> None:
            with self._lock:
                if tell not in self._open:
                    return  # its owner has been told that it ended
                if delta.finish_reason:
                    self._open.remove(tell)
            tell(delta)

        with self._lock:
            if not self.ready:
                raise EngineClosed(self.status, f"{self.reason}.")
            self._open.add(tell)
        options = {"continues": job.continues, "adapter": job.adapter}
        try:
            return self.engine.submit(job.prompt, job.params, hear, **options)
        except Exception:
            with self._lock:
                self._open.discard(tell)
            raise

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
        while self.in_flight() and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.lost:  # it may hold the lock, and will not end
            return
        with self.engine.work:
            for request in self.engine.scheduler.all():
                request.cancelled = True
            self._ended = True
            self.engine.work.notify()
        self._thread.join(timeout=60)

    def _run(self) -> None:
        try:
            self._loop()
        finally:
            self._over.set()
            self._begun = None
            if self._ended:  # some may have come just then
                self._end_all(Delta(finish_reason="cancelled"))
            else:
                self._give_up("dead", "the engine's thread has ended")

    def _loop(self) -> None:
        engine = self.engine
        while not self.lost and not (self._ended and not engine.in_flight()):
            self._begun = time.monotonic()
            try:
                busy = engine.step()
            except Exception as error:  # the process's border: what ran fails, serving goes on
                log.exception("a round of the engine failed")
                engine.fail_all(f"the engine failed: {type(error).__name__}: {error}")
                continue
            if not busy:
                with engine.work:
                    if not self._ended and not engine.scheduler.all():
                        self._begun = None
                        engine.work.wait()

    def _hangs(self) -> None:
        self.engine.stats.hangs += 1
        log.error("the engine hangs here:\n%s", where(self._thread))
        reason = f"the engine hangs: a round has not ended for {self.hang_seconds:g} s"
        self._give_up("hung", reason)

    def _give_up(self, status: str, reason: str) -> None:
        """Ends all requests with an error; what the engine may still say of them is not heard."""
        with self._lock:
            if self._lost:
                return
            self._lost = status, reason
        log.error("%s; %d requests end with an error", reason, self.in_flight())
        try:
            self._end_all(Delta(finish_reason="error", error=reason))
        finally:
            if self.on_loss:
                self.on_loss(reason)

    def _end_all(self, delta: Delta) -> None:
        with self._lock:
            left, self._open = self._open, set()
        for tell in left:
            tell(delta)
