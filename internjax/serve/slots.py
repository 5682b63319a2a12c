"""The device state of S concurrent requests and the pure functions that advance it.

Three programs: `prefill` writes a piece of one prompt into its blocks of the cache, `seat` gives a
slot its request's sampling parameters, `step` runs one token in each of its rows. A prompt is
prefilled up to, not including, its last token: the first step feeds that one, so every generated
token comes out of the same program. Shapes are fixed, the state is donated; which request lives in
which slot, rows and blocks is the host's business.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from internjax.models.cache import KVCache, in_place, init_cache, unwritten_cache
from internjax.models.config import ModelConfig
from internjax.models.decoder import decode, unembed
from internjax.serve.adapters import choosing
from internjax.serve.sampling import Sampled, Sampling, advance, init_sampling, sample
from internjax.serve.tensor import by_heads, gathered, whole
from internjax.tree import Leaf, Params


@struct.dataclass
class Slots:
    """Everything that lives on the device between two steps.

    Fields:
      cache: the pool of blocks that all slots share.
      token: `[S]` int32, what each slot chose last.
      sampling: parameters and tables of every slot.
    """

    cache: KVCache
    token: Leaf
    sampling: Sampling


@struct.dataclass
class Rows:
    """The R tokens that one step runs, of whichever slots; made by the host for every step.

    Fields:
      slot: `[R]` int32, whose sampling parameters a row follows.
      token: `[R]` int32, the token to feed; -1 takes what the slot chose last.
      position: `[R]` int32, its place in its request.
      table: `[R, n]` int32, the blocks of its request; -1 for none: such a row writes nothing.
      inv_freq: `[R, H/2]` float32, rotary frequencies.
      active: `[R]` bool, rows whose choice counts.
      adapter: `[R]` int32, the place of its request's LoRA adapter; -1 for none.
    """

    slot: Leaf
    token: Leaf
    position: Leaf
    table: Leaf
    inv_freq: Leaf
    active: Leaf
    adapter: Leaf


@partial(jax.jit, static_argnames=("cfg", "num_slots", "blocks", "block", "kv_dtype"))
def init_slots(cfg: ModelConfig, num_slots: int, blocks: int, block: int, kv_dtype: str) -> Slots:
    """Makes the state of `num_slots` empty slots; one program, so that a server starts fast."""
    make = unwritten_cache if in_place(cfg, kv_dtype) else init_cache
    cache = make(cfg, blocks, block, kv_dtype)
    sampling = init_sampling(num_slots, cfg.vocab_size)
    return _pinned(Slots(cache, jnp.zeros(num_slots, jnp.int32), sampling))


@partial(jax.jit, static_argnames=("cfg", "attend"), donate_argnames="cache")
def prefill(
    params: Params,
    cache: KVCache,
    table: Int[Array, "1 n"],
    tokens: Int[Array, " T"],
    start: Int[Array, ""],
    inv_freq: Float[Array, " half"],
    adapter: Int[Array, ""],
    *,
    cfg: ModelConfig,
    attend: int,
) -> KVCache:
    """Writes a piece of one prompt at positions start.. of its blocks.

    Padding behind it is not seen by what comes before and overwritten by what comes later.

    Args:
      adapter: the place of its LoRA adapter; -1 for none.
      attend: positions read; at least start + T. Not looked at where the cache is used in place.
    """
    where = {"start": start[None], "table": table, "inv_freq": inv_freq, "attend": attend}
    params = choosing(params, adapter)
    return by_heads(decode(params, tokens[None], cache, cfg=cfg, **where)[1])


@partial(jax.jit, donate_argnames="slots")
def seat(slots: Slots, slot: Int[Array, ""], row: dict[str, Array]) -> Slots:
    """Gives a slot its request's sampling parameters.

    Args:
      row: `sampling.scalars` and `bans.ban_row` of the request; with `in_prompt`, `bias` and
        `counts` `[V]` if it adjusts.
    """
    row = {"counts": jnp.int32(0), **row}
    fields = {name: getattr(slots.sampling, name).at[slot].set(x) for name, x in row.items()}
    return _pinned(slots.replace(sampling=slots.sampling.replace(**fields)))


@partial(jax.jit, static_argnames=("cfg", "attend"), donate_argnames="slots")
def step(
    params: Params,
    slots: Slots,
    rows: Rows,
    mask: UInt32[Array, "R W"],
    masked: Bool[Array, " R"],
    *,
    cfg: ModelConfig,
    attend: int,
) -> tuple[Slots, Sampled]:
    """Runs one token in every row and chooses the one that follows it.

    Rows of one request may stand side by side: all are written before any is read.

    Args:
      mask, masked: tokens that a row's grammar allows, see `sampling.sample`.
      attend: cache positions read; more than every row's position.
    """
    token = jnp.where(rows.token < 0, slots.token[rows.slot], rows.token)
    states, cache = decode(
        choosing(params, rows.adapter),
        token[:, None],
        slots.cache,
        rows.position,
        cfg,
        inv_freq=rows.inv_freq,
        attend=attend,
        table=rows.table,
    )
    logits = gathered(unembed(params, states[:, 0], cfg))
    out = sample(logits, slots.sampling, rows.slot, rows.position + 1, mask, masked)
    goal = jnp.where(rows.active, rows.slot, len(slots.token))  # behind the end: dropped
    slots = Slots(
        cache=cache,
        token=slots.token.at[goal].set(out.token, mode="drop"),
        sampling=advance(slots.sampling, rows.slot, out.token, rows.active),
    )
    return _pinned(slots), whole(out)


@partial(jax.jit, donate_argnames="cache")
def wipe(cache: KVCache, block: Int[Array, ""]) -> KVCache:
    """Zeroes a block: NaN values would reach its next owner through weights of zero."""
    return by_heads(jax.tree.map(lambda x: x.at[block].set(jnp.zeros((), x.dtype)), cache))


def _pinned(slots: Slots) -> Slots:
    return Slots(by_heads(slots.cache), whole(slots.token), whole(slots.sampling))
