"""A Triton model repository: its config is legal, its model.py answers as our own server does.

The one package of Triton that runs without a container (nvidia-pytriton 0.7) is built for NumPy 1
and cannot hand tensors to code with NumPy 2, so `triton_python_backend_utils` is stood in for by a
module that carries tensors between the test and the real model, and minds Triton's rules.
"""

import importlib.util
import json
import queue
import sys
import types

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import triton_to_np_dtype

from internjax import cli
from internjax.errors import UserError
from internjax.models.convert import read_model
from internjax.models.lm import SamplingParams
from internjax.models.load import load
from internjax.models.native import save_native
from internjax.serve.engine import EngineConfig
from internjax.serve.grpc.contract import INPUTS, OUTPUTS
from internjax.serve.grpc.repository import model_name
from internjax.serve.local import LocalLM
from tests.fakes import byte_tokenizer
from tests.grpc_client import idle, until
from tests.test_serve_engine import CONFIG, make_model

TYPES = {tensor.name: triton_to_np_dtype(tensor.datatype) for tensor in (*INPUTS, *OUTPUTS)}
LONG = {"max_tokens": 200, "ignore_eos": True}


class Tensor:
    def __init__(self, name, array):
        assert array.dtype == TYPES[name], f"{name} is {array.dtype}"
        self.name, self._array = name, array

    def as_numpy(self):
        return self._array


class TritonError(Exception):
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, CANCELLED = range(7)

    def __init__(self, message, code=INTERNAL):
        super().__init__(message)
        self.code = code


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self.arrays = {tensor.name: tensor.as_numpy() for tensor in output_tensors}
        self.error = error


class Request:
    """A request, and the sender of its responses, which must not be touched after the final one."""

    def __init__(self, arrays, outputs=None, **parameters):
        self.tensors = {name: Tensor(name, array) for name, array in arrays.items()}
        self.outputs = outputs or [tensor.name for tensor in OUTPUTS]
        self._parameters, self.sent, self.cancelled, self.ended = parameters, queue.Queue(), 0, 0

    def parameters(self):
        return json.dumps(self._parameters) if self._parameters else ""

    def requested_output_names(self):
        return list(self.outputs)

    def get_response_sender(self):
        return self

    def is_cancelled(self):
        assert not self.ended, "asked after the final response, which crashes Triton"
        return bool(self.cancelled)

    def send(self, response=None, flags=0):
        assert not self.ended, "a response after the final one"
        self.ended = flags
        self.sent.put((response, bool(flags)))

    def take(self):
        return self.sent.get(timeout=60)

    def until_final(self):
        responses, final = [], False
        while not final:
            response, final = self.take()
            responses.append(response)
        return responses


def stand_in(**more):
    module = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse = Tensor, InferenceResponse
    module.get_input_tensor_by_name = lambda request, name: request.tensors.get(name)
    for name, value in more.items():
        setattr(module, name, value)
    return module


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny random model in a folder, as a user would have one."""
    model = make_model()
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_native(folder, model.cfg, model.params, byte_tokenizer())
    return folder


@pytest.fixture(scope="module")
def repository(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    assert cli.run(["convert", str(saved), str(folder), "layout=triton"]) == 0
    return folder


def read_config(folder):
    text = (folder / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.fixture(scope="module")
def triton_model(repository):
    """The repository's model as Triton makes it: first only read, then made and started."""
    patch = pytest.MonkeyPatch()
    # While Triton reads a model for its configuration, the error and the flags are not there yet.
    module = stand_in()
    patch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location("model", repository / "tiny" / "1" / "model.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    module.TritonError, module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = TritonError, 1
    model = made.TritonPythonModel()
    given = {
        "slots": CONFIG.slots,
        "context": CONFIG.context,
        "prefill_tokens": 64,
        "max_waiting": 4,
    }
    pairs = {key: {"string_value": str(value)} for key, value in given.items()}
    model.initialize({"model_name": "tiny", "model_config": json.dumps({"parameters": pairs})})
    yield model
    model.finalize()
    patch.undo()


def texts(*values):
    return np.array([value.encode() for value in values], np.object_)


def ask(model, *prompts, outputs=None, stream=None, **sampling):
    arrays = {"text_input": texts(*prompts), "sampling_parameters": texts(json.dumps(sampling))}
    if stream is not None:
        arrays["stream"] = np.array([stream])
    request = Request(arrays, outputs)
    model.execute([request])
    return request


def test_repository_is_what_triton_reads(repository, saved):
    config = read_config(repository / "tiny")
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "python", 0)
    assert config.model_transaction_policy.decoupled
    assert [x.name for x in config.input] == [x.name for x in INPUTS]
    assert [x.name for x in config.output] == [x.name for x in OUTPUTS]
    (group,) = config.instance_group
    assert (group.kind, group.count) == (model_config_pb2.ModelInstanceGroup.KIND_MODEL, 1)
    assert config.parameters["slots"].string_value == str(EngineConfig().slots)
    ours, theirs = read_model(saved)[1], read_model(repository / "tiny" / "1" / "weights")[1]
    assert np.array_equal(ours["embed"], theirs["embed"])
    assert sorted(p.name for p in repository.iterdir()) == ["tiny"]


