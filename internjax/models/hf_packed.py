"""AWQ and GPTQ checkpoints of Hugging Face: 4-bit weights in their packed layouts, both ways.

Of a matrix with I inputs and O outputs in groups of g (layouts: AutoAWQ's `packing_utils`,
AutoGPTQ's and GPTQModel's `pack`):

* awq: qweight int32 `[I, O/8]` and qzeros `[I/g, O/8]`, the eight nibbles of a word being columns
  0, 2, 4, 6, 1, 3, 5, 7 from the lowest on; scales float16 `[I/g, O]`;
* gptq: qweight int32 `[I/8, O]`, inputs in order from the lowest nibble on; qzeros `[I/g, O/8]` in
  order, in its first format less 1 in every nibble; scales as above; g_idx int32 `[I]`, the group
  of every input.

Knows no methods: it lays out integers that are there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from internjax.errors import Corrupt, UserError
from internjax.models.config import ModelConfig
from internjax.models.decoder import param_table
from internjax.models.layouts import Entry, Stored, Tensor, sources_of
from internjax.weights import QuantWeight

METHODS = ("awq", "gptq")
AWQ_ORDER = np.asarray([0, 2, 4, 6, 1, 3, 5, 7])
ONES = np.uint32(0x11111111)  # 1 in every nibble of a word
PARTS = ("qweight", "qzeros", "scales", "g_idx")
NUM_IN = {"wo": 2}  # input dims of a projection: 1 but for the one that reads heads


@dataclass(frozen=True)
class Packing:
    """What `quantization_config` says.

    Fields:
      method: awq or gptq; group: inputs that share a scale; first: zeros are stored less 1.
    """

    method: str
    group: int
    first: bool = False


def packing_of(raw: Mapping[str, Any], where: str) -> Packing | None:
    """Reads `quantization_config` of a config.json; None where there is none.

    Raises: UserError: another method, or a variant that is not 4-bit AWQ (gemm) or GPTQ.
    """
    said = raw.get("quantization_config")
    if said is None:
        return None
    if not isinstance(said, dict):
        raise Corrupt(f"{where}/config.json: quantization_config is no group of keys.")
    method, bits = said.get("quant_method"), said.get("bits", said.get("w_bit"))
    group = said.get("group_size", said.get("q_group_size"))
    if method not in METHODS or bits != 4:
        raise UserError(
            f"{where}: is quantized by {method!r} in {bits} bits; read are awq and gptq in 4 bits."
            " Give the unquantized checkpoint or a GGUF."
        )
    if method == "awq" and str(said.get("version", "gemm")).lower() != "gemm":
        raise UserError(f"{where}: is AWQ of version {said['version']!r}; read is gemm.")
    if not isinstance(group, int) or group == 0 or group < -1:
        raise Corrupt(f"{where}/config.json: group_size is {group!r}.")
    form = said.get("checkpoint_format", "gptq")
    if method == "gptq" and form not in ("gptq", "gptq_v2"):
        raise UserError(f"{where}: is GPTQ of format {form!r}; read are gptq and gptq_v2.")
    return Packing(method, group, method == "gptq" and form == "gptq")


def config_of(packing: Packing) -> dict[str, Any]:
    """Writes `quantization_config` as AutoAWQ and GPTQModel do."""
    common = {"quant_method": packing.method, "bits": 4, "group_size": packing.group}
    if packing.method == "awq":
        return common | {"zero_point": True, "version": "gemm", "modules_to_not_convert": None}
    return common | {"desc_act": False, "sym": False, "lm_head": False, "checkpoint_format": "gptq"}


def read_packed(
    layout: list[Entry],
    cfg: ModelConfig,
    stored: Mapping[str, Stored],
    read: Callable[[str], np.ndarray],
    packing: Packing,
    where: str,
) -> dict[str, QuantWeight]:
    """Reads, by path, every leaf that the checkpoint holds as 4-bit integers.

    Raises: Corrupt: shapes that do not fit the config. UserError: groups of inputs that are no
      neighbours (GPTQ with desc_act), or layers of one leaf of which some are not quantized.
    """
    table, found = param_table(cfg), {}
    for entry in layout:
        if entry.paths[0] not in table or not entry.per_layer:
            continue
        stems = [name.removesuffix(".weight") for name in sources_of(entry, cfg)]
        packed = [f"{stem}.qweight" in stored for stem in stems]
        if not any(packed):
            continue
        if not all(packed):
            raise UserError(f"{where}: {stems[packed.index(False)]} is not quantized, others are.")
        shapes = tuple(table[p].shape[1:] for p in entry.paths)
        layers = [_read(entry, shapes, stem, stored, read, packing, where) for stem in stems]
        for path, *parts in zip(entry.paths, *layers, strict=True):
            found[path] = _stacked(parts, *_cut(path, table[path].shape[1:]))
    return found


def is_part(name: str) -> bool:
    """Whether a tensor's name is one of a quantized matrix."""
    return name.rpartition(".")[2] in PARTS


