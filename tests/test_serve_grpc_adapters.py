"""Adapters over gRPC: each a model of the protocol, loaded and unloaded while the server runs."""

import httpx2 as httpx
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from internjax.models.peft import save_adapter
from internjax.serve.server import serving
from tests.grpc_client import Stream, free_port, tensor
from tests.test_serve_adapters import CONFIG, jobs, make_adapter, make_engine, play
from tests.test_serve_engine import make_model, prompts

GREEDY = {"max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def model():
    return make_model(128, num_layers=1)  # compiles in half the time


@pytest.fixture(scope="module")
def want(model):
    """What the engine says when it is asked without a server."""
    heard = play(make_engine(model, "ca"), jobs("", "c", "a"))
    named = zip(("tiny", "first", "late"), heard, strict=True)
    ids = {name: [entry.id for entry in entries] for name, entries in named}
    assert len(set(map(tuple, ids.values()))) == 3, "they differ"
    return ids


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    """Gives the HTTP server's base URL and a gRPC client."""
    root, port = tmp_path_factory.mktemp("adapters"), free_port()
    for name in "ac":
        save_adapter(root / name, *make_adapter(model, name), "tiny")
    options = {"adapters": {"first": str(root / "c")}, "adapters_dir": str(root), "name": "tiny"}
    with (
        serving(model, engine=CONFIG, grpc_port=port, **options) as url,
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
    ):
        yield url, client


def prompt():
    return [tensor("input_ids", [prompts(40)[0]], "INT32")]


def ask(client, name):
    result = client.infer(name, prompt(), parameters=GREEDY)
    assert result.get_response().model_name == name
    return result.as_numpy("output_ids")[0].tolist()


def models(client):
    index = client.get_model_repository_index().models
    return {entry.name: entry.state for entry in index}


def counts(client):
    found = client.get_inference_statistics().model_stats
    return {entry.name: entry.inference_count for entry in found}


def post(url, path, **body):
    answer = httpx.post(f"{url}/{path}_lora_adapter", json=body, timeout=60)
    assert answer.status_code == 200, answer.text


def test_an_adapter_is_a_model(served, want):
    _, client = served
    for name in ("tiny", "first"):
        assert client.is_model_ready(name)
        assert client.is_model_ready(name, "1")
        assert not client.is_model_ready(name, "2")
        assert client.get_model_metadata(name).name == name
        assert client.get_model_config(name).config.name == name
        before = counts(client)
        assert ask(client, name) == want[name]
        grown = {key: value - before[key] for key, value in counts(client).items()}
        assert grown == {"tiny": 0, "first": 0} | {name: 1}
    assert models(client) == {"tiny": "READY", "first": "READY"}


def test_one_stream_carries_several_models(served, want):
    _, client = served
    stream = Stream(client)
    for name in ("first", "tiny"):
        client.async_stream_infer(
            name, prompt(), request_id=name, parameters=GREEDY, enable_empty_final_response=True
        )
    heard, ended = {"first": [], "tiny": []}, 0
    while ended < 2:
        result, error = stream.take()
        assert error is None
        response = result.get_response()
        assert response.model_name == response.id
        heard[response.id] += result.as_numpy("output_ids")[0].tolist()
        ended += response.parameters["triton_final_response"].bool_param
    assert heard == {name: want[name] for name in heard}
    client.stop_stream()


def test_adapters_come_and_go(served, want):
    url, client = served
    with pytest.raises(InferenceServerException, match=r"'late'.*tiny, first") as caught:
        ask(client, "late")
    assert caught.value.status() == "StatusCode.NOT_FOUND"
    assert not client.is_model_ready("late")
    post(url, "load", lora_name="late", lora_path="a")
    assert client.is_model_ready("late")
    assert models(client) == dict.fromkeys(("tiny", "first", "late"), "READY")
    assert ask(client, "late") == want["late"]
    post(url, "unload", lora_name="late")
    assert models(client) == dict.fromkeys(("tiny", "first"), "READY")
    for call in (lambda: ask(client, "late"), lambda: client.get_model_metadata("late")):
        with pytest.raises(InferenceServerException) as caught:
            call()
        assert caught.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException, match="over gRPC") as caught:
        client.load_model("late")
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
    assert ask(client, "tiny") == want["tiny"]
