"""The gRPC contract: the public `tritonclient` against a real server on a tiny random model."""

import asyncio
import contextlib
import json
import queue
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import numpy as np
import openai
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf import text_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import model_config_pb2, service_pb2 as pb, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from internjax.errors import UserError
from internjax.models.lm import SamplingParams
from internjax.models.load import load
from internjax.serve.engine import Engine
from internjax.serve.grpc.contract import INPUTS, OUTPUTS, config_text
from internjax.serve.grpc.server import SERVICE, Face, serving_grpc
from internjax.serve.keys import Keys
from internjax.serve.local import LocalLM
from internjax.serve.server import ServeConfig, serving
from internjax.serve.thread import EngineThread
from tests.test_serve_engine import CONFIG as ENGINE, make_model

# One shape for all tests, that of the engine's own: compiled programs are shared.
CONFIG = replace(ENGINE, max_waiting=64)
KINDS = {"INT32": "i4", "INT64": "i8", "BOOL": "?"}
HI = [{"role": "user", "content": "hi"}]
LONG = {"max_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def local(model):
    return LocalLM(model, CONFIG)


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


@pytest.fixture(scope="module")
def served(model):
    with face(model) as pair:
        yield pair


@pytest.fixture
def client(served):
    with triton.InferenceServerClient(served[0]) as client:
        yield client


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


# What is told about the server --------------------------------------------------------------


def test_it_says_what_it_serves(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("tiny", "2")
    assert not client.is_model_ready("other")
    server = client.get_server_metadata()
    assert server.name == "internjax"
    about = client.get_model_metadata("tiny")
    assert [x.name for x in about.inputs] == [x.name for x in INPUTS]
    assert [x.name for x in about.outputs] == [x.name for x in OUTPUTS]
    assert list(about.versions) == ["1"]
    config = client.get_model_config("tiny").config
    assert config.model_transaction_policy.decoupled
    assert config.parameters["slots"].string_value == "4"
    (entry,) = client.get_model_repository_index().models
    assert (entry.name, entry.version, entry.state) == ("tiny", "1", "READY")


def test_health_is_the_standard_service(served):
    with grpc.insecure_channel(served[0]) as channel:
        lights = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = lights.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            lights.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_config_text_is_legal_whatever_the_name():
    name = 'a "b"\\c'
    text = config_text(name, "python", {"slots": "4"})
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.name == name
    assert [x.name for x in config.input] == [x.name for x in INPUTS]
    assert all(x.optional for x in config.input)
    assert config.input[2].data_type == model_config_pb2.TYPE_INT32
    assert list(config.input[2].dims) == [-1, -1]


# Answers ------------------------------------------------------------------------------------


def test_every_form_of_prompt_answers_as_local(client, local):
    params = SamplingParams(max_tokens=12)
    raw = local.generate(["abc"], params)[0]
    chat = local.generate([HI], params)[0]
    for inputs in (
        text("abc"),
        [tensor("input_ids", [[97, 98, 99]], "INT32")],
        [tensor("input_ids", [97, 98, 99], "INT64")],
        [tensor("input_ids", [[97, 98, 99, 7]], "INT32"), tensor("input_lengths", [3], "INT32")],
    ):
        result = infer(client, inputs, max_tokens=12)
        assert texts(result) == [raw.text]
        assert result.as_numpy("output_ids").tolist() == [list(raw.token_ids)]
        assert texts(result, "finish_reason") == [raw.finish_reason]
        assert result.as_numpy("num_input_tokens").tolist() == [3]
        assert result.as_numpy("num_output_tokens").tolist() == [len(raw.token_ids)]
        assert result.as_numpy("logprobs") is None
    result = infer(client, [tensor("messages", [json.dumps(HI)])], max_tokens=12)
    assert texts(result) == [chat.text]


def test_rows_of_one_request_answer_as_alone(client):
    prompts = ["abc", "a longer prompt than the others", "x"]
    own = [{"max_tokens": 5}, {"max_tokens": 9, "temperature": 1.0, "seed": 3}, {"max_tokens": 2}]
    pairs = list(zip(prompts, own, strict=True))
    alone = [infer(client, text(p), **o, ignore_eos=True) for p, o in pairs]
    rows = [*text(*prompts), tensor("sampling_parameters", [json.dumps(o) for o in own])]
    together = infer(client, rows, ignore_eos=True)
    assert texts(together) == [texts(a)[0] for a in alone]
    ids = together.as_numpy("output_ids")
    assert ids.shape == (3, 9)
    assert (ids[0, 5:] == -1).all()
    assert [r[r >= 0].tolist() for r in ids] == [
        a.as_numpy("output_ids")[0].tolist() for a in alone
    ]
    assert together.as_numpy("num_output_tokens").tolist() == [5, 9, 2]
    assert together.as_numpy("row").tolist() == [0, 1, 2]


def test_parameters_are_obeyed(client):
    whole = texts(infer(client, text("abc"), max_tokens=24, ignore_eos=True))[0]
    stop = whole[4:6]
    cut = infer(client, text("abc"), max_tokens=24, ignore_eos=True, stop=stop)
    assert texts(cut) == [whole[: whole.index(stop)]]
    assert texts(cut, "finish_reason") == ["stop"]
    warm = {"temperature": 1.0, "seed": 5, "max_tokens": 12}
    assert texts(infer(client, text("a"), **warm)) == texts(infer(client, text("a"), **warm))
    json_form = tensor("sampling_parameters", [json.dumps({
        "max_tokens": 3, "logit_bias": {"65": 100}, "logprobs": 2})])  # fmt: skip
    result = infer(client, [*text("abc"), json_form])
    assert texts(result) == ["AAA"]
    entries = json.loads(texts(result, "logprobs")[0])
    assert [e["id"] for e in entries] == [65, 65, 65]
    assert all(len(e["top"]) == 2 and e["logprob"] <= e["top"][0][1] for e in entries)
    form = tensor("sampling_parameters", [json.dumps({"grammar": {"choice": ["left", "right"]}})])
    assert texts(infer(client, [*text("abc"), form]))[0] in ("left", "right")
    # Length of the answer when none is named.
    assert infer(client, text("a"), ignore_eos=True).as_numpy("num_output_tokens").tolist() == [24]


def test_asked_outputs_come_and_no_others(client):
    result = infer(client, text("abc"), ["logprobs", "output_ids"], max_tokens=4)
    assert [x.name for x in result.get_response().outputs] == ["output_ids", "logprobs"]
    entries = json.loads(texts(result, "logprobs")[0])
    assert [e["id"] for e in entries] == result.as_numpy("output_ids")[0].tolist()
    assert all(e["top"] == [] and e["logprob"] <= 0 for e in entries)


def test_contents_may_be_typed_instead_of_raw(served, local):
    expected = local.generate(["abc"], SamplingParams(max_tokens=6))[0].text
    request = pb.ModelInferRequest(model_name="tiny", id="7")
    request.parameters["max_tokens"].int64_param = 6
    entry = request.inputs.add(name="input_ids", datatype="INT64", shape=[1, 3])
    entry.contents.int64_contents.extend([97, 98, 99])
    with grpc.insecure_channel(served[0]) as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
        assert triton.InferResult(answer).as_numpy("text_output")[0].decode() == expected
        assert answer.id == "7"
        entry.name, entry.datatype = "text_input", "BYTES"
        entry.ClearField("contents")
        del entry.shape[:]
        entry.shape.append(1)
        entry.contents.bytes_contents.append(b"abc")
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
        assert triton.InferResult(answer).as_numpy("text_output")[0].decode() == expected


# Streams ------------------------------------------------------------------------------------


def test_stream_equals_whole_and_marks_its_end(client):
    whole = infer(client, text("abc"), max_tokens=12)
    stream = Stream(client)
    stream.ask(text("abc"), "a", max_tokens=12)
    news = stream.until_final()
    assert "".join(texts(n)[0] for n in news) == texts(whole)[0]
    ids = [i for n in news for i in n.as_numpy("output_ids")[0].tolist()]
    assert ids == whole.as_numpy("output_ids")[0].tolist()
    assert len(news) == len(ids)
    assert [texts(n, "finish_reason")[0] for n in news][:-1] == [""] * (len(news) - 1)
    assert texts(news[-1], "finish_reason") == texts(whole, "finish_reason")
    assert [int(n.as_numpy("num_output_tokens")[0]) for n in news] == list(range(1, len(ids) + 1))
    assert {n.get_response().id for n in news} == {"a"}
    stream.ask([*text("abc"), tensor("stream", [False], "BOOL")], max_tokens=12)
    (only,) = stream.until_final()
    assert texts(only) == texts(whole)
    client.stop_stream()


def test_one_stream_carries_many_requests_and_rows(client):
    prompts = {"a": ("abc",), "b": ("xyz", "q")}
    whole = {k: texts(infer(client, text(*v), max_tokens=10)) for k, v in prompts.items()}
    stream = Stream(client)
    for key, rows in prompts.items():
        stream.ask(text(*rows), key, max_tokens=10)
    got = {key: [""] * len(rows) for key, rows in prompts.items()}
    finals = []
    while len(finals) < 2:
        result, error = stream.take()
        assert error is None
        response = result.get_response()
        got[response.id][int(result.as_numpy("row")[0])] += texts(result)[0]
        if response.parameters["triton_final_response"].bool_param:
            finals.append(response.id)
    assert got == whole
    assert sorted(finals) == ["a", "b"]
    client.stop_stream()


def test_async_client_answers_and_streams(served):
    async def ask():
        async with triton_aio.InferenceServerClient(served[0]) as client:
            inputs = [tensor("text_input", ["abc"], module=triton_aio)]
            whole = await client.infer("tiny", inputs, parameters={"max_tokens": 8})

            async def requests():
                yield {"model_name": "tiny", "inputs": inputs, "parameters": {"max_tokens": 8}}

            pieces = []
            async for result, error in client.stream_infer(requests()):
                assert error is None
                pieces.append(result.as_numpy("text_output")[0].decode())
            return whole.as_numpy("text_output")[0].decode(), pieces

    whole, pieces = asyncio.run(ask())
    assert "".join(pieces) == whole
    assert len(pieces) > 1


# Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "parameters", "says"),
    [
        ([], {}, "text_input, messages, input_ids"),
        ([*text("a"), tensor("input_ids", [[1]], "INT32")], {}, "text_input and input_ids"),
        (text(), {}, "empty"),
        (text(""), {}, "empty"),
        (text("x" * 600), {}, "600.*256"),
        (text("a"), {"max_tokens": 256}, "257.*256"),
        (text("a"), {"tempreature": 1.0}, "tempreature.*temperature"),
        (text("a"), {"temperature": -1.0}, "temperature"),
        (text("a"), {"max_tokens": "many"}, "max_tokens"),
        (text("a"), {"logprobs": 99}, "logprobs"),
        (text("a"), {"stream": 1}, "stream=1"),
        (text("a"), {"stream": True}, "ModelStreamInfer"),
        ([*text("a"), tensor("stream", [True], "BOOL")], {"stream": True}, "stream"),
        ([*text("a"), tensor("stream", [True, False], "BOOL")], {}, "one value"),
        ([*text("a"), tensor("exclude_input_in_output", [False], "BOOL")], {}, "exclude_input"),
        ([*text("a"), tensor("sampling_parameters", ["{"])], {}, "JSON"),
        ([*text("a"), tensor("sampling_parameters", ["[" * 100_000])], {}, "JSON"),
        ([*text("a"), tensor("sampling_parameters", ["3"])], {}, "object"),
        ([*text("a"), tensor("sampling_parameters", ["{}", "{}"])], {}, "1 or 1"),
        ([*text("a"), tensor("sampling_parameters", ['{"seed": 1}'])], {"seed": 1}, "seed"),
        ([*text("a"), tensor("sampling_parameters", ['{"logit_bias": {"999": 1}}'])], {}, "999"),
        ([*text("a"), tensor("sampling_parameters", ['{"grammar": {"regex": "("}}'])], {}, "regex"),
        ([*text("a"), tensor("input_lengths", [1], "INT32")], {}, "input_lengths"),
        ([tensor("input_ids", [[1, 300]], "INT32")], {}, "300"),
        ([tensor("input_ids", [[1, -1]], "INT64")], {}, "-1"),
        ([tensor("input_ids", [[[1]]], "INT32")], {}, "shape"),
        ([tensor("input_ids", [[1], [2]], "INT32"), tensor("input_lengths", [1, 2], "INT32")], {},
         "input_lengths"),
        ([tensor("messages", ["[]"])], {}, "messages"),
        ([tensor("messages", ['[{"role": "robot", "content": "x"}]'])], {}, "robot"),
        ([tensor("prompt", ["a"])], {}, "prompt.*text_input"),
        ([tensor("text_input", [1], "INT32")], {}, "BYTES"),
        ([*text("a"), *text("b")], {}, "twice"),
    ],
)  # fmt: skip
def test_what_cannot_be_obeyed_is_refused_with_the_reason(client, inputs, parameters, says):
    with pytest.raises(InferenceServerException, match=says) as caught:
        infer(client, inputs, **parameters)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def broken(change):
    request = pb.ModelInferRequest(model_name="tiny")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(b"\x01\x00\x00\x00a")
    change(request)
    return request


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda r: setattr(r, "model_name", "other"), "NOT_FOUND", "other.*tiny"),
        (lambda r: setattr(r, "model_version", "3"), "NOT_FOUND", "3.*tiny"),
        (lambda r: r.raw_input_contents.append(b""), "INVALID_ARGUMENT", "2 for 1"),
        (lambda r: r.inputs[0].shape.append(2), "INVALID_ARGUMENT", "shape"),
        (lambda r: r.inputs[0].shape.__setitem__(0, -1), "INVALID_ARGUMENT", "shape"),
        (lambda r: r.raw_input_contents.__setitem__(0, b"\x01\x00"), "INVALID_ARGUMENT", "within"),
        (lambda r: r.raw_input_contents.__setitem__(0, b"\xff\xff\xff\xffa"), "INVALID_ARGUMENT",
         "within"),
        (lambda r: r.raw_input_contents.__setitem__(0, b"\x01\x00\x00\x00\xff"),
         "INVALID_ARGUMENT", "UTF-8"),
        (lambda r: r.parameters["seed"], "INVALID_ARGUMENT", "no value"),
        (lambda r: r.outputs.add(name="logits"), "INVALID_ARGUMENT", "logits.*output_ids"),
        (lambda r: r.inputs[0].parameters["shared_memory_region"], "INVALID_ARGUMENT", "shared"),
    ],
)  # fmt: skip
def test_malformed_messages_are_refused(served, change, code, says):
    with grpc.insecure_channel(served[0]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError, match=says) as caught:
            stub.ModelInfer(broken(change))
    assert caught.value.code() == grpc.StatusCode[code]


