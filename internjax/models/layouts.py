"""How checkpoints of other programs name and shape the weights of our tree, in both directions.

A layout is a list of `Entry`: one tensor of the checkpoint, the leaves of ours that it holds, and
the `Form` that turns one into the other. Knows no file format: tensors are read through a callable
and written as lazy `Tensor` records, one layer at a time, so that nothing is ever held twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from internjax.errors import Corrupt, UserError
from internjax.models.config import ModelConfig
from internjax.models.decoder import param_table
from internjax.tree import Params, flatten, unflatten

type Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """A reshaping between one tensor and the leaves it holds; shapes are those of one layer.

    Fields:
      shape: shapes of the leaves -> shape of the tensor.
      split: tensor, shapes of the leaves -> the leaves (views where possible).
      join: the leaves -> tensor.
      num_in: of a tensor that is one matrix [outputs, inputs], the dims of its leaf that are
        inputs; 0 of others.
      rows: puts the rows of such a matrix into our order, given the shape of the leaf; with
        `num_in` what it takes to read a quantized tensor without expanding it.
    """

    shape: Callable[[tuple[Shape, ...]], Shape]
    split: Callable[[np.ndarray, tuple[Shape, ...]], tuple[np.ndarray, ...]]
    join: Callable[..., np.ndarray]
    num_in: int = 0
    rows: Callable[[np.ndarray, Shape], np.ndarray] = lambda x, s: x


def _heads_shape(shapes):
    D, N, H = shapes[0]
    return N * H, D


def _split_wqkv(x, shapes):
    """Rows are grouped by KV head: G queries, one key, one value (InternLM2; chain.md IL-4)."""
    (D, N, H), (_, K, _), _ = shapes
    groups = x.reshape(K, N // K + 2, H, D)
    q = groups[:, :-2].reshape(N, H, D)
    return tuple(np.moveaxis(y, -1, 0) for y in (q, groups[:, -2], groups[:, -1]))


def _join_wqkv(q, k, v):
    (D, N, H), K = q.shape, k.shape[1]
    q, k, v = (np.moveaxis(y, 0, -1) for y in (q, k, v))
    groups = [q.reshape(K, N // K, H, D), k[:, None], v[:, None]]
    return np.concatenate(groups, axis=1).reshape(-1, D)


def _split_bqkv(x, shapes):
    (N, H), (K, _), _ = shapes
    groups = x.reshape(K, N // K + 2, H)
    return groups[:, :-2].reshape(N, H), groups[:, -2], groups[:, -1]


def _join_bqkv(q, k, v):
    (N, H), K = q.shape, k.shape[0]
    return np.concatenate([q.reshape(K, N // K, H), k[:, None], v[:, None]], axis=1).reshape(-1)


def _pair(x):
    """Half-split rotary rows `[N, H, ...]` -> interleaved: pair (i, i + H/2) becomes (2i, 2i+1)."""
    N, H = x.shape[:2]
    return x.reshape(N, 2, H // 2, *x.shape[2:]).swapaxes(1, 2).reshape(x.shape)


def _unpair(x):
    """Inverse of `_pair`."""
    N, H = x.shape[:2]
    return x.reshape(N, H // 2, 2, *x.shape[2:]).swapaxes(1, 2).reshape(x.shape)


PLAIN = Form(lambda s: s[0], lambda x, s: (x,), lambda x: x)
MATRIX = Form(lambda s: s[0][::-1], lambda x, s: (x.T,), lambda x: x.T, num_in=1)
HEADS_IN = Form(  # [N*H, D] <-> [D, N, H]
    _heads_shape,
    lambda x, s: (x.T.reshape(s[0]),),
    lambda x: x.reshape(x.shape[0], -1).T,
    num_in=1,
)
HEADS_OUT = Form(  # [D, N*H] <-> [N, H, D]
    lambda s: (s[0][2], s[0][0] * s[0][1]),
    lambda x, s: (x.T.reshape(s[0]),),
    lambda x: x.reshape(-1, x.shape[2]).T,
    num_in=2,
)
HEADS_BIAS = Form(  # [N*H] <-> [N, H]
    lambda s: (s[0][0] * s[0][1],), lambda x, s: (x.reshape(s[0]),), lambda x: x.reshape(-1)
)
HEADS_IN_PAIRED = Form(  # as HEADS_IN, rows interleaved for the rotation (GGUF's llama)
    _heads_shape,
    lambda x, s: (np.moveaxis(_unpair(x.reshape(*s[0][1:], s[0][0])), -1, 0),),
    lambda x: _pair(np.moveaxis(x, 0, -1)).reshape(-1, x.shape[0]),
    num_in=1,
    rows=lambda x, s: _unpair(x.reshape(*s[1:], -1)).reshape(x.shape),
)
HEADS_BIAS_PAIRED = Form(
    HEADS_BIAS.shape, lambda x, s: (_unpair(x.reshape(s[0])),), lambda x: _pair(x).reshape(-1)
)
WQKV = Form(
    lambda s: ((s[0][1] + 2 * s[1][1]) * s[0][2], s[0][0]), _split_wqkv, _join_wqkv
)  # [(N + 2K)*H, D]
BQKV = Form(lambda s: ((s[0][0] + 2 * s[1][0]) * s[0][1],), _split_bqkv, _join_bqkv)


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: its name ("{i}" is the layer), our leaves in it, its form.

    `per_layer`: each layer has a tensor of its own, a slice of our stacked leaf.
    """

    source: str
    paths: tuple[str, ...]
    form: Form
    per_layer: bool


