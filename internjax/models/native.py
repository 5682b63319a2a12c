"""Our own interchange folder: `params*.safetensors` by tree path, `model.json`, tokenizer files.

The tree goes to disk as it is, so loading is one read a leaf. Training state with its optimizer
is `checkpoint.py`'s; this folder is what `convert`, merging and export hand on.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from internjax.errors import Corrupt, Missing, UserError
from internjax.models.config import ModelConfig, RopeConfig
from internjax.models.folders import save_tokenizer, whole
from internjax.models.layouts import checkpoint_tensors, read_params, tree_layout
from internjax.models.safetensors_file import SHARD_BYTES, open_tensors, read_json, write_tensors
from internjax.tree import Params, stack_layers

FORMAT = 1


def load_native(path: str | Path, dtype: Any = None) -> tuple[ModelConfig, Params]:
    """Reads a folder written by `save_native`.

    Raises: Missing, Corrupt; UserError when a newer version of the program wrote it.
    """
    folder = Path(path)
    cfg = config_from_json(_record(folder).get("config"), where=f"{folder}/model.json")
    tensors = open_tensors(folder, "params")
    params = read_params(
        tree_layout(cfg),
        cfg,
        tensors,
        lambda name: tensors[name].read(),
        where=str(folder),
        dtype=None if dtype is None else np.dtype(dtype),
    )
    return cfg, params


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

    Raises: UserError when the folder is there already, or a leaf is no plain array.
    """
    tensors = checkpoint_tensors(tree_layout(cfg), cfg, stack_layers(params))
    record = {"format": FORMAT, "config": dataclasses.asdict(cfg), "upstream": upstream or {}}
    with whole(path) as folder:
        folder.mkdir()
        save_tokenizer(tokenizer, folder)
        write_tensors(folder, "params", tensors, shard_bytes)
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (folder / "model.json").write_text(text, encoding="utf-8")


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