def packed_tensors(
    layout: list[Entry], cfg: ModelConfig, leaves: Mapping[str, Any], method: str
) -> tuple[list[Tensor], Packing]:
    """Lists the tensors of every 4-bit leaf, made lazily, and what config.json says of them.

    Raises: UserError: zeros are no whole numbers (rtn, lqer), groups differ, or a matrix's outputs
      are no multiple of 8.
    """
    if method not in METHODS:
        raise UserError(f"quant={method!r}: legal for 4-bit weights are {', '.join(METHODS)}.")
    groups = {p: 2 * w.values.shape[-2] // w.scales.shape[-2] for p, w in leaves.items()}
    if len(set(groups.values())) != 1:
        raise UserError(f"groups differ ({groups}): these checkpoints have one size for all.")
    packing = Packing(method, next(iter(groups.values())), method == "gptq")
    for path, w in leaves.items():
        zeros = np.asarray(w.zeros)
        if (zeros != np.round(zeros)).any() or zeros.min() < packing.first or zeros.max() > 15:
            raise UserError(
                f"{path}: its zeros are no whole numbers {int(packing.first)}..15, which {method}"
                " checkpoints need: quantize by method=awq or gptq."
            )
    tensors = []
    for i in range(cfg.num_layers):
        for entry in layout:
            there = [path in leaves for path in entry.paths]
            if any(there) and not all(there):
                raise UserError(f"{' '.join(entry.paths)} are one tensor: quantize all or none.")
            if all(there):
                stem = entry.source.format(i=i).removesuffix(".weight")
                tensors += _matrix_tensors(
                    stem, entry, [leaves[p] for p in entry.paths], i, packing
                )
    return tensors, packing


def to_awq_words(codes: UInt8[np.ndarray, "R O"]) -> Int32[np.ndarray, "R W"]:
    """Packs eight columns a word, in AWQ's order."""
    return _words(codes.reshape(len(codes), -1, 8)[..., AWQ_ORDER])


def from_awq_words(words: Int32[np.ndarray, "R W"]) -> UInt8[np.ndarray, "R O"]:
    """Inverse of `to_awq_words`."""
    return _nibbles(words)[..., np.argsort(AWQ_ORDER)].reshape(len(words), -1)


def to_gptq_words(codes: UInt8[np.ndarray, "I O"]) -> Int32[np.ndarray, "W O"]:
    """Packs eight rows a word, in order."""
    return np.ascontiguousarray(_words(codes.T.reshape(codes.shape[1], -1, 8)).T)


def from_gptq_words(words: Int32[np.ndarray, "W O"]) -> UInt8[np.ndarray, "I O"]:
    """Inverse of `to_gptq_words`."""
    return _nibbles(words.T).reshape(words.shape[1], -1).T


def to_gptq_zeros(zeros: UInt8[np.ndarray, "G O"], first: bool) -> Int32[np.ndarray, "G W"]:
    """Packs eight columns a word, in order; in the first format less 1 each."""
    words = _words(zeros.reshape(len(zeros), -1, 8)).view(np.uint32)
    return (words - ONES if first else words).view(np.int32)


def from_gptq_zeros(words: Int32[np.ndarray, "G W"], first: bool) -> UInt8[np.ndarray, "G O"]:
    """Inverse of `to_gptq_zeros`; words are added up whole, as GPTQModel does."""
    whole = np.ascontiguousarray(words).view(np.uint32)
    return _nibbles((whole + ONES if first else whole).view(np.int32)).reshape(len(words), -1)


def _words(nibbles: np.ndarray) -> np.ndarray:
    """Packs `[..., 8]` nibbles, the first in the lowest bits."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return np.bitwise_or.reduce(nibbles.astype(np.uint32) << shifts, axis=-1).view(np.int32)


def _nibbles(words: np.ndarray) -> np.ndarray:
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    whole = np.ascontiguousarray(words).view(np.uint32)
    return (whole[..., None] >> shifts & 15).astype(np.uint8)


def _cut(path: str, leaf: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    num_in = NUM_IN.get(path.rpartition("/")[2], 1)
    return leaf[:num_in], leaf[num_in:]


def _shapes(paths: tuple[str, ...], shapes: tuple, rows: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the leaves were their inputs `rows` in one dim: of scales, a row a group."""
    cut = [_cut(path, shape) for path, shape in zip(paths, shapes, strict=True)]
    return tuple((rows, *(1,) * (len(ins) - 1), *outs) for ins, outs in cut)


def _read(entry, shapes, stem, stored, read, packing: Packing, where: str) -> list[tuple]:
    """Returns codes `[I, O]`, zeros and scales `[G, O]` of every leaf in one tensor."""
    columns, rows = entry.form.shape(shapes)
    group = rows if packing.group == -1 else packing.group
    if rows % group or columns % 8 or rows % 8:
        raise Corrupt(f"{where}: {stem} is {rows} x {columns}, in groups of {group}.")
    awq = packing.method == "awq"
    wanted = {
        "qweight": (rows, columns // 8) if awq else (rows // 8, columns),
        "qzeros": (rows // group, columns // 8),
        "scales": (rows // group, columns),
    }
    parts = {}
    for part, shape in wanted.items():
        name = f"{stem}.{part}"
        if name not in stored or stored[name].shape != shape:
            has = stored[name].shape if name in stored else "missing"
            raise Corrupt(f"{where}: {name} is {has}, the config says {shape}.")
        parts[part] = read(name)
    if f"{stem}.g_idx" in stored:
        _check_groups(read(f"{stem}.g_idx"), rows, group, f"{where}: {stem}")
    if awq:
        codes, zeros = from_awq_words(parts["qweight"]), from_awq_words(parts["qzeros"])
    else:
        codes = from_gptq_words(parts["qweight"])
        zeros = from_gptq_zeros(parts["qzeros"], packing.first)
    whole = (codes, zeros, parts["scales"])
    split = [entry.form.split(np.asarray(x).T, _shapes(entry.paths, shapes, len(x))) for x in whole]
    flat = lambda x: np.ascontiguousarray(x).reshape(len(x), -1)  # noqa: E731
    return [tuple(flat(part) for part in leaf) for leaf in zip(*split, strict=True)]


def _check_groups(g_idx: np.ndarray, rows: int, group: int, what: str) -> None:
    if not np.array_equal(g_idx, np.arange(rows) // group):
        raise UserError(
            f"{what}: its groups are no runs of neighbouring inputs (desc_act without static"
            " groups), which no weight of ours can hold; quantize it with desc_act=false."
        )


def _stacked(parts: list[tuple], ins: tuple[int, ...], outs: tuple[int, ...]) -> QuantWeight:
    codes, zeros, scales = (np.stack(x) for x in zip(*parts, strict=True))
    values = codes[:, 0::2] | codes[:, 1::2] << 4
    return QuantWeight(values, scales, zeros.astype(np.float16), ins, outs)


def _matrix_tensors(
    stem: str, entry: Entry, leaves: list[QuantWeight], layer: int, packing: Packing
) -> list[Tensor]:
    """Describes the tensors of one matrix of one layer."""
    rows = 2 * leaves[0].values.shape[-2]
    columns, count = sum(w.values.shape[-1] for w in leaves), leaves[0].scales.shape[-2]
    if columns % 8 or rows % 8:
        raise UserError(f"{stem}: {rows} x {columns} are no multiples of 8, as the layout wants.")

    def joined(take: Callable[[QuantWeight], np.ndarray]) -> np.ndarray:
        parts = [take(w) for w in leaves]
        natural = tuple((*w.in_shape, *w.out_shape) for w in leaves)
        shapes = _shapes(entry.paths, natural, len(parts[0]))
        leaf = [x.reshape(shape) for x, shape in zip(parts, shapes, strict=True)]
        return np.ascontiguousarray(entry.form.join(*leaf).T)

    def codes(w: QuantWeight) -> np.ndarray:
        values = np.asarray(w.values[layer])
        return np.stack([values & 15, values >> 4], axis=1).reshape(rows, -1)

    zeros = lambda w: np.asarray(w.zeros[layer]).astype(np.uint8)  # noqa: E731
    scales = lambda w: np.asarray(w.scales[layer]).astype(np.float16)  # noqa: E731
    half, word = np.dtype(np.float16), np.dtype(np.int32)
    if packing.method == "awq":
        weight = Tensor(
            f"{stem}.qweight", (rows, columns // 8), word, lambda: to_awq_words(joined(codes))
        )
        zero = lambda: to_awq_words(joined(zeros))  # noqa: E731
        extra = []
    else:
        weight = Tensor(
            f"{stem}.qweight", (rows // 8, columns), word, lambda: to_gptq_words(joined(codes))
        )
        zero = lambda: to_gptq_zeros(joined(zeros), packing.first)  # noqa: E731
        index = lambda: (np.arange(rows) // packing.group).astype(np.int32)  # noqa: E731
        extra = [Tensor(f"{stem}.g_idx", (rows,), word, index)]
    return [
        weight,
        Tensor(f"{stem}.qzeros", (count, columns // 8), word, zero),
        Tensor(f"{stem}.scales", (count, columns), half, lambda: joined(scales)),
        *extra,
    ]
