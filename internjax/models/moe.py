"""Mixtures of experts: a router gives every token to k of E feed-forward blocks.

Two ways of doing the experts' work, chosen by `cfg.capacity_factor`:
  limited (> 0): every device has C slots for each expert (GShard, arXiv:2006.16668). Shapes are
    fixed, products are plain batched ones, and over `par.expert` an all-to-all brings the slots to
    the devices of their experts and back. What finds no slot is dropped.
  dropless (0): assignments are sorted into blocks of one expert each (after MegaBlocks,
    arXiv:2211.15841) and no token is lost. How many go where is not known when the program is
    compiled, so any all-to-all would need slots for all tokens at every device; a gather of the
    tokens and a scatter of the sums move just as much and pad nothing.
Letters: N tokens of this device, E experts, k of them a token, C slots of an expert, F its width;
A = k N assignments, all first choices before all second ones, each by the tokens' order.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from internjax.collectives import Parallel, token_mean
from internjax.kernels.platform import choose, not_for_hopper
from internjax.models.config import ModelConfig
from internjax.models.init import InitConfig
from internjax.models.layers import swiglu
from internjax.models.params import ParamSpec
from internjax.tree import Params, wide
from internjax.weights import QuantWeight, TurnedWeight, Weight, as_matrix, gather, plain

LARGEST_BLOCK, SMALLEST_BLOCK = 512, 8  # rows


def expert_table(cfg: ModelConfig, init: InitConfig) -> dict[str, ParamSpec]:
    """Lists the weights that a mixture adds to the layers."""
    L, D, E, F = cfg.num_layers, cfg.d_model, cfg.num_experts, cfg.expert_d_ff
    inner, out = init.inner, init.residual(L)
    columns = ("layers", "experts", "embed", "ffn")
    return {
        # Small, and every device decides with all of it: never cut.
        "layers/router": ParamSpec((L, D, E), ("layers", None, None), inner),
        "layers/expert_gate": ParamSpec((L, E, D, F), columns, inner),
        "layers/expert_up": ParamSpec((L, E, D, F), columns, inner),
        "layers/expert_down": ParamSpec((L, E, F, D), ("layers", "experts", "ffn", "embed"), out),
    }


def mixture(
    h: Float[Array, "B T D"], w: Params, cfg: ModelConfig, par: Parallel
) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
    """Sends every token through its experts.

    Args:
      h: normed states; inside a `shard_map` whole rows, equal on the devices of `par.tensor`.

    Returns: the experts' weighted sums, partial over `par.tensor`, and the auxiliary loss, a mean
      over the tokens of the whole batch and so the same number on every device.
    """
    x = h.reshape(-1, h.shape[-1])
    logits = x.astype(wide(x.dtype)) @ w["router"].astype(wide(x.dtype))
    gates, experts = route(logits, cfg)
    work = _limited if cfg.capacity_factor else _dropless
    y = work(x, gates.astype(x.dtype), experts, w, cfg, par)
    return y.reshape(h.shape), auxiliary_loss(logits, experts, cfg, par)


def route(
    logits: Float[Array, "N E"], cfg: ModelConfig
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
    """Chooses the k likeliest experts of every token, the likeliest first, and their shares."""
    gates, experts = lax.top_k(jax.nn.softmax(logits, axis=-1), cfg.experts_per_token)
    if cfg.normalize_gates:
        gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
    return gates, experts


def auxiliary_loss(
    logits: Float[Array, "N E"], experts: Int[Array, "N k"], cfg: ModelConfig, par: Parallel
) -> Float[Array, ""]:
    """Returns what keeps a router even and its logits small, times the weights of `cfg`.

    Balance (arXiv:2101.03961, equations 4 to 6; for k choices as for k tokens): E sum_e f_e P_e,
    with f_e the share of assignments to e, before any is dropped, and P_e the mean probability of
    e; 1 when both are even. Router z-loss (arXiv:2202.08906, equation 5): the mean squared
    logarithm of the softmax's normaliser. Both over all positions, padding too.
    """
    N, E = logits.shape
    count = jnp.asarray(N, logits.dtype)
    chosen = jnp.zeros(E, logits.dtype).at[experts.reshape(-1)].add(1 / cfg.experts_per_token)
    probability = jnp.sum(jax.nn.softmax(logits, axis=-1), axis=0)
    squares = jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2)
    f, P, z = (token_mean(v, count, par) for v in (chosen, probability, squares))
    return cfg.balance_loss * E * jnp.sum(f * P) + cfg.router_z_loss * z


def unlimited(cfg: ModelConfig) -> ModelConfig:
    """The same model without a limit: what a text is given must not depend on its neighbours."""
    return replace(cfg, capacity_factor=0.0)


def capacity(cfg: ModelConfig, tokens: int) -> int:
    """Slots of an expert for the `tokens` of one device: ceil(factor k N / E), at most N."""
    even = cfg.experts_per_token * tokens / cfg.num_experts
    return min(tokens, math.ceil(cfg.capacity_factor * even))


def _limited(x: Array, gates: Array, experts: Array, w: Params, cfg: ModelConfig, par: Parallel):
    """GShard: an assignment whose expert has C earlier ones of this device's is dropped."""
    (N, D), E = x.shape, cfg.num_experts
    C = capacity(cfg, N)
    ids = experts.T.reshape(-1)
    rank, _ = _ranks(ids, E)
    slot = jnp.where(rank < C, ids * C + rank, E * C)
    rows = _dispatch(x, slot, E * C).reshape(E, C, D)
    if par.expert is not None:  # [E, C, D] -> [own E, C of every device, D]
        rows = lax.all_to_all(rows, par.expert, split_axis=0, concat_axis=1, tiled=True)
    w_gate, w_up, w_down = (plain(each, x.dtype) for each in _weights(w, par))
    hidden = swiglu(
        jnp.einsum("ECD,EDF->ECF", rows, w_gate), jnp.einsum("ECD,EDF->ECF", rows, w_up)
    )
    y = jnp.einsum("ECF,EFD->ECD", hidden, w_down)
    if par.expert is not None:
        y = lax.all_to_all(y, par.expert, split_axis=1, concat_axis=0, tiled=True)
    return _combine(y.reshape(E * C, D), slot, gates)


