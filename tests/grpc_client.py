"""A gRPC server over a tiny model, and how the tests talk to it: by the public `tritonclient`."""

import contextlib
import queue
import socket
import time
from dataclasses import replace

import numpy as np
import tritonclient.grpc as triton

from internjax.serve.engine import Engine
from internjax.serve.grpc.server import Face, serving_grpc
from internjax.serve.thread import EngineThread
from tests.test_serve_engine import CONFIG as ENGINE

# One shape for all tests, that of the engine's own: compiled programs are shared.
CONFIG = replace(ENGINE, max_waiting=64)
KINDS = {"INT32": "i4", "INT64": "i8", "BOOL": "?"}
HI = [{"role": "user", "content": "hi"}]
LONG = {"max_tokens": 200, "ignore_eos": True}


@contextlib.contextmanager
def face(model, config=CONFIG, **options):
    """Serves; yields (address, engine thread)."""
    worker = EngineThread(Engine(model, config))
    shown = Face("tiny", worker, model.tokenizer, model.template, 24, **options)
    try:
        with serving_grpc(shown) as address, contextlib.closing(worker):
            yield address, worker
    finally:
        worker.close()


def tensor(name, values, kind="BYTES", module=triton):
    if kind == "BYTES":
        array = np.array([value.encode() for value in values], np.object_)
    else:
        array = np.array(values, KINDS[kind])
    made = module.InferInput(name, array.shape, kind)
    made.set_data_from_numpy(array)
    return made


def text(*prompts):
    return [tensor("text_input", prompts)]


def infer(client, inputs, outputs=None, **parameters):
    asked = outputs and [triton.InferRequestedOutput(name) for name in outputs]
    return client.infer("tiny", inputs, outputs=asked, parameters=parameters or None)


def texts(result, name="text_output"):
    return [x.decode() for x in result.as_numpy(name)]


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def idle(worker, seconds=20):
    return until(lambda: worker.engine.in_flight() == 0, seconds)


class Stream:
    """A client's stream whose news are read one by one."""

    def __init__(self, client, **options):
        self.client, self.news = client, queue.Queue()
        client.start_stream(lambda result, error: self.news.put((result, error)), **options)

    def ask(self, inputs, id="", **parameters):
        self.client.async_stream_infer(
            "tiny", inputs, request_id=id, parameters=parameters or None,
            enable_empty_final_response=True,
        )  # fmt: skip

    def take(self):
        return self.news.get(timeout=60)

    def until_final(self):
        """Returns every response up to the one that is marked as the last."""
        responses = []
        while True:
            result, error = self.take()
            assert error is None, error
            responses.append(result)
            if result.get_response().parameters["triton_final_response"].bool_param:
                return responses


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
