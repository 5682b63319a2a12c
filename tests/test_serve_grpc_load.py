"""The gRPC server with many clients, with those that leave, and when it is full or closes."""

import asyncio
import queue
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

from internjax.errors import UserError
from internjax.serve.grpc.server import Face, serving_grpc
from internjax.serve.keys import Keys
from tests.grpc_client import CONFIG, LONG, Stream, face, idle, infer, tensor, text, texts, until
from tests.test_serve_engine import make_model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def served(model):
    with face(model) as pair:
        yield pair


@pytest.fixture
def client(served):
    with triton.InferenceServerClient(served[0]) as client:
        yield client


def steps_to_free(worker):
    """Notes for every cancelled request how many decoding steps it outlives its cancellation."""
    engine, waited, begun = worker.engine, [], {}
    cancel, submit = engine.cancel, engine.submit

    def noted_cancel(request):
        begun.setdefault(request.id, engine.stats.steps)
        cancel(request)

    def noted_submit(prompt, params, emit, **more):
        def noted_emit(delta):
            if delta.finish_reason == "cancelled":
                waited.append(engine.stats.steps - begun[request.id])
            emit(delta)

        request = submit(prompt, params, noted_emit, **more)
        return request

    engine.cancel, engine.submit = noted_cancel, noted_submit
    return waited


def test_a_client_that_leaves_frees_its_slot_within_two_steps(model):
    with face(model) as (address, worker):
        waited = steps_to_free(worker)
        with triton.InferenceServerClient(address) as client:
            stream = Stream(client)
            for prompt in ("a", "b"):
                stream.ask(text(prompt), **LONG)
            stream.take()
            client.stop_stream(cancel_requests=True)
            assert idle(worker, 5)
            assert len(waited) == 2
            done = queue.Queue()
            call = client.async_infer(
                "tiny", text("c", "d"), lambda result, error: done.put(error), parameters=LONG
            )
            assert until(lambda: worker.engine.in_flight() == 2)
            call.cancel()
            assert done.get(timeout=10).status() == "StatusCode.CANCELLED"
            assert idle(worker, 5)
            with pytest.raises(InferenceServerException, match="Deadline"):
                client.infer("tiny", text("e"), parameters=LONG, client_timeout=0.05)
            assert idle(worker, 5)
            assert len(waited) == 5
            assert max(waited) <= 2
            assert worker.engine.stats.cancelled == 5
            fail = client.get_inference_statistics("tiny").model_stats[0].inference_stats.fail
            assert fail.count == 5
            assert texts(infer(client, text("abc"), max_tokens=3))


def test_streams_dropped_at_random_leave_nothing_behind(served):
    async def storm():
        async with triton_aio.InferenceServerClient(served[0]) as client:

            async def leave(i):
                async def requests():
                    inputs = [tensor("text_input", [f"prompt {i}"], module=triton_aio)]
                    yield {"model_name": "tiny", "inputs": inputs, "parameters": LONG}

                stream = client.stream_infer(requests())
                for _ in range(i % 3):
                    _, error = await anext(stream)
                    assert error is None
                stream.cancel()

            await asyncio.gather(*map(leave, range(40)))

    asyncio.run(storm())
    assert idle(served[1])
    with triton.InferenceServerClient(served[0]) as client:
        assert texts(infer(client, text("abc"), max_tokens=3))


def test_many_clients_get_what_they_would_get_alone(served):
    def ask(seed):
        with triton.InferenceServerClient(served[0]) as client:
            return texts(infer(client, text("abc"), max_tokens=8, temperature=1.0, seed=seed))[0]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
    assert together == [ask(seed) for seed in range(8)]
    assert len(set(together)) > 1