@runtime_checkable
class Stored(Protocol):
    """A tensor of a checkpoint file; `dtype` is the one that reading it gives."""

    @property
    def dtype(self) -> np.dtype: ...
    @property
    def shape(self) -> Shape: ...


@dataclass(frozen=True)
class Tensor:
    """A tensor about to be written: `make()` builds it when its turn comes."""

    name: str
    shape: Shape
    dtype: np.dtype
    make: Callable[[], np.ndarray]


def _layout(prefix: str, layer_rows: list, other_rows: list) -> list[Entry]:
    """Builds a layout; leaves of layer rows are named without "layers/", several in one string."""
    layers = [
        Entry(prefix + source, tuple(f"layers/{leaf}" for leaf in leaves.split()), form, True)
        for source, leaves, form in layer_rows
    ]
    return layers + [Entry(source, (leaf,), form, False) for source, leaf, form in other_rows]


def tree_layout(cfg: ModelConfig) -> list[Entry]:
    """Returns our own layout: every leaf as it is, under its path."""
    return [Entry(path, (path,), PLAIN, False) for path in param_table(cfg)]


LLAMA = _layout(
    "model.layers.{i}.",
    [
        ("input_layernorm.weight", "attn_norm", PLAIN),
        ("self_attn.q_proj.weight", "wq", HEADS_IN),
        ("self_attn.k_proj.weight", "wk", HEADS_IN),
        ("self_attn.v_proj.weight", "wv", HEADS_IN),
        ("self_attn.o_proj.weight", "wo", HEADS_OUT),
        ("self_attn.q_proj.bias", "bq", HEADS_BIAS),
        ("self_attn.k_proj.bias", "bk", HEADS_BIAS),
        ("self_attn.v_proj.bias", "bv", HEADS_BIAS),
        ("self_attn.o_proj.bias", "bo", PLAIN),
        ("self_attn.q_norm.weight", "q_norm", PLAIN),
        ("self_attn.k_norm.weight", "k_norm", PLAIN),
        ("post_attention_layernorm.weight", "ffn_norm", PLAIN),
        ("mlp.gate_proj.weight", "w_gate", MATRIX),
        ("mlp.up_proj.weight", "w_up", MATRIX),
        ("mlp.down_proj.weight", "w_down", MATRIX),
    ],
    [
        ("model.embed_tokens.weight", "embed", PLAIN),
        ("model.norm.weight", "final_norm", PLAIN),
        ("lm_head.weight", "head", MATRIX),
    ],
)
INTERNLM2 = _layout(
    "model.layers.{i}.",
    [
        ("attention_norm.weight", "attn_norm", PLAIN),
        ("attention.wqkv.weight", "wq wk wv", WQKV),
        ("attention.wqkv.bias", "bq bk bv", BQKV),
        ("attention.wo.weight", "wo", HEADS_OUT),
        ("attention.wo.bias", "bo", PLAIN),
        ("ffn_norm.weight", "ffn_norm", PLAIN),
        ("feed_forward.w1.weight", "w_gate", MATRIX),
        ("feed_forward.w3.weight", "w_up", MATRIX),
        ("feed_forward.w2.weight", "w_down", MATRIX),
    ],
    [
        ("model.tok_embeddings.weight", "embed", PLAIN),
        ("model.norm.weight", "final_norm", PLAIN),
        ("output.weight", "head", MATRIX),
    ],
)


