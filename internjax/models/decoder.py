"""THE model: one pre-norm decoder for InternLM 1/2/2.5/3, Llama, Qwen2/3 and SmolLM2.

`param_table` names every weight once; `forward` trains and scores, `decode` runs with a cache.
Letters: B batch, T query time, C cache length, D model, N heads, K KV heads, H head dim, F ffn, V
vocabulary, L layers. Knows nothing of LoRA or quantization: `weights.einsum` does.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from internjax.collectives import ALONE, Parallel, gather_length, scatter_length
from internjax.models import rope
from internjax.models.cache import KVCache, attend_layer, rotate_and_write
from internjax.models.config import ModelConfig
from internjax.models.context import attend_on
from internjax.models.init import InitConfig, ones, zeros
from internjax.models.layers import rms_norm, swiglu
from internjax.models.moe import expert_table, mixture, unlimited
from internjax.models.params import ParamSpec, init_from
from internjax.models.remat import Remat, recomputed
from internjax.tree import Params, unstack_layers, wide
from internjax.weights import einsum, einsums, gather, take, transposed


def param_table(cfg: ModelConfig, init: InitConfig = InitConfig()) -> dict[str, ParamSpec]:
    """Lists every weight of the model in the order in which they are drawn."""
    L, D, N, K, H = cfg.num_layers, cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    V = cfg.vocab_size
    edge, inner, out = init.edge, init.inner, init.residual(L)
    heads, kv_heads = (
        ("layers", "embed", "heads", "head_dim"),
        ("layers", "embed", "kv_heads", "head_dim"),
    )
    table = {
        "embed": ParamSpec((V, D), ("vocab", "edge_embed"), edge),
        "layers/attn_norm": ParamSpec((L, D), ("layers", None), ones),
        "layers/wq": ParamSpec((L, D, N, H), heads, inner),
        "layers/wk": ParamSpec((L, D, K, H), kv_heads, inner),
        "layers/wv": ParamSpec((L, D, K, H), kv_heads, inner),
        "layers/wo": ParamSpec((L, N, H, D), ("layers", "heads", "head_dim", "embed"), out),
        "layers/ffn_norm": ParamSpec((L, D), ("layers", None), ones),
        **_feed_forward_table(cfg, init),
        "final_norm": ParamSpec((D,), (None,), ones),
    }
    if cfg.qkv_bias:
        table["layers/bq"] = ParamSpec((L, N, H), ("layers", "heads", "head_dim"), zeros)
        table["layers/bk"] = ParamSpec((L, K, H), ("layers", "kv_heads", "head_dim"), zeros)
        table["layers/bv"] = ParamSpec((L, K, H), ("layers", "kv_heads", "head_dim"), zeros)
    if cfg.output_bias:
        table["layers/bo"] = ParamSpec((L, D), ("layers", None), zeros)
    if cfg.qk_norm:
        table["layers/q_norm"] = ParamSpec((L, H), ("layers", None), ones)
        table["layers/k_norm"] = ParamSpec((L, H), ("layers", None), ones)
    if not cfg.tie_embeddings:
        table["head"] = ParamSpec((D, V), ("edge_embed", "vocab"), edge)
    return table


def _feed_forward_table(cfg: ModelConfig, init: InitConfig) -> dict[str, ParamSpec]:
    """A mixture has experts, and of the dense block what its tokens share."""
    L, D, inner = cfg.num_layers, cfg.d_model, init.inner
    F = cfg.shared_experts if cfg.num_experts else cfg.d_ff
    dense = {
        "layers/w_gate": ParamSpec((L, D, F), ("layers", "embed", "ffn"), inner),
        "layers/w_up": ParamSpec((L, D, F), ("layers", "embed", "ffn"), inner),
        "layers/w_down": ParamSpec((L, F, D), ("layers", "ffn", "embed"), init.residual(L)),
    }
    return (dense if F else {}) | (expert_table(cfg, init) if cfg.num_experts else {})


def init_params(
    cfg: ModelConfig, key: Array, dtype=jnp.float32, *, init: InitConfig = InitConfig()
) -> Params:
    """Draws the parameters of a model."""
    return init_from(param_table(cfg, init), key, dtype)


def forward(
    params: Params,
    tokens: Int[Array, "B T"],
    cfg: ModelConfig,
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    inv_freq: Array | None = None,
) -> Float[Array, "B T V"]:
    """Returns the logits of the next token at every position, in at least float32."""
    x = hidden(params, tokens, cfg, positions=positions, segment_ids=segment_ids, inv_freq=inv_freq)
    return unembed(params, x, cfg)


def hidden(
    params: Params,
    tokens: Int[Array, "B T"],
    cfg: ModelConfig,
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    inv_freq: Array | None = None,
    remat: Remat = Remat(),
    par: Parallel = ALONE,
) -> Float[Array, "B S D"]:
    """Runs all layers over whole rows and returns the normed states before the head.

    Args:
      positions: rotary positions; default 0..T-1. Packed rows restart them.
      segment_ids: tokens see their own segment only; 0 is padding by custom.
      inv_freq: rotary frequencies `[H/2]` or a row each `[B, H/2]`; default `rope.inv_freq(cfg)`.
      remat: what the backward pass recomputes instead of storing it.
      par: inside a `shard_map`, the ways the model is cut; T is this device's part of a row, and
        S = T / tensor the part of it that is returned. S = T on one device.
    """
    cfg = unlimited(cfg)
    x = embed(params, tokens, cfg, par=par)
    x, _ = run_layers(
        params["layers"],
        x,
        cfg,
        positions=positions,
        segment_ids=segment_ids,
        inv_freq=inv_freq,
        remat=remat,
        par=par,
    )
    return rms_norm(x, params["final_norm"], cfg.norm_eps)


def run_layers(
    layers: Params | tuple[Params, ...],
    x: Float[Array, "B S D"],
    cfg: ModelConfig,
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    inv_freq: Array | None = None,
    remat: Remat = Remat(),
    par: Parallel = ALONE,
) -> tuple[Float[Array, "B S D"], Float[Array, ""]]:
    """Runs some layers of the model, stacked or a tuple of them, over embedded rows.

    Returns: the states after the last of them, and the sum of their auxiliary losses (0 but for
      mixtures of experts).
    """
    if positions is None:
        if par.context is not None:
            raise ValueError("rows cut over the context axis need positions: they have no order.")
        B, T = x.shape[:2]
        positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    attend = attend_on(positions, segment_ids, par)
    angle, factor = _angles(cfg, positions, inv_freq, x.dtype), rope.attention_factor(cfg.rope)

    def layer(carry: tuple[Array, Array], w: Params) -> tuple[tuple[Array, Array], None]:
        x, aux = carry
        q, k, v = _qkv(x, w, cfg, par)
        q, k = rope.rotate(q, angle, factor), rope.rotate(k, angle, factor)
        x, more = _finish(x, attend(q, k, v), w, cfg, par)
        return (x, aux + more), None

    carry = (x, jnp.zeros((), wide(x.dtype)))
    if isinstance(layers, tuple):
        for w in layers:
            carry, _ = layer(carry, w)
        return carry
    for step, part in recomputed(layer, layers, remat, gathered=par.fsdp is not None):
        carry, _ = lax.scan(step, carry, part)
    return carry


def decode(
    params: Params,
    tokens: Int[Array, "B T"],
    cache: KVCache,
    start: Int[Array, " B"],
    cfg: ModelConfig,
    *,
    inv_freq: Array | None = None,
    attend: int | None = None,
    table: Int[Array, "B n"] | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Runs tokens at positions start..start+T-1, writing and reading the cache.

    T = 1 is a decoding step, T > 1 a piece of a prompt. Padding behind a sequence's real tokens is
    harmless: nothing earlier sees it and later tokens overwrite it.

    Args:
      start: `[B]` positions of each sequence that are in the cache already.
      attend: static bound on the cache positions read; must exceed every position run.
      table: blocks of the cache that hold each sequence; -1 for none, whose tokens are not kept.
        Default: one block each, in order.

    Returns: the normed states `[B, T, D]` before the head, and the cache with the new tokens.
    """
    params, cfg = unstack_layers(params), unlimited(cfg)
    positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=start.dtype)[None, :]
    dtype = jnp.dtype(cfg.dtype)
    angle, factor = _angles(cfg, positions, inv_freq, dtype), rope.attention_factor(cfg.rope)
    x = embed(params, tokens, cfg)
    for i, w in enumerate(params["layers"]):
        q, k, v = _qkv(x, w, cfg)
        q, cache = rotate_and_write(cache, i, q, k, v, angle, factor, start, table)
        x, _ = _finish(x, attend_layer(q, cache, i, start, attend, table), w, cfg)
    return rms_norm(x, params["final_norm"], cfg.norm_eps), cache


