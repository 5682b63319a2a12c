"""The device state of S concurrent requests and the pure functions that advance it.

Three programs: `prefill` writes a piece of one prompt into one slot's rows of the cache, `seat`
gives a slot its request's sampling parameters, `step` decodes one token for all slots at once.
A prompt is prefilled up to, not including, its last token: the first step feeds that one, so every
generated token comes out of the same program at the same shape. Shapes are fixed, the state is
donated; which request lives in which slot is the scheduler's business.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from internjax.models import rope
from internjax.models.cache import KVCache, in_place, init_cache
from internjax.models.config import ModelConfig
from internjax.models.decoder import decode, unembed
from internjax.serve.sampling import Sampled, Sampling, advance, init_sampling, sample
from internjax.tree import Leaf, Params


@struct.dataclass
class Slots:
    """Everything that lives on the device between two steps.

    Fields:
      cache: rows of C positions, one a slot.
      length: `[S]` int32, positions written so far; a slot's next token goes there. Slots that are
        free or still prefilling take part in every step: what they write at `length` is overwritten
        before it is read.
      token: `[S]` int32, the token to feed next.
      inv_freq: `[S, H/2]` rotary frequencies, fixed when a request is seated.
      sampling: parameters and tables of every slot.
    """

    cache: KVCache
    length: Leaf
    token: Leaf
    inv_freq: Leaf
    sampling: Sampling


def init_slots(cfg: ModelConfig, num_slots: int, context: int, kv_dtype: str) -> Slots:
    """Makes the state of `num_slots` empty slots of `context` positions."""
    freq = jnp.asarray(rope.inv_freq(cfg), jnp.float32)
    return Slots(
        cache=init_cache(cfg, num_slots, context, kv_dtype),
        length=jnp.zeros(num_slots, jnp.int32),
        token=jnp.zeros(num_slots, jnp.int32),
        inv_freq=jnp.repeat(freq[None], num_slots, axis=0),
        sampling=init_sampling(num_slots, cfg.vocab_size),
    )


@partial(jax.jit, static_argnames=("cfg", "attend"), donate_argnames="slots")
def prefill(
    params: Params,
    slots: Slots,
    slot: Int[Array, ""],
    tokens: Int[Array, " T"],
    start: Int[Array, ""],
    count: Int[Array, ""],
    inv_freq: Float[Array, " half"],
    *,
    cfg: ModelConfig,
    attend: int,
) -> Slots:
    """Writes `tokens[:count]` (the rest is padding) of one prompt at positions start.. of a slot.

    Args:
      attend: positions taken out of the slot's row and put back; at least start + T, so that the
        cost follows the prompt and not the cache. Not looked at where the cache is used in place.
    """

    run = partial(decode, params, tokens[None], cfg=cfg, start=start[None], inv_freq=inv_freq)
    if in_place(cfg, slots.cache.k[0].dtype):
        _, cache = run(cache=slots.cache, rows=slot[None])
    else:
        _, row = run(cache=jax.tree.map(partial(_take_row, slot, attend), slots.cache))
        cache = jax.tree.map(partial(_put_row, slot), slots.cache, row)
    return slots.replace(cache=cache, length=slots.length.at[slot].set(start + count))


def _take_row(slot: Array, attend: int, x: Array) -> Array:
    return lax.dynamic_slice(x, (slot,) + (0,) * (x.ndim - 1), (1, attend, *x.shape[2:]))


def _put_row(slot: Array, x: Array, row: Array) -> Array:
    return lax.dynamic_update_slice(x, row, (slot,) + (0,) * (x.ndim - 1))


@partial(jax.jit, donate_argnames="slots")
def seat(
    slots: Slots,
    slot: Int[Array, ""],
    length: Int[Array, ""],
    token: Int[Array, ""],
    inv_freq: Float[Array, " half"],
    row: dict[str, Array],
) -> Slots:
    """Readies a slot for decoding: `length` positions are cached, `token` is fed next.

    Args:
      row: `sampling.scalars` and `bans.ban_row` of the request; with `in_prompt` and `bias` `[V]`
        if it adjusts.
    """
    fields = {name: getattr(slots.sampling, name).at[slot].set(x) for name, x in row.items()}
    fields["counts"] = slots.sampling.counts.at[slot].set(0)
    return slots.replace(
        length=slots.length.at[slot].set(length),
        token=slots.token.at[slot].set(token),
        inv_freq=slots.inv_freq.at[slot].set(inv_freq),
        sampling=slots.sampling.replace(**fields),
    )


@partial(jax.jit, static_argnames=("cfg", "attend"), donate_argnames="slots")
def step(
    params: Params,
    slots: Slots,
    active: Bool[Array, " S"],
    mask: UInt32[Array, "S W"],
    masked: Bool[Array, " S"],
    *,
    cfg: ModelConfig,
    attend: int,
) -> tuple[Slots, Sampled]:
    """Decodes one token for every slot; only `active` ones advance.

    Args:
      mask, masked: tokens that a slot's grammar allows, see `sampling.sample`.
      attend: cache positions read; more than the length of every active slot.
    """
    states, cache = decode(
        params,
        slots.token[:, None],
        slots.cache,
        slots.length,
        cfg,
        inv_freq=slots.inv_freq,
        attend=attend,
    )
    logits = unembed(params, states[:, 0], cfg)
    out = sample(logits, slots.sampling, slots.length + 1, mask, masked)
    advanced = slots.replace(
        cache=cache,
        length=slots.length + active.astype(jnp.int32),
        token=jnp.where(active, out.token, slots.token),
        sampling=advance(slots.sampling, out.token, active),
    )
    return advanced, out


@partial(jax.jit, donate_argnames="slots")
def wipe(slots: Slots, slot: Int[Array, ""]) -> Slots:
    """Zeroes a slot's cache: NaN values would reach its next owner through weights of zero."""
    cache = jax.tree.map(lambda x: x.at[slot].set(jnp.zeros((), x.dtype)), slots.cache)
    return slots.replace(cache=cache, length=slots.length.at[slot].set(0))
