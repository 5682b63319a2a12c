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
from internjax.weights import QuantWeight

FORMAT = 1
PARTS = ("values", "scales", "zeros")


def load_native(path: str | Path, dtype: Any = None) -> tuple[ModelConfig, Params]:
    """Reads a folder written by `save_native`.

    Raises: Missing, Corrupt; UserError when a newer version of the program wrote it.
    """
    folder = Path(path)
    cfg = config_from_json(_record(folder).get("config"), where=f"{folder}/model.json")
    tensors = open_tensors(folder, "params")
    packed = _packed(_record(folder).get("quantized", {}), tensors, where=str(folder))
    params = read_params(
        [entry for entry in tree_layout(cfg) if entry.paths[0] not in packed],
        cfg,
        tensors,
        lambda name: tensors[name].read(),
        where=str(folder),
        dtype=None if dtype is None else np.dtype(dtype),
        ignore=lambda name: name.rpartition("/")[0] in packed,
    )
    return cfg, unflatten(flatten(params) | packed)


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

    Quantized weights go to disk as they are: their arrays as `path/values` and so on.

    Raises: UserError when the folder is there already, or a leaf carries an adapter.
    """
    params = stack_layers(params)
    packed = {p: w for p, w in flatten(params).items() if isinstance(w, QuantWeight)}
    layout = [entry for entry in tree_layout(cfg) if entry.paths[0] not in packed]
    tensors = checkpoint_tensors(layout, cfg, params)
    tensors += [
        _tensor(f"{p}/{part}", getattr(w, part)) for p, w in packed.items() for part in PARTS
    ]
    record = {
        "format": FORMAT,
        "config": dataclasses.asdict(cfg),
        "upstream": upstream or {},
        "quantized": {
            p: {"in_shape": w.in_shape, "out_shape": w.out_shape} for p, w in packed.items()
        },
    }
    with whole(path) as folder:
        folder.mkdir()
        save_tokenizer(tokenizer, folder)
        write_tensors(folder, "params", tensors, shard_bytes)
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (folder / "model.json").write_text(text, encoding="utf-8")


def _tensor(name: str, array: Any) -> Tensor:
    return Tensor(name, tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array))


def _packed(record: Any, tensors: dict[str, Any], *, where: str) -> dict[str, QuantWeight]:
    """Reads the quantized weights that model.json names; damaged shapes are refused."""
    found = {}
    for path, shapes in record.items():
        lacking = [part for part in PARTS if f"{path}/{part}" not in tensors]
        if lacking:
            raise Corrupt(f"{where}: {path} lacks {', '.join(lacking)}.")
        arrays = {part: tensors[f"{path}/{part}"].read() for part in PARTS}
        ins, outs = tuple(shapes["in_shape"]), tuple(shapes["out_shape"])
        whole_shape = (2 * arrays["values"].shape[-2], arrays["values"].shape[-1])
        if whole_shape != (math.prod(ins), math.prod(outs)):
            raise Corrupt(f"{where}: {path} holds {whole_shape}, model.json says {ins} x {outs}.")
        found[path] = QuantWeight(**arrays, in_shape=ins, out_shape=outs)
    return found


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