def _dropless(x: Array, gates: Array, experts: Array, w: Params, cfg: ModelConfig, par: Parallel):
    """MegaBlocks: every assignment is done, in blocks of rows with one expert each."""
    own = cfg.num_experts
    if par.expert is not None:
        x, gates, experts = (
            lax.all_gather(v, par.expert, axis=0, tiled=True) for v in (x, gates, experts)
        )
        own //= lax.axis_size(par.expert)
        experts = experts - lax.axis_index(par.expert) * own
    ids = experts.T.reshape(-1)
    ids = jnp.where((ids >= 0) & (ids < own), ids, own)  # own: an expert of another device
    slot, owner, used, size = _blocks(ids, own, x.shape[0], cfg)
    rows = _dispatch(x, slot, owner.shape[0] * size).reshape(-1, size, x.shape[1])
    w_gate, w_up, w_down = _weights(w, par)
    hidden = swiglu(
        expert_product(rows, w_gate, owner, used), expert_product(rows, w_up, owner, used)
    )
    y = expert_product(hidden, w_down, owner, used)
    y = _combine(y.reshape(-1, x.shape[1]), slot, gates)
    if par.expert is None:
        return y
    return lax.psum_scatter(y, par.expert, scatter_dimension=0, tiled=True)


def _weights(w: Params, par: Parallel) -> tuple[Weight, Weight, Weight]:
    """The weights of this device's experts, gathered where ZeRO 3 cut them."""
    cut = (("expert_gate", 1), ("expert_up", 1), ("expert_down", 2))
    return tuple(gather(w[name], dim, par) for name, dim in cut)


def _ranks(ids: Int[Array, " A"], groups: int) -> tuple[Int[Array, " A"], Int[Array, " G"]]:
    """How many earlier assignments have the same expert, and how many each has in all."""
    places = lax.iota(ids.dtype, ids.shape[0])
    ordered, order = lax.sort_key_val(ids, places)  # stable
    counts = jnp.zeros(groups, ids.dtype).at[ids].add(1)
    starts = jnp.cumsum(counts, dtype=ids.dtype) - counts
    return jnp.zeros_like(ids).at[order].set(places - starts[ordered]), counts


