"""Quantized tensors of a GGUF file as the CPU kernels read them, never expanded to floats."""

from collections.abc import Iterator

import numpy as np

from internjax.kernels.cpu.tiles import pack
from internjax.models.config import ModelConfig
from internjax.models.decoder import param_table
from internjax.models.gguf_blocks import INTEGERS, integers
from internjax.models.gguf_file import GgufFile
from internjax.models.layouts import Entry, sources_of
from internjax.weights import PackedWeight


def read_packed(file: GgufFile, layout: list[Entry], cfg: ModelConfig) -> dict[str, PackedWeight]:
    """Reads, by path, every leaf that the file holds as matrices of Q4_0, Q4_1 or Q8_0 only.

    Tied embeddings count as the head, `[D, V]`. Leaves of other formats are left to `read_params`,
    and so are damaged ones, which it refuses.
    """
    return dict(_packed(file, layout, cfg))


def _packed(
    file: GgufFile, layout: list[Entry], cfg: ModelConfig
) -> Iterator[tuple[str, PackedWeight]]:
    table = param_table(cfg)
    for entry in (e for e in layout if e.paths[0] in table):
        path = entry.paths[0]
        tied = path == "embed" and cfg.tie_embeddings
        if not (entry.form.num_in or tied):
            continue
        leaf = table[path].shape[1:] if entry.per_layer else table[path].shape
        stored = [file.tensors.get(name) for name in sources_of(entry, cfg)]
        kinds = {tensor.kind for tensor in stored if tensor is not None}
        shapes = {tensor.shape for tensor in stored if tensor is not None}
        whole = None not in stored and shapes == {entry.form.shape((leaf,))}
        if not whole or len(kinds) != 1 or (kind := kinds.pop()) not in INTEGERS:
            continue
        ins, outs = (leaf[1:], leaf[:1]) if tied else _cut(leaf, entry.form.num_in)
        layers = [_tiles(file, name, entry, leaf) for name in sources_of(entry, cfg)]
        tiles = np.stack(layers) if entry.per_layer else layers[0]
        yield path, PackedWeight(tiles, 8 if kind == "Q8_0" else 4, ins, outs)


def _cut(leaf: tuple[int, ...], num_in: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return leaf[:num_in], leaf[num_in:]


def _tiles(file: GgufFile, name: str, entry: Entry, leaf: tuple[int, ...]) -> np.ndarray:
    tensor = file.tensors[name]
    parts = integers(tensor.kind, file.read_bytes(name), tensor.shape)
    return pack(*(None if x is None else entry.form.rows(x, leaf) for x in parts))