def embed(
    params: Params, tokens: Int[Array, "B T"], cfg: ModelConfig, *, par: Parallel = ALONE
) -> Float[Array, "B S D"]:
    """Looks up the embeddings of tokens in the dtype of the computation."""
    dtype = jnp.dtype(cfg.dtype)
    table = params["embed"]
    if par.tensor is None:
        return take(table, tokens, dtype)
    # Each device knows the rows of its own part of the vocabulary; the others' add up.
    local = tokens - lax.axis_index(par.tensor) * table.shape[0]
    known = (local >= 0) & (local < table.shape[0])
    x = take(table, jnp.where(known, local, 0), dtype) * known[..., None].astype(dtype)
    return scatter_length(x, par)


def unembed(params: Params, x: Float[Array, "*B D"], cfg: ModelConfig) -> Float[Array, "*B V"]:
    """Multiplies normed states by the head; logits in at least float32.

    Inside a `shard_map` the head is the device's part of the vocabulary, and so are the logits.
    """
    lead = "BT"[2 - (x.ndim - 1) :]
    head = transposed(params["embed"]) if cfg.tie_embeddings else params["head"]
    return einsum(f"{lead}D,DV->{lead}V", x, head, widened=True)


def _qkv(x: Array, w: Params, cfg: ModelConfig, par: Parallel = ALONE):
    """Returns q `[B, T, N, H]`, k and v `[B, T, K, H]` of a layer, before they are rotated."""
    h = gather_length(rms_norm(x, w["attn_norm"], cfg.norm_eps), par)
    weights = [gather(w[name], 0, par) for name in ("wq", "wk", "wv")]
    q, k, v = einsums(("BTD,DNH->BTNH", "BTD,DKH->BTKH", "BTD,DKH->BTKH"), h, weights)
    if cfg.qkv_bias:
        q, k, v = (
            y + w[b].astype(y.dtype)[None, None] for y, b in ((q, "bq"), (k, "bk"), (v, "bv"))
        )
    if cfg.qk_norm:
        q, k = rms_norm(q, w["q_norm"], cfg.norm_eps), rms_norm(k, w["k_norm"], cfg.norm_eps)
    return q, k, v


