"""What the gRPC server refuses, with the status and the reason."""

import grpc
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as pb, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from internjax.errors import UserError
from internjax.serve.server import ServeConfig
from tests.grpc_client import Stream, face, infer, tensor, text
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


def test_ports_and_limits_that_cannot_be_are_refused():
    for options, says in (
        ({"grpc_port": 70_000}, "grpc_port=70000"),
        ({"grpc_port": 0, "tokens_per_minute": 5}, "limits are counted over HTTP only"),
    ):
        with pytest.raises(UserError, match=says):
            ServeConfig(**options)