def gguf_layout(paired: bool) -> list[Entry]:
    """Returns GGUF's layout; `paired`: q and k rows interleaved for the rotation (llama)."""
    heads, bias = (HEADS_IN_PAIRED, HEADS_BIAS_PAIRED) if paired else (HEADS_IN, HEADS_BIAS)
    return _layout(
        "blk.{i}.",
        [
            ("attn_norm.weight", "attn_norm", PLAIN),
            ("attn_q.weight", "wq", heads),
            ("attn_k.weight", "wk", heads),
            ("attn_v.weight", "wv", HEADS_IN),
            ("attn_output.weight", "wo", HEADS_OUT),
            ("attn_q.bias", "bq", bias),
            ("attn_k.bias", "bk", bias),
            ("attn_v.bias", "bv", HEADS_BIAS),
            ("attn_output.bias", "bo", PLAIN),
            ("attn_q_norm.weight", "q_norm", PLAIN),
            ("attn_k_norm.weight", "k_norm", PLAIN),
            ("ffn_norm.weight", "ffn_norm", PLAIN),
            ("ffn_gate.weight", "w_gate", MATRIX),
            ("ffn_up.weight", "w_up", MATRIX),
            ("ffn_down.weight", "w_down", MATRIX),
        ],
        [
            ("token_embd.weight", "embed", PLAIN),
            ("output_norm.weight", "final_norm", PLAIN),
            ("output.weight", "head", MATRIX),
        ],
    )


def read_params(
    layout: list[Entry],
    cfg: ModelConfig,
    stored: Mapping[str, Stored],
    read: Callable[[str], np.ndarray],
    *,
    where: str,
    dtype: np.dtype | None = None,
    ignore: Callable[[str], bool] = lambda name: False,
) -> Params:
    """Fills our tree from a checkpoint, tensor by tensor, into leaves allocated once.

    Args:
      stored: every tensor that the checkpoint has; all are checked before the first is read.
      read: name -> tensor.
      where: the checkpoint's path, for messages.
      dtype: of every leaf; None keeps what is stored (the widest, where layers differ).
      ignore: names that may be there without a place in our tree.

    Raises: Corrupt when a tensor is missing, has another shape, or has no place in the tree.
    """
    _check_sizes(cfg, where)
    table = param_table(cfg)
    used = [e for e in layout if e.paths[0] in table]
    _check(used, cfg, table, stored, where, ignore)
    leaves: dict[str, np.ndarray] = {}
    for entry in used:
        sources = sources_of(entry, cfg)
        leaf_dtype = dtype or np.result_type(*(stored[s].dtype for s in sources))
        for path in entry.paths:
            leaves[path] = np.empty(table[path].shape, leaf_dtype)
        for i, source in enumerate(sources):
            targets = [leaves[p][i] if entry.per_layer else leaves[p] for p in entry.paths]
            parts = entry.form.split(read(source), tuple(t.shape for t in targets))
            for target, part in zip(targets, parts, strict=True):
                target[...] = part
    return unflatten(leaves)


