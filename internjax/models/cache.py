"""The keys and values of past tokens: one array a layer, optionally int8 with a scale a token."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from internjax.kernels.attention import attention
from internjax.kernels.cpu import rope_write as cpu_rope_write
from internjax.kernels.cpu.attention import paged_attention, serves
from internjax.kernels.platform import target
from internjax.models import cache_blocks, rope
from internjax.models.config import ModelConfig
from internjax.tree import Leaf


@struct.dataclass
class KVCache:
    """Keys (rotated) and values of every layer, rows of C positions.

    Fields:
      k, v: tuples of L arrays `[B, C, K, H]`; one array a layer, so that a donated buffer is
        written in place (a stacked one is copied at every step on CPU).
      k_scale, v_scale: tuples of L arrays `[B, C, K]` float32 when k and v are int8, else ().
    """

    k: tuple[Leaf, ...]
    v: tuple[Leaf, ...]
    k_scale: tuple[Leaf, ...]
    v_scale: tuple[Leaf, ...]

    @property
    def length(self) -> int:
        """C, the positions a row can hold."""
        return self.k[0].shape[1]


def init_cache(cfg: ModelConfig, batch: int, length: int, dtype="float32") -> KVCache:
    """Makes an empty cache; `dtype` "int8" quantizes per token and head, symmetric to 127 steps."""
    shape = (batch, length, cfg.num_kv_heads, cfg.head_dim)

    def arrays(shape: tuple[int, ...], dtype) -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape, dtype) for _ in range(cfg.num_layers))

    scale = (lambda: arrays(shape[:3], jnp.float32)) if jnp.dtype(dtype) == jnp.int8 else tuple
    return KVCache(arrays(shape, dtype), arrays(shape, dtype), scale(), scale())


def quantize_rows(x: Float[Array, "B T K H"]) -> tuple[Array, Array]:
    """Returns int8 values and a float32 scale a token and head: x ~ values * scale."""
    scale = jnp.maximum(jnp.abs(x).max(axis=-1).astype(jnp.float32) / 127.0, 1e-12)
    values = jnp.round(x.astype(jnp.float32) / scale[..., None]).astype(jnp.int8)
    return values, scale


def write(store: Array, new: Array, start: Int[Array, " B"]) -> Array:
    """Writes `new` `[B, T, ...]` into rows of `store` `[B, C, ...]` at each row's own `start`."""
    if store.shape[0] == 1:  # a plain slice update stays in place; a batch of them is a scatter
        return lax.dynamic_update_slice_in_dim(store, new.astype(store.dtype), start[0], axis=1)
    B, T = new.shape[:2]
    rows = jnp.arange(B)[:, None]
    columns = start[:, None] + jnp.arange(T, dtype=start.dtype)[None, :]
    return store.at[rows, columns].set(new.astype(store.dtype), mode="drop")


