"""Protobuf messages of the Open Inference Protocol to named NumPy arrays, and back.

Everything here comes from outside: lengths are checked before anything is read.
"""

import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from internjax.errors import UserError
from internjax.serve.grpc.contract import INPUTS, OUTPUTS

_KINDS = {
    "BOOL": np.dtype(np.bool_),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT32": np.dtype("<u4"),
}
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "BYTES": "bytes_contents",
}
_TYPES = {tensor.name: tensor.datatype for tensor in OUTPUTS}


def read_inputs(request: pb.ModelInferRequest) -> dict[str, np.ndarray]:
    """Returns the input tensors of a request; BYTES as arrays of bytes objects.

    Raises:
      UserError: an unknown name, a wrong datatype, contents that do not fill the shape.
    """
    known = {tensor.name: tensor for tensor in INPUTS}
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise UserError(f"raw_input_contents: {len(raw)} for {len(request.inputs)} inputs.")
    arrays: dict[str, np.ndarray] = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        if name not in known:
            raise UserError(f"{name}: no such input; legal are {', '.join(known)}.")
        if name in arrays:
            raise UserError(f"{name} is given twice.")
        legal = (known[name].datatype, *known[name].also)
        if tensor.datatype not in legal:
            raise UserError(f"{name} is {tensor.datatype}: it must be {' or '.join(legal)}.")
        _check_parameters(name, tensor.parameters)
        flat = _read_raw(tensor, raw[index]) if raw else _read_typed(tensor)
        shape = tuple(tensor.shape)
        if min(shape, default=0) < 0 or math.prod(shape) != len(flat):
            raise UserError(f"{name}: shape {list(shape)} does not fit its {len(flat)} elements.")
        arrays[name] = flat.reshape(shape)
    return arrays


def read_parameters(request: pb.ModelInferRequest) -> dict[str, Any]:
    """Returns the parameters of a request as Python values."""
    values = {}
    for name, parameter in request.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise UserError(f"{name}: the parameter has no value.")
        values[name] = getattr(parameter, kind)
    return values


def read_output_names(request: pb.ModelInferRequest) -> tuple[str, ...]:
    """Returns the names of the outputs that a request lists."""
    for output in request.outputs:
        _check_parameters(output.name, output.parameters)
    return tuple(output.name for output in request.outputs)


def response(
    request: pb.ModelInferRequest, arrays: Mapping[str, np.ndarray], version: str
) -> pb.ModelInferResponse:
    """Writes the response to a request, its tensors as raw contents."""
    message = pb.ModelInferResponse(
        model_name=request.model_name, model_version=version, id=request.id
    )
    for name, array in arrays.items():
        message.outputs.add(name=name, datatype=_TYPES[name], shape=array.shape)
        message.raw_output_contents.append(_raw(_TYPES[name], array))
    return message


def _check_parameters(name: str, parameters: Mapping) -> None:
    if parameters:
        raise UserError(
            f"{name}: {', '.join(sorted(parameters))} is not served; tensors travel in the message."
        )


def _read_raw(tensor: pb.ModelInferRequest.InferInputTensor, data: bytes) -> np.ndarray:
    if tensor.datatype == "BYTES":
        return _objects(_read_strings(tensor.name, data))
    kind = _KINDS[tensor.datatype]
    if len(data) % kind.itemsize:
        raise UserError(f"{tensor.name}: {len(data)} bytes are no whole number of elements.")
    return np.frombuffer(data, kind)


def _read_typed(tensor: pb.ModelInferRequest.InferInputTensor) -> np.ndarray:
    values = list(getattr(tensor.contents, _CONTENTS[tensor.datatype]))
    if tensor.datatype == "BYTES":
        return _objects(values)
    return np.array(values, _KINDS[tensor.datatype])


def _read_strings(name: str, data: bytes) -> list[bytes]:
    """Reads strings that each follow their length, four bytes, little-endian."""
    strings, at = [], 0
    while at < len(data):
        end = at + 4
        if end <= len(data):
            (size,) = struct.unpack_from("<I", data, at)
            end += size
        if end > len(data):
            raise UserError(f"{name}: its contents end within a string.")
        strings.append(data[at + 4 : end])
        at = end
    return strings


def _objects(values: list[bytes]) -> np.ndarray:
    out = np.empty(len(values), np.object_)
    out[:] = values
    return out


def _raw(datatype: str, array: np.ndarray) -> bytes:
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(x)) + x for x in array.reshape(-1))
    return array.astype(_KINDS[datatype], copy=False).tobytes()