def _blocks(
    ids: Int[Array, " A"], own: int, tokens: int, cfg: ModelConfig
) -> tuple[Int[Array, " A"], Int[Array, " M"], Int[Array, ""], int]:
    """Lays assignments into blocks of equal size with one expert each.

    Returns: the row of every assignment (beyond all rows for experts elsewhere), the expert of
      every block, the number of blocks in use, the first ones, and the rows of a block.
    """
    size = _block_size(ids.shape[0] / cfg.num_experts)
    rank, counts = _ranks(ids, own + 1)
    blocks = -(-counts[:own] // size)
    ends = jnp.cumsum(blocks, dtype=ids.dtype)
    most = tokens * min(cfg.experts_per_token, own)  # a token chooses an expert once
    owner = jnp.searchsorted(ends, lax.iota(ids.dtype, min(most, most // size + own)), side="right")
    owner = jnp.minimum(owner.astype(ids.dtype), own - 1)
    first = jnp.append(ends - blocks, owner.shape[0])
    return first[ids] * size + rank, owner, ends[-1], size


def _block_size(rows: float) -> int:
    """Half of an expert's mean rows, as a power of two: about a quarter of the work is padding."""
    size = SMALLEST_BLOCK
    while 4 * size <= rows and size < LARGEST_BLOCK:
        size *= 2
    return size


def _dispatch(x: Float[Array, "N D"], slot: Int[Array, " A"], rows: int) -> Float[Array, "R D"]:
    """Writes every assignment's token into its row; those beyond the last are left out."""
    copies = jnp.tile(x, (slot.shape[0] // x.shape[0], 1))
    return jnp.zeros((rows, x.shape[1]), x.dtype).at[slot].set(copies, mode="drop")


def _combine(
    y: Float[Array, "R D"], slot: Int[Array, " A"], gates: Float[Array, "N k"]
) -> Float[Array, "N D"]:
    """Adds up a token's experts by their shares; an assignment without a row adds nothing."""
    N, k = gates.shape
    parts = y.at[slot].get(mode="fill", fill_value=0).reshape(k, N, -1)
    return jnp.einsum("kND,Nk->ND", parts, gates)


def expert_product(
    rows: Float[Array, "M R I"], w: Weight, owner: Int[Array, " M"], used: Int[Array, ""]
) -> Float[Array, "M R O"]:
    """Multiplies blocks as `block_product` does, by weights of any kind.

    Hopper's kernel is taken where it serves, for 4-bit experts without a float copy of them.
    """
    legal = {"xla": None, "pallas": not_for_hopper()}
    if legal["pallas"] is None:
        from internjax.kernels.gpu.grouped_matmul import grouped_matmul, why_not

        whole = isinstance(w, (QuantWeight, TurnedWeight))
        matrix = as_matrix(w) if whole else plain(w, rows.dtype)
        legal["pallas"] = why_not(rows, matrix)
    best = "xla" if legal["pallas"] else "pallas"
    if choose("experts", None, legal, best=best) == "pallas":
        return grouped_matmul(rows, matrix, owner, used, implementation="pallas")
    return block_product(rows, plain(w, rows.dtype), owner, used)


@jax.custom_vjp
def block_product(
    rows: Float[Array, "M R I"],
    w: Float[Array, "E I O"],
    owner: Int[Array, " M"],
    used: Int[Array, ""],
) -> Float[Array, "M R O"]:
    """Multiplies the first `used` blocks, each by the weight of its expert; the others give 0.

    `lax.ragged_dot` says the same of sorted rows, but without a kernel for it XLA multiplies every
    row by every expert. The loop does only what is needed, and its own derivative adds to one
    array of weights in place, where that of a scan would add up whole copies.
    """

    def one(i: Array, y: Array) -> Array:
        return y.at[i].set(rows[i] @ w[owner[i]])

    return _for_used(used, one, jnp.zeros((*rows.shape[:2], w.shape[2]), rows.dtype))


def _product_forward(rows: Array, w: Array, owner: Array, used: Array):
    return block_product(rows, w, owner, used), (rows, w, owner, used)


def _product_backward(kept: tuple, gy: Array):
    rows, w, owner, used = kept

    def one(i: Array, grads: tuple[Array, Array]) -> tuple[Array, Array]:
        g_rows, g_w = grads
        part = jnp.matmul(rows[i].T, gy[i], preferred_element_type=g_w.dtype)
        return g_rows.at[i].set(gy[i] @ w[owner[i]].T), g_w.at[owner[i]].add(part)

    zeros = jnp.zeros_like(rows), jnp.zeros(w.shape, wide(w.dtype))
    g_rows, g_w = _for_used(used, one, zeros)
    return g_rows, g_w.astype(w.dtype), None, None


block_product.defvjp(_product_forward, _product_backward)


def _for_used(used: Array, one, start):
    return lax.fori_loop(jnp.zeros_like(used), used, one, start)
