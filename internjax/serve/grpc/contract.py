"""The tensors that the gRPC face takes and gives, and the same as a Triton model configuration.

Names follow Triton's backend for vLLM (github.com/triton-inference-server/vllm_backend), ids and
lengths those of LMDeploy's and FasterTransformer's: clients written for them find what they know.
"""

from collections.abc import Mapping
from dataclasses import dataclass

VERSION = "1"
"""The one version of a model that is served."""


@dataclass(frozen=True)
class Tensor:
    """One named array.

    Fields:
      datatype: the protocol's name of it; dims: sizes, -1 for any; R stands for prompts below.
      also: further datatypes that are taken.
    """

    name: str
    datatype: str
    dims: tuple[int, ...]
    also: tuple[str, ...] = ()


INPUTS = (
    Tensor("text_input", "BYTES", (-1,)),  # R raw prompts, continued as they stand
    Tensor("messages", "BYTES", (-1,)),  # or R chats, each a JSON list of messages
    Tensor("input_ids", "INT32", (-1, -1), also=("INT64",)),  # or R rows of token ids
    Tensor("input_lengths", "INT32", (-1,), also=("INT64",)),  # ids of each row that count
    Tensor("sampling_parameters", "BYTES", (-1,)),  # JSON: one for all prompts, or R
    Tensor("stream", "BOOL", (1,)),  # a response for every piece of news
    Tensor("exclude_input_in_output", "BOOL", (1,)),  # only true: prompts are not repeated
)
OUTPUTS = (
    Tensor("text_output", "BYTES", (-1,)),
    Tensor("output_ids", "INT32", (-1, -1)),  # padded with -1
    Tensor("finish_reason", "BYTES", (-1,)),  # "stop", "length"; empty while it runs
    Tensor("num_input_tokens", "UINT32", (-1,)),
    Tensor("num_output_tokens", "UINT32", (-1,)),  # so far
    Tensor("row", "INT32", (-1,)),  # which prompt: a piece of a stream is about one of them
    Tensor("logprobs", "BYTES", (-1,)),  # JSON; only where asked for
)
PROMPTS = ("text_input", "messages", "input_ids")

_CONFIG_TYPES = {"BYTES": "TYPE_STRING"}  # the others have the same name in both places


def config_text(name: str, backend: str, parameters: Mapping[str, str]) -> str:
    """Writes a model configuration in Triton's text form (`config.pbtxt`).

    `max_batch_size: 0` says that rows are a dimension like any other: the engine batches whatever
    requests meet, so Triton must not wait to collect them. `KIND_MODEL` makes one instance, which
    chooses its own devices.
    """
    inputs = ",\n".join(_tensor_text(tensor, "    optional: true\n") for tensor in INPUTS)
    outputs = ",\n".join(_tensor_text(tensor) for tensor in OUTPUTS)
    pairs = ",\n".join(
        f"  {{\n    key: {_quoted(key)}\n    value: {{ string_value: {_quoted(value)} }}\n  }}"
        for key, value in parameters.items()
    )
    return (
        f"name: {_quoted(name)}\nbackend: {_quoted(backend)}\nmax_batch_size: 0\n"
        "model_transaction_policy { decoupled: true }\n"
        f"input [\n{inputs}\n]\noutput [\n{outputs}\n]\n"
        "instance_group [ { count: 1, kind: KIND_MODEL } ]\n"
        + (f"parameters [\n{pairs}\n]\n" if pairs else "")
    )


def _tensor_text(tensor: Tensor, more: str = "") -> str:
    kind = _CONFIG_TYPES.get(tensor.datatype, f"TYPE_{tensor.datatype}")
    dims = ", ".join(map(str, tensor.dims))
    return (
        f"  {{\n    name: {_quoted(tensor.name)}\n    data_type: {kind}\n"
        f"    dims: [ {dims} ]\n{more}  }}"
    )


def _quoted(text: str) -> str:
    """Returns a string of the text format, whose escapes are those of C."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{plain}"'