def test_a_repository_takes_more_models_but_none_twice(repository, saved):
    before = (repository / "tiny" / "config.pbtxt").read_bytes()
    assert cli.run(["convert", str(saved), str(repository), "layout=triton"]) != 0
    assert (repository / "tiny" / "config.pbtxt").read_bytes() == before
    other = saved.with_name("other model")
    saved.rename(other)
    try:
        assert cli.run(["convert", str(other), str(repository), "layout=triton", "to=hf"]) == 0
    finally:
        other.rename(saved)
    assert read_config(repository / "other-model").name == "other-model"
    assert (repository / "other-model" / "1" / "weights" / "config.json").is_file()
    assert model_name("../../etc") == "etc"
    assert cli.run(["convert", str(saved), str(repository), "layout=onnx"]) != 0


def test_it_answers_as_our_own_server(triton_model, saved):
    local = LocalLM(load(saved), CONFIG)
    one, two = local.generate(["abc", "xyz"], SamplingParams(max_tokens=9))
    (whole,) = ask(triton_model, "abc", "xyz", max_tokens=9).until_final()
    assert whole.error is None
    assert [x.decode() for x in whole.arrays["text_output"]] == [one.text, two.text]
    assert "logprobs" not in whole.arrays
    news = ask(triton_model, "abc", stream=True, max_tokens=9).until_final()
    assert b"".join(n.arrays["text_output"][0] for n in news).decode() == one.text
    assert [int(n.arrays["output_ids"][0, 0]) for n in news] == list(one.token_ids)
    rows = {0: b"", 1: b""}
    for n in ask(triton_model, "abc", "xyz", stream=True, max_tokens=9).until_final():
        rows[int(n.arrays["row"][0])] += n.arrays["text_output"][0]
    assert [rows[0].decode(), rows[1].decode()] == [one.text, two.text]
    (asked,) = ask(triton_model, "abc", outputs=["logprobs"], max_tokens=2).until_final()
    assert list(asked.arrays) == ["logprobs"]
    request = Request({"text_input": texts("abc")}, max_tokens=9)
    triton_model.execute([request])
    assert request.until_final()[0].arrays["text_output"][0].decode() == one.text


def test_what_goes_wrong_is_an_error_with_a_code(triton_model):
    for sampling, says in (({"tempreature": 1}, "tempreature"), ({"max_tokens": 999}, "999")):
        (response,) = ask(triton_model, "abc", **sampling).until_final()
        assert response.error.code == TritonError.INVALID_ARG
        assert says in str(response.error)
    (response,) = ask(triton_model, *"abcdefghijkl").until_final()
    assert "at most 8" in str(response.error)
    busy = ask(triton_model, *"abcd", **LONG)
    assert until(lambda: len(triton_model.engine.engine.scheduler.running()) == CONFIG.slots)
    (response,) = ask(triton_model, *"abcdefgh").until_final()
    assert response.error.code == TritonError.UNAVAILABLE
    busy.cancelled = True
    assert busy.until_final()[-1].error.code == TritonError.CANCELLED
    assert idle(triton_model.engine)
    step = triton_model.engine.engine.step

    def fail():
        if triton_model.engine.engine.scheduler.running():
            triton_model.engine.engine.step = step
            raise RuntimeError("broken on purpose")
        return step()

    triton_model.engine.engine.step = fail
    (response,) = ask(triton_model, "abc").until_final()
    assert response.error.code == TritonError.INTERNAL
    assert "on purpose" in str(response.error)


def test_a_client_that_leaves_frees_its_slot(triton_model):
    request = ask(triton_model, "abc", stream=True, **LONG)
    request.take()
    request.cancelled = True
    assert request.until_final()[-1].error.code == TritonError.CANCELLED
    assert len(ask(triton_model, "abc", max_tokens=2).until_final()) == 1
    assert idle(triton_model.engine)
    assert triton_model.engine.engine.stats.cancelled >= 1


@pytest.mark.parametrize(
    ("given", "says"), [({"slotz": "1"}, "slotz.*slots"), ({"slots": "many"}, "slots")]
)
def test_engine_parameters_are_checked(triton_model, given, says):
    from internjax.serve.grpc.triton import read_engine

    with pytest.raises(UserError, match=says):
        read_engine(given)
    assert read_engine({"slots": "3", "kv_dtype": "int8"}) == EngineConfig(slots=3, kv_dtype="int8")
