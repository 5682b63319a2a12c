"""What a request asks of the engine: named arrays and parameters become jobs, or a refusal.

Knows neither protobuf nor Triton: the server and Triton's Python backend both read with it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from internjax.data.chat import encode_prompt
from internjax.data.templates import ChatTemplate
from internjax.data.tokenizer import Tokenizer
from internjax.errors import UserError
from internjax.models.lm import SamplingParams
from internjax.serve.grpc.contract import OUTPUTS, PROMPTS
from internjax.serve.thread import EngineThread, Job

PARAMETERS = tuple(field.name for field in fields(SamplingParams))
_SAMPLING = TypeAdapter(SamplingParams)


@dataclass(frozen=True)
class Served:
    """The served model; the adapters that its engine holds are served beside it by their names.

    Fields:
      default_max_tokens: length of an answer when the request names none.
      max_request_tokens: prompts and answers of one request together; 0 sets no limit.
    """

    name: str
    engine: EngineThread
    tokenizer: Tokenizer
    template: ChatTemplate
    default_max_tokens: int = 512
    max_request_tokens: int = 0

    def names(self) -> list[str]:
        """Returns the models that clients may name: this one first, then the adapters."""
        return [self.name, *self.engine.engine.adapters.names()]


@dataclass(frozen=True)
class Asked:
    """One request: a job for each prompt.

    Fields:
      stream: a reply for every piece of news, not one for all.
      outputs: names of the tensors to reply with.
    """

    jobs: tuple[Job, ...]
    stream: bool
    outputs: tuple[str, ...]


def read_request(
    model: Served,
    inputs: Mapping[str, np.ndarray],
    parameters: Mapping[str, Any],
    outputs: Sequence[str] = (),
    *,
    stream: bool,
    adapter: str = "",
) -> Asked:
    """Reads a request.

    Args:
      inputs: by the names of `contract.INPUTS`; BYTES as arrays of bytes objects.
      parameters: fields of `SamplingParams` for all prompts, and `stream`.
      outputs: names of `contract.OUTPUTS`; none asks for all that apply.
      stream: what holds when the request does not say.
      adapter: whose answers are wanted; "" is the model itself.

    Raises:
      UserError: it cannot be obeyed as it stands.
    """
    common = dict(parameters)
    if "stream" in inputs and "stream" in common:
        raise UserError("stream is given as a tensor and as a parameter: give one.")
    stream = bool(_one(inputs, "stream", common.pop("stream", stream)))
    if not _one(inputs, "exclude_input_in_output", True):
        raise UserError("exclude_input_in_output=false: answers do not repeat their prompts here.")
    prompts = _prompts(model, inputs)
    rows = _rows_of_parameters(inputs, common, len(prompts))
    jobs = []
    for (ids, continues), given in zip(prompts, rows, strict=True):
        if "logprobs" in outputs and given.get("logprobs") is None:
            given["logprobs"] = 0
        if given.get("max_tokens") is None:
            room = model.engine.engine.context - len(ids)
            given["max_tokens"] = max(1, min(model.default_max_tokens, room))
        jobs.append(Job(ids, read_sampling(given), continues, adapter))
    _check_size(model, jobs)
    return Asked(tuple(jobs), stream, _outputs(outputs, jobs))


def read_sampling(given: Mapping[str, Any]) -> SamplingParams:
    """Makes sampling parameters of untrusted names and values.

    Raises:
      UserError: an unknown name, a wrong type, a value out of range.
    """
    unknown = next((name for name in given if name not in PARAMETERS), None)
    if unknown is not None:
        raise UserError(f"{unknown}: no such parameter; legal are {', '.join(PARAMETERS)}.")
    values = dict(given)
    for name in ("stop", "bad_words"):
        if isinstance(values.get(name), str):
            values[name] = (values[name],)
    try:
        return _SAMPLING.validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{place}: {message}" if place else message) from error


def _prompts(model: Served, inputs: Mapping[str, np.ndarray]) -> list[tuple[list[int], bool]]:
    """Returns (ids, whether the answer goes on with their text) of every prompt."""
    given = [name for name in PROMPTS if name in inputs]
    if len(given) != 1:
        raise UserError(
            f"give one of {', '.join(PROMPTS)}; the request has {' and '.join(given) or 'none'}."
        )
    (name,) = given
    if "input_lengths" in inputs and name != "input_ids":
        raise UserError(f"input_lengths counts ids of input_ids; the request has {name}.")
    if inputs[name].size == 0:
        raise UserError(f"{name} is empty: give at least one prompt.")
    if name == "input_ids":
        return [(ids, True) for ids in _id_rows(inputs)]
    tokenizer = model.tokenizer
    texts = _texts(inputs, name)
    if name == "text_input":
        return [(tokenizer.encode(text, bos=tokenizer.adds_bos), True) for text in texts]
    return [(_chat_ids(model, text), False) for text in texts]


def _chat_ids(model: Served, text: str) -> list[int]:
    messages = _json("messages", text)
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
        raise UserError('messages: give a JSON list such as [{"role": "user", "content": "hi"}].')
    return encode_prompt(model.tokenizer, model.template, messages)


def _id_rows(inputs: Mapping[str, np.ndarray]) -> list[list[int]]:
    ids = inputs["input_ids"]
    if ids.ndim == 1:
        ids = ids[None, :]
    if ids.ndim != 2:
        raise UserError(f"input_ids has shape {list(ids.shape)}: give [prompts, ids] or [ids].")
    lengths = inputs.get("input_lengths")
    if lengths is None:
        return ids.tolist()
    lengths = lengths.reshape(-1).tolist()
    if len(lengths) != len(ids) or not all(1 <= n <= ids.shape[1] for n in lengths):
        raise UserError(
            f"input_lengths={lengths}: give {len(ids)} numbers in 1..{ids.shape[1]}, one a row of "
            "input_ids."
        )
    return [row[:n] for row, n in zip(ids.tolist(), lengths, strict=True)]


def _rows_of_parameters(
    inputs: Mapping[str, np.ndarray], common: Mapping[str, Any], rows: int
) -> list[dict[str, Any]]:
    """Joins the parameters of the whole request with those of each prompt."""
    if "sampling_parameters" not in inputs:
        return [dict(common) for _ in range(rows)]
    texts = _texts(inputs, "sampling_parameters")
    if len(texts) not in (1, rows):
        raise UserError(f"sampling_parameters has {len(texts)} rows: give 1 or {rows}.")
    joined = []
    for text in texts:
        own = _json("sampling_parameters", text)
        if not isinstance(own, dict):
            raise UserError('sampling_parameters: give a JSON object such as {"max_tokens": 20}.')
        twice = next((name for name in own if name in common), None)
        if twice is not None:
            raise UserError(f"{twice} is a request parameter and in sampling_parameters: give one.")
        joined.append({**common, **own})
    return [dict(x) for x in (joined if len(joined) == rows else joined * rows)]


def _check_size(model: Served, jobs: Sequence[Job]) -> None:
    """Refuses what could never be taken, however long a client waits."""
    config = model.engine.engine.config
    most = config.slots + config.max_waiting
    if len(jobs) > most:
        raise UserError(f"the request has {len(jobs)} prompts; at most {most} fit here.")
    tokens = sum(len(job.prompt) + job.params.max_tokens for job in jobs)
    if model.max_request_tokens and tokens > model.max_request_tokens:
        raise UserError(
            f"the request may take {tokens} tokens, prompts and answers together; at most "
            f"{model.max_request_tokens} are allowed."
        )


def _outputs(asked: Sequence[str], jobs: Sequence[Job]) -> tuple[str, ...]:
    names = tuple(tensor.name for tensor in OUTPUTS)
    unknown = next((name for name in asked if name not in names), None)
    if unknown is not None:
        raise UserError(f"{unknown}: no such output; legal are {', '.join(names)}.")
    if asked:
        return tuple(name for name in names if name in asked)
    scored = any(job.params.logprobs is not None for job in jobs)
    return tuple(name for name in names if scored or name != "logprobs")


def _one(inputs: Mapping[str, np.ndarray], name: str, default: Any) -> Any:
    """Returns a single value; the parameter form of it must be a bool as well."""
    if name not in inputs:
        if not isinstance(default, bool):
            raise UserError(f"{name}={default!r}: it must be true or false.")
        return default
    if inputs[name].size != 1:
        raise UserError(f"{name} has shape {list(inputs[name].shape)}: give one value.")
    return bool(inputs[name].reshape(-1)[0])


def _texts(inputs: Mapping[str, np.ndarray], name: str) -> list[str]:
    texts = []
    for row, data in enumerate(inputs[name].reshape(-1)):
        try:
            texts.append(data.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: row {row} is not UTF-8.") from error
    return texts


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the second: thousands of nested brackets
        raise UserError(f"{name}: is not JSON ({error}).") from error