def test_what_is_not_served_says_so(client):
    for call in (
        client.get_model_metadata,
        client.get_model_config,
        client.get_inference_statistics,
    ):
        with pytest.raises(InferenceServerException, match="tiny") as caught:
            call("other")
        assert caught.value.status() == "StatusCode.NOT_FOUND"
    for call in (
        lambda: client.load_model("tiny"),
        lambda: client.get_system_shared_memory_status(),
        lambda: client.get_log_settings(),
    ):
        with pytest.raises(InferenceServerException) as caught:
            call()
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


def test_errors_of_a_stream_leave_it_open_or_end_it(served, client):
    stream = Stream(client)
    stream.ask(text("a"), max_tokens=9999)
    result, error = stream.take()
    assert result is None
    assert "9999" in error.message()
    stream.ask(text("abc"), max_tokens=3)
    assert stream.until_final()
    client.stop_stream()
    with triton.InferenceServerClient(served[0]) as strict:
        stream = Stream(strict, headers={"triton_grpc_error": "true"})
        stream.ask(text("a"), max_tokens=9999)
        _, error = stream.take()
        assert error.status() == "StatusCode.INVALID_ARGUMENT"
        assert "9999" in error.message()


# Load ---------------------------------------------------------------------------------------


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


@pytest.mark.needs_model
def test_smollm2_answers_over_grpc(smollm2_gguf):
    model, config = load(smollm2_gguf, packed=True), replace(CONFIG, slots=2)
    question = [{"role": "user", "content": "Name three colours."}]
    expected = LocalLM(model, config).generate([question], SamplingParams(max_tokens=24))[0]
    assert len(expected.text.split()) > 3
    with face(model, config) as (address, _), triton.InferenceServerClient(address) as client:
        chat = [tensor("messages", [json.dumps(question)])]
        assert texts(infer(client, chat, max_tokens=24)) == [expected.text]
        stream = Stream(client)
        stream.ask(chat, max_tokens=24)
        pieces = [texts(news)[0] for news in stream.until_final()]
        assert "".join(pieces) == expected.text
        assert len(pieces) == len(expected.token_ids)
        client.stop_stream()


def test_ports_and_limits_that_cannot_be_are_refused():
    for options, says in (
        ({"grpc_port": 70_000}, "grpc_port=70000"),
        ({"grpc_port": 0, "tokens_per_minute": 5}, "limits are counted over HTTP only"),
    ):
        with pytest.raises(UserError, match=says):
            ServeConfig(**options)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_openai_and_grpc_are_two_faces_of_one_engine(model):
    port = free_port()
    with (
        serving(model, name="tiny", engine=CONFIG, grpc_port=port) as url,
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        http = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        options = {"max_tokens": 12, "temperature": 1.0, "seed": 4}
        expected = http.completions.create(model="tiny", prompt="abc", **options).choices[0].text
        assert texts(infer(client, text("abc"), **options)) == [expected]
        # Steps of both are counted by the one engine.
        assert client.get_inference_statistics("tiny").model_stats[0].execution_count >= 24
        with pytest.raises(UserError, match=str(port)), serving(model, grpc_port=port):
            pass
