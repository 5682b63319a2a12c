"""Our own interchange folder: `params*.safetensors` by tree path, `model.json`, tokenizer files.

The tree goes to disk as it is, so loading is one read a leaf. Training state with its optimizer
is `checkpoint.py`'s; this folder is what `convert`, merging and export hand on.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from internjax.errors import Corrupt, Missing, UserError
from internjax.models.config import ModelConfig, RopeConfig
from internjax.models.folders import save_tokenizer, whole
from internjax.models.layouts import Tensor, checkpoint_tensors, read_params, tree_layout
from internjax.models.safetensors_file import SHARD_BYTES, open_tensors, read_json, write_tensors
from internjax.tree import Params, flatten, stack_layers, unflatten
from internjax.weights import LoraWeight, QuantWeight, ScaledWeight

FORMAT = 1
_INTEGERS = {  # kind -> record, its arrays, inputs in a byte of values
    "int4": (QuantWeight, ("values", "scales", "zeros"), 2),
    "scaled": (ScaledWeight, ("values", "scales"), 1),
}


def load_native(path: str | Path, dtype: Any = None) -> tuple[ModelConfig, Params]:
    """Reads a folder written by `save_native`.

    Raises: Missing, Corrupt; UserError when a newer version of the program wrote it.
    """
    folder = Path(path)
    cfg = config_from_json(_record(folder).get("config"), where=f"{folder}/model.json")
    tensors = open_tensors(folder, "params")
    read = lambda name: tensors[name].read()  # noqa: E731
    described = _record(folder).get("weights", {})
    special = {p: _read_weight(kind, read, p, str(folder)) for p, kind in described.items()}
    params = read_params(
        [entry for entry in tree_layout(cfg) if entry.paths[0] not in special],
        cfg,
        tensors,
        read,
        where=str(folder),
        dtype=None if dtype is None else np.dtype(dtype),
        ignore=lambda name: any(name.startswith(f"{path}/") for path in special),
    )
    return cfg, unflatten(flatten(params) | special)


def save_native(
    path: str | Path,
    cfg: ModelConfig,
    params: Params,
    tokenizer: Any = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    upstream: dict[str, Any] | None = None,
) -> None:
    """Writes a model folder of ours, whole or not at all.

    Args:
      tokenizer: folder whose tokenizer files are copied byte for byte, or a Tokenizer to save.
      upstream: the `config.json` that the model came with, kept for the way back.

    Quantized weights and adapters go to disk as they are, their arrays as `path/values` and so on.

    Raises: UserError when the folder is there already.
    """
    params = stack_layers(params)
    kinds = (LoraWeight, QuantWeight, ScaledWeight)
    special = {p: w for p, w in flatten(params).items() if isinstance(w, kinds)}
    layout = [entry for entry in tree_layout(cfg) if entry.paths[0] not in special]
    tensors = checkpoint_tensors(layout, cfg, params)
    for leaf, weight in special.items():
        tensors += [_tensor(f"{leaf}/{part}", array) for part, array in _arrays(weight).items()]
    record = {
        "format": FORMAT,
        "config": dataclasses.asdict(cfg),
        "upstream": upstream or {},
        "weights": {leaf: _describe(weight) for leaf, weight in special.items()},
    }
    with whole(path) as folder:
        folder.mkdir()
        save_tokenizer(tokenizer, folder)
        write_tensors(folder, "params", tensors, shard_bytes)
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (folder / "model.json").write_text(text, encoding="utf-8")


def _tensor(name: str, array: Any) -> Tensor:
    return Tensor(name, tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array))


def _arrays(weight: Any) -> dict[str, Any]:
    """Names the arrays of a weight that is no plain array; those of a base lie under "base"."""
    if isinstance(weight, QuantWeight):
        return {part: getattr(weight, part) for part in ("values", "scales", "zeros")}
    if isinstance(weight, ScaledWeight):
        return {part: getattr(weight, part) for part in ("values", "scales")}
    if isinstance(weight, LoraWeight):
        base = {f"base/{part}": x for part, x in _arrays(weight.base).items()}
        return base | {"a": weight.a, "b": weight.b}
    return {"array": weight}


def _describe(weight: Any) -> dict[str, Any]:
    """What model.json says of a weight beside its arrays."""
    if isinstance(weight, QuantWeight):
        return {"kind": "int4", "in_shape": weight.in_shape, "out_shape": weight.out_shape}
    if isinstance(weight, ScaledWeight):
        return {"kind": "scaled", "in_shape": weight.in_shape, "out_shape": weight.out_shape}
    if isinstance(weight, LoraWeight):
        return {"kind": "lora", "scale": weight.scale, "base": _describe(weight.base)}
    return {"kind": "array"}


def _read_weight(record: Any, read: Any, path: str, where: str) -> Any:
    """Builds a weight from its description and its arrays; damaged ones are refused."""
    try:
        if record["kind"] == "array":
            return read(f"{path}/array")
        if record["kind"] == "lora":
            base = _read_weight(record["base"], read, f"{path}/base", where)
            return LoraWeight(base, read(f"{path}/a"), read(f"{path}/b"), float(record["scale"]))
        kind, parts, rows_a_byte = _INTEGERS[record["kind"]]
        arrays = {part: read(f"{path}/{part}") for part in parts}
        ins, outs = tuple(record["in_shape"]), tuple(record["out_shape"])
        *_, rows, columns = arrays["values"].shape
    except (KeyError, TypeError, ValueError) as error:
        raise Corrupt(f"{where}: {path} is damaged or incomplete ({error!r}).") from error
    rows *= rows_a_byte
    if (rows, columns) != (math.prod(ins), math.prod(outs)):
        raise Corrupt(f"{where}: {path} is {rows} x {columns}, model.json says {ins} x {outs}.")
    return kind(**arrays, in_shape=ins, out_shape=outs)


def read_upstream(folder: str | Path) -> dict[str, Any]:
    """Returns the `config.json` that the model once came with; {} when it came from elsewhere."""
    return _record(Path(folder)).get("upstream") or {}


def _record(folder: Path) -> dict[str, Any]:
    if not (folder / "model.json").is_file():
        raise Missing(f"{folder}: has no model.json, so it is no model folder of ours.")
    record = read_json(folder / "model.json")
    if record.get("format") != FORMAT:
        raise UserError(f"{folder}: has format {record.get('format')!r}; format {FORMAT} is read.")
    return record


def config_from_json(raw: Any, *, where: str) -> ModelConfig:
    """Builds a ModelConfig from the dict that `dataclasses.asdict` made of one."""
    try:
        return ModelConfig(**raw | {"rope": RopeConfig(**raw["rope"])})
    except (TypeError, KeyError) as error:
        raise Corrupt(f"{where}: config does not fit a ModelConfig ({error}).") from error
