"""Runs the front process: it listens at once, keeps the replicas alive, and drains on a signal."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn

from internjax.serve.listening import base_url, listening
from internjax.serve.replicas.config import FrontConfig
from internjax.serve.replicas.front import Front
from internjax.serve.replicas.process import Replica, keep, start_process, stop
from internjax.serve.replicas.shares import environment, own_cores

log = logging.getLogger(__name__)


def run_replicas(
    config: FrontConfig,
    command: Sequence[str],
    replica_config: dict[str, Any],
    *,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM, then lets running requests finish for `drain_seconds`.

    Args:
      command: starts a replica; it reads one line of JSON from its standard input: `config`
        (`replica_config`), `fd` (its listening socket), `replica` (its number), `cores` (those of
        the machine that are its own). It drains on SIGTERM and when its input ends.
      on_ready: called with the base URL once connections are accepted; requests get 503 until a
        replica is ready.

    Raises:
      UserError: the port is taken, a replica refused its configuration, GPUs cannot be divided.
    """
    environment(0, config.replicas, os.environ)  # a mistake shows before anything is started
    with listening(config.host, config.port) as listener:
        replicas = [Replica(i) for i in range(config.replicas)]
        front = Front(replicas, config)
        options = uvicorn.Config(
            front,
            log_level="warning",
            timeout_graceful_shutdown=1,  # `_stop_on_signals` has let them finish
            lifespan="off",
            ws="none",
            server_header=False,  # the replicas' own pass through
            date_header=False,
        )

        async def start(replica: Replica) -> asyncio.subprocess.Process:
            index, count = replica.index, config.replicas
            told = {"config": replica_config, "replica": index, "cores": own_cores(index, count)}
            environ = environment(index, count, os.environ)
            return await start_process(replica, list(command), told, environ)

        if on_ready:
            on_ready(base_url(listener))
        asyncio.run(_serve(uvicorn.Server(options), listener, front, start))


async def _serve(server, listener, front: Front, start) -> None:
    config, replicas = front.config, front.replicas
    _stop_on_signals(server, front)
    greet, seconds = front.everywhere.catch_up, config.router.health_seconds
    keepers = [asyncio.create_task(keep(r, start, greet, seconds)) for r in replicas]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        # A keeper ends by an error alone.
        await asyncio.wait({serving, *keepers}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = front.closing = True
        await serving
    finally:
        for keeper in keepers:
            keeper.cancel()
        ended = await asyncio.gather(*keepers, return_exceptions=True)
        await asyncio.gather(*(stop(r, config.drain_seconds + 5) for r in replicas))
    for error in ended:
        if not isinstance(error, asyncio.CancelledError):
            raise error


def _stop_on_signals(server, front: Front) -> None:
    """Lets SIGINT and SIGTERM drain the server, and a second one stop it at once.

    While it drains it still listens, so that new requests are told to go elsewhere (503). uvicorn
    would stop listening, and raise the signal again after its shutdown, the replicas undrained.
    """
    draining: list[asyncio.Task] = []

    async def drain() -> None:
        seconds = front.config.drain_seconds
        log.info(
            "draining: running requests may finish for %g s; a second signal stops at once", seconds
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while any(replica.in_flight for replica in front.replicas):
                    await asyncio.sleep(0.02)
        server.should_exit = True

    def stop_serving() -> None:
        if draining:
            server.force_exit = server.should_exit = True
        else:
            front.closing = True
            draining.append(asyncio.create_task(drain()))

    server.capture_signals = contextlib.nullcontext
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop_serving)
