"""Starts and stops the gRPC server beside the HTTP server: same engine, same process."""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tritonclient.grpc.service_pb2_grpc import add_GRPCInferenceServiceServicer_to_server

from internjax.errors import UserError
from internjax.serve.grpc.asked import Served
from internjax.serve.grpc.servicer import Inference

SERVICE = "inference.GRPCInferenceService"
POLL_SECONDS = 0.05
FLUSH_SECONDS = 0.5
"""How long the last messages may be on their way after the last request has ended."""
RUN, DRAIN, STOP = 0, 1, 2


@dataclass(frozen=True)
class Face(Served):
    """The served model as the gRPC server shows it.

    Fields:
      knows: whether a key may ask; None lets everybody.
      max_message_bytes: larger requests are refused.
    """

    knows: Callable[[str], bool] | None = None
    max_message_bytes: int = 4 << 20


@contextlib.contextmanager
def serving_grpc(
    face: Face,
    host: str = "127.0.0.1",
    port: int = 0,
    drain_seconds: float = 0.0,
    phase: Callable[[], int] = lambda: RUN,
) -> Iterator[str]:
    """Serves in a background thread while the block runs; yields "HOST:PORT".

    Args:
      port: 0 lets the system choose.
      drain_seconds: how long running requests may finish after the block, or after `phase` said
        DRAIN (new ones are refused from then on) and until it says STOP.

    Raises:
      UserError: the port is taken.
    """
    left = threading.Event()
    bound: concurrent.futures.Future[str] = concurrent.futures.Future()

    async def run() -> None:
        server, lights = _build(face)
        await _light(lights, face.engine.ready)
        try:
            bound.set_result(await _listen(server, host, port))
        except UserError as error:
            bound.set_exception(error)
            return
        finally:
            if not bound.done():  # whoever waits must not wait for ever
                bound.cancel()
        while phase() == RUN and not left.is_set():
            await _light(lights, face.engine.ready)
            await asyncio.sleep(POLL_SECONDS)
        await lights.enter_graceful_shutdown()
        stopping = asyncio.create_task(server.stop(drain_seconds))
        while not stopping.done():
            await asyncio.wait([stopping], timeout=POLL_SECONDS)
            # A stream that is open without a running request would hold the drain to its end.
            if phase() == STOP or not face.engine.in_flight():
                await server.stop(FLUSH_SECONDS)

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="grpc", daemon=True)
    thread.start()
    try:
        yield bound.result()
    finally:
        left.set()
        thread.join(timeout=drain_seconds + 30)


def _build(face: Face):
    """Returns a server and its health service."""
    server = grpc.aio.server(
        interceptors=[_Guard(face.knows)] if face.knows else [],
        options=[
            ("grpc.max_receive_message_length", face.max_message_bytes),
            ("grpc.so_reuseport", 0),  # else two servers share a port and nobody is told
        ],
    )
    add_GRPCInferenceServiceServicer_to_server(Inference(face), server)
    lights = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(lights, server)
    return server, lights


async def _light(lights: health.aio.HealthServicer, serving: bool) -> None:
    kinds = health_pb2.HealthCheckResponse
    status = kinds.SERVING if serving else kinds.NOT_SERVING
    for name in ("", SERVICE):
        await lights.set(name, status)


async def _listen(server: grpc.aio.Server, host: str, port: int) -> str:
    try:
        chosen = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise UserError(
            f"cannot listen on {host}:{port} for gRPC: another program may hold the port; give "
            "grpc_port=0 or another one."
        ) from error
    await server.start()
    return f"{host}:{chosen}"


class _Guard(grpc.aio.ServerInterceptor):
    """Refuses calls without the key; health checks need none."""

    def __init__(self, knows: Callable[[str], bool]):
        self.knows = knows

    async def intercept_service(self, continuation, details: grpc.HandlerCallDetails):
        handler = await continuation(details)
        if handler is None or details.method.startswith("/grpc.health.v1.Health/"):
            return handler
        given = dict(details.invocation_metadata).get("authorization", "")
        kind, _, key = given.partition(" ")
        if kind.lower() == "bearer" and self.knows(key.strip()):
            return handler
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(_refuse)
        return grpc.unary_unary_rpc_method_handler(_refuse)


async def _refuse(request, context: grpc.aio.ServicerContext):
    message = "give the API key as metadata `authorization: Bearer KEY`."
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)