def checkpoint_tensors(
    layout: list[Entry], cfg: ModelConfig, params: Params, dtype: np.dtype | None = None
) -> list[Tensor]:
    """Lists the tensors of a checkpoint, made lazily from our tree: layer by layer, then the rest.

    Raises: UserError when a leaf is no plain array (merge adapters, dequantize first).
    """
    table = param_table(cfg)
    leaves = flatten(params)
    if isinstance(params.get("layers"), tuple):
        layers = [flatten({"layers": layer}) for layer in params["layers"]]
        leaves |= {path: [layer[path] for layer in layers] for path in layers[0]}
    used = [e for e in layout if e.paths[0] in table]
    order = [(i, e) for i in range(cfg.num_layers) for e in used if e.per_layer]
    order += [(0, e) for e in used if not e.per_layer]
    return [_tensor(e, e.source.format(i=i), i, table, leaves, dtype) for i, e in order]


def _tensor(entry, source, i, table, leaves, dtype) -> Tensor:
    """Describes one tensor; its leaves are sliced, moved to the host and joined in `make`."""
    for path in entry.paths:
        leaf = leaves.get(path)
        first = leaf[0] if isinstance(leaf, list) else leaf
        if not hasattr(first, "dtype") or not hasattr(first, "shape"):
            raise UserError(
                f"{path} is {type(first).__name__}, not an array: merge adapters and dequantize"
                " before saving a checkpoint."
            )
    skip = 1 if entry.per_layer else 0
    shapes = tuple(table[p].shape[skip:] for p in entry.paths)
    first = leaves[entry.paths[0]]
    stored = np.dtype(dtype or (first[0] if isinstance(first, list) else first).dtype)

    def make() -> np.ndarray:
        parts = [np.asarray(leaves[p][i] if entry.per_layer else leaves[p]) for p in entry.paths]
        for path, part, shape in zip(entry.paths, parts, shapes, strict=True):
            if part.shape != shape:
                raise UserError(f"{path} has shape {part.shape}, the config says {shape}.")
        return np.ascontiguousarray(entry.form.join(*parts).astype(stored, copy=False))

    return Tensor(source, entry.form.shape(shapes), stored, make)


def sources_of(entry: Entry, cfg: ModelConfig) -> list[str]:
    """Names the tensors of an entry: one a layer, or one."""
    if not entry.per_layer:
        return [entry.source]
    return [entry.source.format(i=i) for i in range(cfg.num_layers)]


def _check_sizes(cfg: ModelConfig, where: str) -> None:
    """A damaged header must not make us allocate or loop by its numbers."""
    for name in ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff"):
        value = getattr(cfg, name)
        if not isinstance(value, int) or not 0 < value < 2**24:
            raise Corrupt(f"{where}: {name} is {value!r}, not a positive integer.")


def _check(used, cfg, table, stored, where, ignore) -> None:
    """Compares names and shapes of a checkpoint with what the config asks for."""
    layers_wanted = cfg.num_layers if any(e.per_layer for e in used) else 0
    if layers_wanted > len(stored):
        raise Corrupt(f"{where}: has {len(stored)} tensors for {cfg.num_layers} layers.")
    wanted = {}
    for entry in used:
        skip = 1 if entry.per_layer else 0
        shape = entry.form.shape(tuple(table[p].shape[skip:] for p in entry.paths))
        wanted |= dict.fromkeys(sources_of(entry, cfg), shape)
    missing = sorted(set(wanted) - set(stored))
    if missing:
        raise Corrupt(f"{where}: {len(missing)} tensors are missing, first {missing[0]}.")
    extra = sorted(n for n in set(stored) - set(wanted) if not ignore(n))
    if extra:
        raise Corrupt(
            f"{where}: {len(extra)} tensors have no place in a {cfg.family} model,"
            f" first {extra[0]}."
        )
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            raise Corrupt(
                f"{where}: tensor {name} has shape {stored[name].shape}, the config says {shape}."
            )