def _finish(
    x: Array, mixed: Array, w: Params, cfg: ModelConfig, par: Parallel = ALONE
) -> tuple[Array, Array]:
    """Adds a layer's attention output and its feed-forward block to the residual stream."""
    attended = scatter_length(einsum("BTNH,NHD->BTD", mixed, gather(w["wo"], 2, par)), par)
    if cfg.output_bias:
        attended = attended + w["bo"].astype(x.dtype)[None, None]
    x = x + attended
    h = gather_length(rms_norm(x, w["ffn_norm"], cfg.norm_eps), par)
    y, aux = _feed_forward(h, w, cfg, par)
    return x + scatter_length(y, par), aux


def _feed_forward(h: Array, w: Params, cfg: ModelConfig, par: Parallel) -> tuple[Array, Array]:
    """Returns the block's output, partial sums over `par.tensor`, and its auxiliary loss."""
    if not cfg.num_experts:
        return _dense(h, w, par), jnp.zeros((), wide(h.dtype))
    y, aux = mixture(h, w, cfg, par)
    return (y + _dense(h, w, par) if cfg.shared_experts else y), aux


def _dense(h: Array, w: Params, par: Parallel) -> Array:
    weights = gather(w["w_gate"], 0, par), gather(w["w_up"], 0, par)
    gate, up = einsums(("BTD,DF->BTF", "BTD,DF->BTF"), h, weights)
    return einsum("BTF,FD->BTD", swiglu(gate, up), gather(w["w_down"], 1, par))


def _angles(cfg: ModelConfig, positions: Array, inv_freq: Array | None, dtype) -> Array:
    freq = rope.inv_freq(cfg) if inv_freq is None else inv_freq
    wide_dtype = wide(dtype)
    return rope.angles(positions, jnp.asarray(freq, wide_dtype), dtype)
