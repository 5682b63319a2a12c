"""The keys and values of past tokens: a pool of blocks, optionally int8 with a scale a token.

Sequences that begin alike can share blocks (PagedAttention, arXiv:2309.06180).
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Shaped

from internjax.kernels.attention import attention
from internjax.kernels.cpu import rope_write as cpu_rope_write
from internjax.kernels.cpu.attention import paged_attention, serves
from internjax.kernels.platform import target
from internjax.models import cache_blocks, rope
from internjax.models.config import ModelConfig
from internjax.tree import Leaf


@struct.dataclass
class KVCache:
    """Keys (rotated) and values of every layer, in a pool of P blocks of C positions.

    A sequence names its blocks, in order, in a row of a table `[B, n]`; -1 stands for none. Where
    no table is given each sequence has one block, its row.

    Fields:
      k, v: tuples of L arrays `[P, C, K, H]`; one array a layer, so that a donated buffer is
        written in place (a stacked one is copied at every step on CPU).
        Of 4 bits they are uint8 `[P, C, K, H/2]`: dim i in the low, i + H/2 in the high half.
      k_scale, v_scale: tuples of L arrays, float32: `[P, C, K]` when k and v are int8,
        `[P, C, K, 2]` (step and least value) when they are of 4 bits, else ().
    """

    k: tuple[Leaf, ...]
    v: tuple[Leaf, ...]
    k_scale: tuple[Leaf, ...]
    v_scale: tuple[Leaf, ...]

    @property
    def block(self) -> int:
        """C, the positions of a block."""
        return self.k[0].shape[1]


def init_cache(cfg: ModelConfig, blocks: int, block: int, dtype="float32") -> KVCache:
    """Makes an empty cache of a dtype, of "int8" or of "int4": rounded per token and head."""
    shape = (blocks, block, cfg.num_kv_heads, cfg.head_dim)

    def arrays(shape: tuple[int, ...], dtype) -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape, dtype) for _ in range(cfg.num_layers))

    if dtype == "int4":
        values, scales = (*shape[:3], cfg.head_dim // 2), (*shape[:3], 2)
        kinds = (values, jnp.uint8), (values, jnp.uint8), (scales, jnp.float32)
        return KVCache(*(arrays(*kind) for kind in (*kinds, kinds[-1])))
    scale = (lambda: arrays(shape[:3], jnp.float32)) if jnp.dtype(dtype) == jnp.int8 else tuple
    return KVCache(arrays(shape, dtype), arrays(shape, dtype), scale(), scale())


def unwritten_cache(cfg: ModelConfig, blocks: int, block: int, dtype="float32") -> KVCache:
    """Makes a cache that holds anything and takes memory as it fills; only where `in_place`."""
    zeros = jax.eval_shape(lambda: init_cache(cfg, blocks, block, dtype))
    shapes, tree = jax.tree.flatten(zeros)
    return jax.tree.unflatten(tree, cpu_rope_write.unwritten(shapes))


def quantize_rows(x: Float[Array, "B T K H"]) -> tuple[Array, Array]:
    """Returns int8 values and a float32 scale a token and head: x ~ values * scale."""
    scale = jnp.maximum(jnp.abs(x).max(axis=-1).astype(jnp.float32) / 127.0, 1e-12)
    values = jnp.round(x.astype(jnp.float32) / scale[..., None]).astype(jnp.int8)
    return values, scale


def quantize_nibbles(x: Float[Array, "B T K H"]) -> tuple[Array, Array]:
    """Returns 4-bit values `[B, T, K, H/2]` and (step, least value) `[B, T, K, 2]` float32.

    Asymmetric per token and head, as `quant_policy=4` of LMDeploy 0.4 and later.
    """
    x = x.astype(jnp.float32)
    low = x.min(axis=-1)
    step = jnp.maximum((x.max(axis=-1) - low) / 15.0, 1e-12)
    codes = jnp.clip(jnp.round((x - low[..., None]) / step[..., None]), 0, 15).astype(jnp.uint8)
    first, second = jnp.split(codes, 2, axis=-1)
    return first | (second << 4), jnp.stack([step, low], axis=-1)


def dequantize_nibbles(values: Array, scales: Array, dtype) -> Array:
    """Undoes `quantize_nibbles` but for its rounding."""
    codes = jnp.concatenate([values & 15, values >> 4], axis=-1).astype(dtype)
    return codes * scales[..., :1].astype(dtype) + scales[..., 1:].astype(dtype)


def write(
    store: Shaped[Array, "P C ..."], new: Shaped[Array, "B T ..."], places: Int[Array, "B T"]
) -> Shaped[Array, "P C ..."]:
    """Writes `new` at `places`, counted through the blocks; what is at -1 is not written."""
    flat = store.reshape(-1, *store.shape[2:])
    goals = jnp.where(places < 0, len(flat), places)
    return flat.at[goals].set(new.astype(store.dtype), mode="drop").reshape(store.shape)


def update_layer(
    cache: KVCache, layer: int, k: Array, v: Array, places: Int[Array, "B T"]
) -> KVCache:
    """Returns the cache with keys and values `[B, T, K, H]` of one layer written at `places`."""
    if cache.k_scale:
        rounded = quantize_nibbles if cache.k[layer].dtype == jnp.uint8 else quantize_rows
        (k, k_scale), (v, v_scale) = rounded(k), rounded(v)
        cache = cache.replace(
            k_scale=_set(cache.k_scale, layer, write(cache.k_scale[layer], k_scale, places)),
            v_scale=_set(cache.v_scale, layer, write(cache.v_scale[layer], v_scale, places)),
        )
    return cache.replace(
        k=_set(cache.k, layer, write(cache.k[layer], k, places)),
        v=_set(cache.v, layer, write(cache.v[layer], v, places)),
    )


def rotate_and_write(
    cache: KVCache,
    layer: int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    angle: Float[Array, "B T half"],
    factor: float,
    start: Int[Array, " B"],
    table: Int[Array, "B n"] | None = None,
) -> tuple[Float[Array, "B T N H"], KVCache]:
    """Returns rotated queries, and the cache with rotated keys and values written at `start`.

    The kernel of a Hopper GPU or of the CPU does all of it where it serves. What has no block is
    not written.
    """
    places = _places(cache, table, start, q.shape[1])
    if cache_blocks.writes(q, cache.k[layer]):
        old = cache.k[layer], cache.v[layer]
        q, k, v = cache_blocks.rotate_and_write(q, k, v, angle, factor, *old, places)
        return q, cache.replace(k=_set(cache.k, layer, k), v=_set(cache.v, layer, v))
    if not (_on_cpu() and cpu_rope_write.serves(q, cache.k[layer].dtype)):
        q, k = rope.rotate(q, angle, factor), rope.rotate(k, angle, factor)
        return q, update_layer(cache, layer, k, v, places)
    turns = jnp.stack([jnp.cos(angle), jnp.sin(angle)]) * factor
    stores = [x for x in (cache.k, cache.v, cache.k_scale, cache.v_scale) if x]
    pool = tuple(x[layer] for x in stores)
    q, pool = cpu_rope_write.rope_write(q, k, v, turns, pool, places)
    new = [_set(all, layer, x) for all, x in zip(stores, pool, strict=True)]
    return q, KVCache(*new, *[()] * (4 - len(new)))


def read_layer(
    cache: KVCache, layer: int, table: Int[Array, "B n"] | None, attend: int | None, dtype
) -> tuple[Array, Array]:
    """Returns the first `attend` keys and values `[B, attend, K, H]` of a layer in `dtype`."""

    def rows(store: tuple[Array, ...]) -> Array:
        if table is None:
            return store[layer][:, :attend]
        used = table if attend is None else table[:, : -(-attend // cache.block)]
        blocks = store[layer][_readable(used)]
        return blocks.reshape(len(used), -1, *blocks.shape[3:])[:, :attend]

    if not cache.k_scale:
        return rows(cache.k).astype(dtype), rows(cache.v).astype(dtype)
    pairs = (cache.k, cache.k_scale), (cache.v, cache.v_scale)
    (k, k_scale), (v, v_scale) = ((rows(x), rows(scale)) for x, scale in pairs)
    if k.dtype == jnp.uint8:
        return dequantize_nibbles(k, k_scale, dtype), dequantize_nibbles(v, v_scale, dtype)
    return tuple(
        x.astype(dtype) * scale[..., None].astype(dtype)
        for x, scale in ((k, k_scale), (v, v_scale))
    )


def attend_layer(
    q: Float[Array, "B T N H"],
    cache: KVCache,
    layer: int,
    start: Int[Array, " B"],
    attend: int | None = None,
    table: Int[Array, "B n"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attends queries at positions start.. of each sequence to the cached keys up to their own.

    Where the kernel of a Hopper GPU or of the CPU serves, it reads the cache in place and as far as
    each sequence is filled; else the first `attend` positions are read out as one matrix. What
    comes of a sequence without blocks is of no use.
    """
    if cache_blocks.attends(q, cache.k[layer]):
        blocks = _readable(_whole(table, len(start)))
        return cache_blocks.attend(q, cache.k[layer], cache.v[layer], start, attend, blocks)
    if _on_cpu() and serves(q, cache.k[layer].dtype):
        scales = {}
        if cache.k_scale:
            scales = {"k_scale": cache.k_scale[layer], "v_scale": cache.v_scale[layer]}
        blocks = _whole(table, len(start))
        lengths = jnp.where(blocks[:, 0] < 0, 0, start + q.shape[1])
        where = _readable(blocks), lengths
        return paged_attention(q, cache.k[layer], cache.v[layer], *where, **scales)
    k, v = read_layer(cache, layer, table, attend, q.dtype)
    positions = start[:, None] + jnp.arange(q.shape[1], dtype=start.dtype)[None, :]
    keys = jnp.arange(k.shape[1], dtype=start.dtype)
    return attention(q, k, v, keys[None, None, :] <= positions[:, :, None])


