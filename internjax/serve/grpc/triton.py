"""The engine inside a Triton server: a model of its Python backend, whose answers stream.

Requests and replies are those of our own gRPC server (`asked`, `replies`); only what carries them
differs. `triton_python_backend_utils` exists in Triton's own process and nowhere else.
"""

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from pydantic import TypeAdapter, ValidationError

from internjax.errors import UserError
from internjax.models.load import load
from internjax.serve.engine import Engine, EngineConfig
from internjax.serve.grpc.asked import Served, read_request
from internjax.serve.grpc.contract import INPUTS, OUTPUTS
from internjax.serve.grpc.replies import AnswerFailed, AnswerStopped, Reply, answer
from internjax.serve.scheduler import QueueFull, Request
from internjax.serve.thread import EngineClosed, EngineThread

log = logging.getLogger(__name__)

POLL_SECONDS = 0.02
CODES = {
    UserError: "INVALID_ARG",
    QueueFull: "UNAVAILABLE",
    EngineClosed: "UNAVAILABLE",
    AnswerStopped: "UNAVAILABLE",
    AnswerFailed: "INTERNAL",
}
"""Names of `pb_utils.TritonError`, which is not there yet when Triton only reads the model."""


class EngineModel:
    """What `model.py` of a repository derives its `TritonPythonModel` from.

    Fields:
      folder: of the weights; the class that derives says it.
    """

    folder: Path

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the weights and starts the engine with the parameters of `config.pbtxt`."""
        config = json.loads(args["model_config"])
        given = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        dtype = given.pop("dtype", "float32")
        default_max_tokens = int(given.pop("default_max_tokens", "512"))
        model = load(self.folder, dtype=dtype, packed=True)
        self.engine = EngineThread(Engine(model, read_engine(given)))
        name = args["model_name"]
        self.model = Served(name, self.engine, model.tokenizer, model.template, default_max_tokens)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="answers", daemon=True)
        self.thread.start()

    def execute(self, requests: list) -> None:
        """Takes requests and returns at once; their answers are sent as they come."""
        for request in requests:
            sender = _Sender(request.get_response_sender())
            asyncio.run_coroutine_threadsafe(self._serve(_read(request), sender), self.loop)

    def finalize(self) -> None:
        """Ends what runs, and stops."""
        self.engine.close()
        asyncio.run_coroutine_threadsafe(_rest(), self.loop).result(timeout=60)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(timeout=60)
        self.loop.close()

    async def _serve(self, given: "_Given", sender: "_Sender") -> None:
        answering = asyncio.create_task(self._answer(given, sender))
        while not answering.done():
            await asyncio.wait([answering], timeout=POLL_SECONDS)
            if sender.abandoned():
                answering.cancel()
        error = _error(answering)
        if error is not None:
            sender.send(pb_utils.InferenceResponse(error=error), final=True)

    async def _answer(self, given: "_Given", sender: "_Sender") -> None:
        parameters = json.loads(given.parameters or "{}")
        asked = read_request(self.model, given.inputs, parameters, given.outputs, stream=False)
        async with contextlib.aclosing(answer(self.engine, asked, _ignore)) as replies:
            async for reply in replies:
                sender.send(_response(reply), final=reply.final)


@dataclass(frozen=True)
class _Given:
    """What a request holds; Triton may take the request itself back once `execute` has returned."""

    inputs: dict[str, np.ndarray]
    parameters: str
    outputs: tuple[str, ...]


class _Sender:
    """Triton's sender of one request, which must not be touched after the final response.

    Triton has freed it then: asking whether the client has gone would crash the whole server.
    """

    def __init__(self, sender):
        self._sender, self._open = sender, True

    def send(self, response, *, final: bool) -> None:
        """Sends a response; nothing may follow the final one."""
        self._open = not final
        self._sender.send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)

    def abandoned(self) -> bool:
        """Whether the client has gone while it still had something to come."""
        return self._open and self._sender.is_cancelled()


def read_engine(given: Mapping[str, str]) -> EngineConfig:
    """Reads the engine's configuration from the strings of `config.pbtxt`.

    Raises:
      UserError: an unknown name, a wrong value.
    """
    legal = [field.name for field in fields(EngineConfig)]
    unknown = next((name for name in given if name not in legal), None)
    if unknown is not None:
        names = ", ".join(["dtype", "default_max_tokens", *legal])
        raise UserError(f"parameters: no {unknown} here; legal are {names}.")
    try:
        return TypeAdapter(EngineConfig).validate_strings(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise UserError(f"parameters: {'.'.join(map(str, first['loc']))} {first['msg']}") from error


def _read(request) -> _Given:
    names = tuple(request.requested_output_names())
    if len(names) == len(OUTPUTS):  # so Triton says that the client named none
        names = ()
    return _Given(_inputs(request), request.parameters(), names)


def _inputs(request) -> dict[str, np.ndarray]:
    found = {t.name: pb_utils.get_input_tensor_by_name(request, t.name) for t in INPUTS}
    return {name: tensor.as_numpy().copy() for name, tensor in found.items() if tensor is not None}


def _response(reply: Reply) -> Any:
    tensors = [pb_utils.Tensor(name, array) for name, array in reply.arrays.items()]
    return pb_utils.InferenceResponse(tensors)


def _error(task: asyncio.Task) -> Any:
    """Returns how an answer that has ended broke off, None if it did not."""
    if task.cancelled():
        return _triton_error("CANCELLED", "the client has gone away.")
    error = task.exception()
    if error is None:
        return None
    code = next((code for kind, code in CODES.items() if isinstance(error, kind)), None)
    if code is None:  # the process's border: this request fails, Triton goes on
        log.error("a request failed", exc_info=error)
        return _triton_error("INTERNAL", f"internal error: {type(error).__name__}")
    return _triton_error(code, str(error))


def _triton_error(code: str, message: str) -> Any:
    return pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))


async def _rest() -> None:
    """Waits until all answers have been sent."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=30)


def _ignore(request: Request) -> None:
    """Triton keeps the statistics."""
