"""One replica: a process that is started, watched, and started again when it ends."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2

from internjax.errors import UserError
from internjax.serve.listening import listening
from internjax.serve.replicas.config import LOST_EXIT

log = logging.getLogger(__name__)

STARTING, READY, DOWN, LOST = "starting", "ready", "down", "lost"
GIVEN_UP = ("hung", "dead")  # what /health says of an engine that needs a new process
USER_ERROR = 2  # exit code of a command whose user must change something
STEADY_SECONDS = 60.0  # who lived so long did not die of its start
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0  # seconds before a restart
_PROBE_SECONDS = 5.0

type Start = Callable[["Replica"], Awaitable[asyncio.subprocess.Process]]
type Greet = Callable[["Replica"], Awaitable[None]]


@dataclass
class Replica:
    """What is known of one replica.

    Fields:
      port: where its HTTP server listens on the loopback address, another one after a restart;
        state: starting, ready or down; for a moment lost: its engine hangs or has died.
      in_flight, requests, failed: requests it has now, ever got, and lost without its answer.
      restarts: how often its process had to be replaced; losses: for the sake of its engine.
    """

    index: int
    port: int = 0
    state: str = STARTING
    in_flight: int = 0
    requests: int = 0
    failed: int = 0
    restarts: int = 0
    losses: int = 0
    process: asyncio.subprocess.Process | None = None
    client: httpx2.AsyncClient = field(init=False)

    def __post_init__(self):
        # A connection per request: one kept open may be closed by the other side just when it is
        # used again, and then nobody knows whether the request has begun.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx2.Timeout(None, connect=_PROBE_SECONDS)
        self.client = httpx2.AsyncClient(limits=limits, timeout=timeout, trust_env=False)

    @property
    def ready(self) -> bool:
        return self.state == READY

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


async def start_process(
    replica: Replica, command: list[str], told: dict[str, Any], environ: dict[str, str]
) -> asyncio.subprocess.Process:
    """Starts a replica's process and writes it one line of JSON; its input stays open.

    It inherits a listening socket (`fd`) that this process closes: connections are refused as soon
    as it has died. It has a session of its own: Ctrl-C in a terminal reaches the front alone, which
    lets all end in order. When the front dies, the end of its input tells the process.
    """
    with listening("127.0.0.1", 0) as listener:
        replica.port, fd = listener.getsockname()[1], listener.fileno()
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            env=environ,
            start_new_session=True,
            pass_fds=(fd,),
        )
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # ended: `wait` tells
        process.stdin.write(json.dumps(told | {"fd": fd}).encode() + b"\n")
        await process.stdin.drain()
    return process


async def keep(replica: Replica, start: Start, greet: Greet, health_seconds: float) -> None:
    """Runs a replica's process, and again whenever it ends, until cancelled.

    Args:
      greet: what to do with a replica that answers, before it gets requests.

    Raises:
      UserError: the very first process refused its configuration; it has printed why.
    """
    pause, once_ready = FIRST_PAUSE, False
    while True:
        born = time.monotonic()
        replica.state = STARTING
        replica.process = process = await start(replica)
        watching = asyncio.create_task(_watch(replica, greet, health_seconds))
        ending = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({watching, ending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            ending.cancel()
        once_ready |= replica.state != STARTING
        told, replica.state = replica.state, DOWN
        if process.returncode is None:
            process.kill()
        code = await process.wait()
        replica.losses += told == LOST or code == LOST_EXIT
        if code == USER_ERROR and not once_ready:
            raise UserError(
                f"replica {replica.index} could not start: its own message stands above."
            )
        pause = FIRST_PAUSE if time.monotonic() - born > STEADY_SECONDS else pause
        log.error(
            "replica %d ended (%s); it is started again in %.1f s",
            replica.index, _ending(code), pause,
        )  # fmt: skip
        await asyncio.sleep(pause)
        replica.restarts += 1
        pause = min(2 * pause, LONGEST_PAUSE)


async def stop(replica: Replica, drain_seconds: float) -> None:
    """Lets a replica's process finish its requests and end; kills it when that takes too long."""
    process = replica.process
    if process is not None and process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), drain_seconds)
        except TimeoutError:
            log.error("replica %d did not end in %.0f s: killed", replica.index, drain_seconds)
            process.kill()
            await process.wait()
    await replica.client.aclose()


async def _watch(replica: Replica, greet: Greet, health_seconds: float) -> None:
    """Keeps `state` true; returns when a replica that was ready must be replaced.

    That is: it has been silent for too long, or says itself that its engine is lost.
    """
    born = time.monotonic()
    answered = None
    while True:
        said = await _health(replica)
        if said.get("status") == "ok":
            if answered is None:
                await greet(replica)
                log.info("replica %d is ready (%.1f s)", replica.index, time.monotonic() - born)
            answered, replica.state = time.monotonic(), READY
        elif said.get("status") in GIVEN_UP:
            log.error("replica %d is killed: %s", replica.index, said.get("reason"))
            replica.state = LOST
            return
        elif answered is not None and time.monotonic() - answered > health_seconds:
            log.error("replica %d is silent for %.0f s: killed", replica.index, health_seconds)
            return
        await asyncio.sleep(0.1 if answered is None else 1.0)


async def _health(replica: Replica) -> dict[str, str]:
    """Returns what /health says; nothing if nobody answers."""
    try:
        answer = await replica.client.get(f"{replica.url}/health", timeout=_PROBE_SECONDS)
        return answer.json()
    except (httpx2.TransportError, ValueError):
        return {}


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