def test_statistics_count_what_was_answered(client):
    read = lambda: client.get_inference_statistics("tiny").model_stats[0]  # noqa: E731
    before = read()
    infer(client, text("abc", "xyz"), max_tokens=4, ignore_eos=True)
    after = read()
    assert after.inference_count == before.inference_count + 2
    assert after.execution_count >= before.execution_count + 4
    assert after.last_inference >= before.last_inference > 1.7e12
    a, b = after.inference_stats, before.inference_stats
    assert a.success.count == b.success.count + 2
    whole = a.success.ns - b.success.ns
    parts = (a.compute_input.ns - b.compute_input.ns) + (a.compute_infer.ns - b.compute_infer.ns)
    assert 0 < whole < 60e9
    assert abs(whole - parts) < 1e3


def threads():
    return [t for t in threading.enumerate() if t.name == "grpc"]


def test_queue_key_size_and_closing(model):
    small, before = replace(CONFIG, max_waiting=1), len(threads())
    keys = Keys(None, "secret")
    options = {"knows": lambda key: keys.owner(key) is not None, "max_message_bytes": 20_000}
    options["max_request_tokens"] = 250
    key = {"authorization": "Bearer secret"}
    with face(model, small, **options) as (address, worker):
        with grpc.insecure_channel(address) as channel:
            lights = health_pb2_grpc.HealthStub(channel)
            assert lights.Check(health_pb2.HealthCheckRequest()).status == 1
        with triton.InferenceServerClient(address) as client:
            for wrong in (None, {"authorization": "Bearer secre"}, {"authorization": "secret"}):
                with pytest.raises(InferenceServerException) as caught:
                    client.infer("tiny", text("a"), headers=wrong)
                assert caught.value.status() == "StatusCode.UNAUTHENTICATED"
            stream = Stream(client)
            _, error = stream.take()
            assert error.status() == "StatusCode.UNAUTHENTICATED"
            client.stop_stream()
            with pytest.raises(InferenceServerException, match=r"larger|max") as caught:
                client.infer("tiny", text("x" * 30_000), headers=key)
            assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
            with pytest.raises(InferenceServerException, match=r"255 tokens.*250") as caught:
                client.infer("tiny", text("x" * 55), parameters=LONG, headers=key)
            assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
            stream = Stream(client, headers=key)
            for place in range(1, CONFIG.slots + 1):
                stream.ask(text("a"), **LONG)
                assert until(lambda n=place: len(worker.engine.scheduler.running()) == n)
            stream.ask(text("b"), **LONG)  # waits
            assert until(lambda: worker.engine.in_flight() == CONFIG.slots + 1)
            with pytest.raises(InferenceServerException, match="waiting") as caught:
                client.infer("tiny", text("c"), headers=key)
            assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
            worker.close()
            errors = []
            while len(errors) < CONFIG.slots + 1:
                errors += [e for e in [stream.take()[1]] if e]
            assert all("shutting down" in e.message() for e in errors)
            with pytest.raises(InferenceServerException) as caught:
                client.infer("tiny", text("c"), headers=key)
            assert caught.value.status() == "StatusCode.UNAVAILABLE"
            assert not client.is_server_ready(headers=key)
            assert not client.is_model_ready("tiny", headers=key)
            client.stop_stream()
        port = int(address.rpartition(":")[2])
        shown = Face("tiny", worker, model.tokenizer, model.template)
        with (
            pytest.raises(UserError, match=rf":{port}.*grpc_port=0"),
            serving_grpc(shown, port=port),
        ):
            pass
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        pass
    assert len(threads()) == before


def test_a_failed_round_fails_its_requests_and_no_others(model):
    with face(model) as (address, worker), triton.InferenceServerClient(address) as client:
        engine, step = worker.engine, worker.engine.step

        def fail():
            if engine.scheduler.running():
                engine.step = step
                raise RuntimeError("broken on purpose")
            return step()

        engine.step = fail
        with pytest.raises(InferenceServerException, match=r"on purpose.*request 1") as caught:
            infer(client, text("abc"), max_tokens=3)
        assert caught.value.status() == "StatusCode.INTERNAL"
        assert texts(infer(client, text("abc"), max_tokens=3))