def in_place(cfg: ModelConfig, dtype) -> bool:
    """Whether the CPU kernels read and write a cache of `dtype` where it is, and only what is used.

    Then one compiled program serves any length.
    """
    q = jax.ShapeDtypeStruct((1, 1, cfg.num_heads, cfg.head_dim), jnp.dtype(cfg.dtype))
    dtype = jnp.dtype(dtype)
    return _on_cpu() and serves(q, dtype) and cpu_rope_write.serves(q, dtype)


def _on_cpu() -> bool:
    here = target()  # a CPU host compiles for GPUs, too
    return here.platform == "cpu" and here.whole


def _places(
    cache: KVCache, table: Array | None, start: Int[Array, " B"], tokens: int
) -> Int[Array, "B T"]:
    """Positions of the cache, counted through its blocks; -1 where a sequence has no block."""
    table, C = _whole(table, len(start)), cache.block
    positions = start[:, None] + jnp.arange(tokens, dtype=start.dtype)[None]
    column = positions // C
    block = jnp.take_along_axis(table, jnp.minimum(column, table.shape[1] - 1), axis=1)
    there = (column < table.shape[1]) & (block >= 0)
    return jnp.where(there, block * C + positions % C, -1)


def _whole(table: Array | None, batch: int) -> Int[Array, "B n"]:
    return jnp.arange(batch, dtype=jnp.int32)[:, None] if table is None else table


def _readable(table: Array) -> Array:
    """Where there is no block, padding reads a sequence's first: what is there is its own."""
    return jnp.where(table < 0, jnp.maximum(table[:, :1], 0), table)


def _set(items: tuple, index: int, value) -> tuple:
    return (*items[:index], value, *items[index + 1 :])
