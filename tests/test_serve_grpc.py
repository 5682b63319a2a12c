"""The gRPC contract: what is told, asked and answered, by the public `tritonclient`."""

import asyncio
import json
from dataclasses import replace

import grpc
import openai
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf import text_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import model_config_pb2, service_pb2 as pb, service_pb2_grpc

from internjax.errors import UserError
from internjax.models.lm import SamplingParams
from internjax.models.load import load
from internjax.serve.grpc.contract import INPUTS, OUTPUTS, config_text
from internjax.serve.grpc.server import SERVICE
from internjax.serve.local import LocalLM
from internjax.serve.server import serving
from tests.grpc_client import CONFIG, HI, Stream, face, free_port, infer, tensor, text, texts
from tests.test_serve_engine import make_model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def local(model):
    return LocalLM(model, CONFIG)


@pytest.fixture(scope="module")
def served(model):
    with face(model) as pair:
        yield pair


@pytest.fixture
def client(served):
    with triton.InferenceServerClient(served[0]) as client:
        yield client


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