def update_layer(
    cache: KVCache, layer: int, k: Array, v: Array, start: Int[Array, " B"]
) -> KVCache:
    """Returns the cache with keys and values `[B, T, K, H]` of one layer written at `start`."""
    if cache.k_scale:
        k, k_scale = quantize_rows(k)
        v, v_scale = quantize_rows(v)
        cache = cache.replace(
            k_scale=_set(cache.k_scale, layer, write(cache.k_scale[layer], k_scale, start)),
            v_scale=_set(cache.v_scale, layer, write(cache.v_scale[layer], v_scale, start)),
        )
    return cache.replace(
        k=_set(cache.k, layer, write(cache.k[layer], k, start)),
        v=_set(cache.v, layer, write(cache.v[layer], v, start)),
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
    rows: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T N H"], KVCache]:
    """Returns rotated queries, and the cache with rotated keys and values written at `start`.

    The kernel of a Hopper GPU or of the CPU does all of it where it serves.

    Args:
      rows: of the cache, where the CPU kernels work in place (`in_place`); else and by default each
        sequence has its own.
    """
    if cache_blocks.writes(q, cache.k[layer]):
        old = cache.k[layer], cache.v[layer]
        places = _places(cache, rows, start, q.shape[1])
        q, k, v = cache_blocks.rotate_and_write(q, k, v, angle, factor, *old, places)
        return q, cache.replace(k=_set(cache.k, layer, k), v=_set(cache.v, layer, v))
    if not (_on_cpu() and cpu_rope_write.serves(q, cache.k[layer].dtype)):
        _check_whole(rows)
        q, k = rope.rotate(q, angle, factor), rope.rotate(k, angle, factor)
        return q, update_layer(cache, layer, k, v, start)
    places = _places(cache, rows, start, q.shape[1])
    turns = jnp.stack([jnp.cos(angle), jnp.sin(angle)]) * factor
    stores = [x for x in (cache.k, cache.v, cache.k_scale, cache.v_scale) if x]
    pool = tuple(x[layer] for x in stores)
    q, pool = cpu_rope_write.rope_write(q, k, v, turns, pool, places)
    new = [_set(all, layer, x) for all, x in zip(stores, pool, strict=True)]
    return q, KVCache(*new, *[()] * (4 - len(new)))


def read_layer(cache: KVCache, layer: int, attend: int | None, dtype) -> tuple[Array, Array]:
    """Returns the first `attend` keys and values `[B, attend, K, H]` of a layer in `dtype`."""
    k, v = cache.k[layer][:, :attend], cache.v[layer][:, :attend]
    if not cache.k_scale:
        return k.astype(dtype), v.astype(dtype)
    k_scale, v_scale = cache.k_scale[layer][:, :attend], cache.v_scale[layer][:, :attend]
    return (
        k.astype(dtype) * k_scale[..., None].astype(dtype),
        v.astype(dtype) * v_scale[..., None].astype(dtype),
    )


def attend_layer(
    q: Float[Array, "B T N H"],
    cache: KVCache,
    layer: int,
    start: Int[Array, " B"],
    attend: int | None = None,
    rows: Int[Array, " B"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attends queries at positions start.. of each row to the cached keys up to their own.

    Where the kernel of a Hopper GPU or of the CPU serves, it reads the cache in place and as far as
    each row is filled; else the first `attend` positions are read out as one matrix.
    """
    if cache_blocks.attends(q, cache.k[layer]):
        _check_whole(rows)
        return cache_blocks.attend(q, cache.k[layer], cache.v[layer], start, attend)
    if _on_cpu() and serves(q, cache.k[layer].dtype):
        scales = {}
        if cache.k_scale:
            scales = {"k_scale": cache.k_scale[layer], "v_scale": cache.v_scale[layer]}
        table = _rows(rows, q.shape[0])[:, None]  # a row is one block
        lengths = start + q.shape[1]
        return paged_attention(q, cache.k[layer], cache.v[layer], table, lengths, **scales)
    _check_whole(rows)
    k, v = read_layer(cache, layer, attend, q.dtype)
    positions = start[:, None] + jnp.arange(q.shape[1], dtype=start.dtype)[None, :]
    keys = jnp.arange(k.shape[1], dtype=start.dtype)
    return attention(q, k, v, keys[None, None, :] <= positions[:, :, None])


def in_place(cfg: ModelConfig, dtype) -> bool:
    """Whether the CPU kernels read and write a cache of `dtype` where it is, and only what is used.

    Then one compiled program serves any length, and any rows of the cache.
    """
    q = jax.ShapeDtypeStruct((1, 1, cfg.num_heads, cfg.head_dim), jnp.dtype(cfg.dtype))
    dtype = jnp.dtype(dtype)
    return _on_cpu() and serves(q, dtype) and cpu_rope_write.serves(q, dtype)


def _on_cpu() -> bool:
    return target().platform == "cpu"  # a CPU host compiles for GPUs, too


def _places(
    cache: KVCache, rows: Array | None, start: Int[Array, " B"], tokens: int
) -> Int[Array, "B T"]:
    """Positions of the cache, counted through its rows; -1 behind the end of a row."""
    positions = start[:, None] + jnp.arange(tokens, dtype=start.dtype)[None]
    first = cache.length * _rows(rows, len(start))[:, None]
    return jnp.where(positions < cache.length, first + positions, -1)


def _check_whole(rows: Array | None) -> None:
    if rows is not None:
        raise ValueError("rows of the cache can be chosen only where `in_place` says so.")


def _rows(rows: Array | None, batch: int) -> Array:
    return jnp.arange(batch, dtype=jnp.int32) if rows is None else rows


def _set(items: tuple, index: int, value) -> tuple:
    return (*items[:index], value, *items[index + 1 :])
