"""THE model: one pre-norm decoder for InternLM 1/2/2.5/3, Llama, Qwen2/3 and SmolLM2.

`param_table` names every weight once; `forward` trains and scores, `decode` runs with a cache.
Letters: B batch, T query time, C cache length, D model, N heads, K KV heads, H head dim, F ffn, V
vocabulary, L layers. Knows nothing of LoRA or quantization: `weights.einsum` does.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from internjax.kernels.attention import attention, causal_mask
from internjax.mesh import ShardingRules
from internjax.models import rope
from internjax.models.cache import KVCache, read_layer, update_layer
from internjax.models.config import ModelConfig
from internjax.models.layers import rms_norm, swiglu
from internjax.models.params import ParamSpec, init_from, normal, ones, zeros
from internjax.tree import Params, unstack_layers, wide
from internjax.weights import einsum, take


def param_table(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """Lists every weight of the model in the order in which they are drawn.

    Init as in GPT-2 and InternLM2: N(0, 0.02), the two projections into the residual stream
    divided by sqrt(2 L).
    """
    L, D, N, K, H = cfg.num_layers, cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    F, V = cfg.d_ff, cfg.vocab_size
    std, residual = 0.02, 0.02 / (2 * L) ** 0.5
    table = {
        "embed": ParamSpec((V, D), ("vocab", "embed"), normal(std)),
        "layers/attn_norm": ParamSpec((L, D), ("layers", None), ones),
        "layers/wq": ParamSpec((L, D, N, H), ("layers", "embed", "heads", "head_dim"), normal(std)),
        "layers/wk": ParamSpec(
            (L, D, K, H), ("layers", "embed", "kv_heads", "head_dim"), normal(std)
        ),
        "layers/wv": ParamSpec(
            (L, D, K, H), ("layers", "embed", "kv_heads", "head_dim"), normal(std)
        ),
        "layers/wo": ParamSpec(
            (L, N, H, D), ("layers", "heads", "head_dim", "embed"), normal(residual)
        ),
        "layers/ffn_norm": ParamSpec((L, D), ("layers", None), ones),
        "layers/w_gate": ParamSpec((L, D, F), ("layers", "embed", "ffn"), normal(std)),
        "layers/w_up": ParamSpec((L, D, F), ("layers", "embed", "ffn"), normal(std)),
        "layers/w_down": ParamSpec((L, F, D), ("layers", "ffn", "embed"), normal(residual)),
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
        table["head"] = ParamSpec((D, V), ("embed", "vocab"), normal(std))
    return table


def init_params(cfg: ModelConfig, key: Array, dtype=jnp.float32) -> Params:
    """Draws the parameters of a model."""
    return init_from(param_table(cfg), key, dtype)


def forward(
    params: Params,
    tokens: Int[Array, "B T"],
    cfg: ModelConfig,
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    inv_freq: Array | None = None,
    rules: ShardingRules | None = None,
) -> Float[Array, "B T V"]:
    """Returns the logits of the next token at every position, in at least float32."""
    x = hidden(
        params,
        tokens,
        cfg,
        positions=positions,
        segment_ids=segment_ids,
        inv_freq=inv_freq,
        rules=rules,
    )
    return unembed(params, x, cfg, rules=rules)


def hidden(
    params: Params,
    tokens: Int[Array, "B T"],
    cfg: ModelConfig,
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    inv_freq: Array | None = None,
    rules: ShardingRules | None = None,
    remat: bool = False,
) -> Float[Array, "B T D"]:
    """Runs all layers over whole rows and returns the normed states before the head.

    Args:
      positions: rotary positions; default 0..T-1. Packed rows restart them.
      segment_ids: tokens see their own segment only; 0 is padding by custom.
      inv_freq: rotary frequencies `[H/2]` or a row each `[B, H/2]`; default `rope.inv_freq(cfg)`.
      rules: where the arrays lie; None without a mesh.
      remat: recompute each layer in the backward pass instead of storing its activations.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = causal_mask(positions, segment_ids)
    dtype = jnp.dtype(cfg.dtype)
    angle = _angles(cfg, positions, inv_freq, dtype)
    x = embed(params, tokens, cfg, rules=rules)

    def layer(x: Array, w: Params) -> tuple[Array, None]:
        q, k, v = _qkv(x, w, angle, cfg, rules)
        return _finish(x, attention(q, k, v, mask), w, cfg, rules), None

    step = jax.checkpoint(layer) if remat else layer
    layers = params["layers"]
    if isinstance(layers, tuple):
        for w in layers:
            x, _ = step(x, w)
    else:
        x, _ = lax.scan(step, x, layers)
    return rms_norm(x, params["final_norm"], cfg.norm_eps)


def decode(
    params: Params,
    tokens: Int[Array, "B T"],
    cache: KVCache,
    start: Int[Array, " B"],
    cfg: ModelConfig,
    *,
    inv_freq: Array | None = None,
    attend: int | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Runs tokens at positions start..start+T-1, writing and reading the cache.

    T = 1 is a decoding step, T > 1 a piece of a prompt. Padding behind a row's real tokens is
    harmless: nothing earlier sees it and later tokens overwrite it.

    Args:
      start: `[B]` positions already in the cache of each row.
      attend: static bound on the cache positions read; must exceed every position run.

    Returns: the normed states `[B, T, D]` before the head, and the cache with the new tokens.
    """
    params = unstack_layers(params)
    positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=start.dtype)[None, :]
    dtype = jnp.dtype(cfg.dtype)
    angle = _angles(cfg, positions, inv_freq, dtype)
    mask = (
        jnp.arange(attend or cache.length, dtype=start.dtype)[None, None, :]
        <= positions[:, :, None]
    )
    x = embed(params, tokens, cfg)
    for i, w in enumerate(params["layers"]):
        q, k, v = _qkv(x, w, angle, cfg, None)
        cache = update_layer(cache, i, k, v, start)
        k, v = read_layer(cache, i, attend, dtype)
        x = _finish(x, attention(q, k, v, mask), w, cfg, None)
    return rms_norm(x, params["final_norm"], cfg.norm_eps), cache


def embed(
    params: Params, tokens: Array, cfg: ModelConfig, *, rules: ShardingRules | None = None
) -> Float[Array, "B T D"]:
    """Looks up the embeddings of tokens in the dtype of the computation."""
    spec = rules and rules.spec("batch", "length", "act_embed")
    table = _gather(params["embed"], rules, "vocab", "embed")
    return take(table, tokens, jnp.dtype(cfg.dtype), out=spec)


def unembed(
    params: Params,
    x: Float[Array, "*B D"],
    cfg: ModelConfig,
    *,
    rules: ShardingRules | None = None,
) -> Float[Array, "*B V"]:
    """Multiplies normed states by the head; logits in at least float32."""
    wide_dtype = wide(x.dtype)
    lead = "BT"[2 - (x.ndim - 1) :]
    out = rules and rules.spec(*("batch", "length")[: x.ndim - 1], "vocab")
    if cfg.tie_embeddings:
        table = _gather(params["embed"], rules, "vocab", "embed")
        spec = f"{lead}D,VD->{lead}V"
        return jnp.einsum(
            spec, x, table.astype(x.dtype), preferred_element_type=wide_dtype, out_sharding=out
        )
    head = _gather(params["head"], rules, "embed", "vocab")
    return einsum(f"{lead}D,DV->{lead}V", x, head, out=out, preferred_element_type=wide_dtype)


def _qkv(x: Array, w: Params, angle: Array, cfg: ModelConfig, rules: ShardingRules | None):
    """Returns rotated q `[B, T, N, H]`, rotated k and v `[B, T, K, H]` of a layer."""
    h = rms_norm(x, w["attn_norm"], cfg.norm_eps)
    q = einsum("BTD,DNH->BTNH", h, _gather(w["wq"], rules, "embed", "heads", "head_dim"))
    k = einsum("BTD,DKH->BTKH", h, _gather(w["wk"], rules, "embed", "kv_heads", "head_dim"))
    v = einsum("BTD,DKH->BTKH", h, _gather(w["wv"], rules, "embed", "kv_heads", "head_dim"))
    if cfg.qkv_bias:
        q, k, v = (
            y + w[b].astype(y.dtype)[None, None] for y, b in ((q, "bq"), (k, "bk"), (v, "bv"))
        )
    if cfg.qk_norm:
        q, k = rms_norm(q, w["q_norm"], cfg.norm_eps), rms_norm(k, w["k_norm"], cfg.norm_eps)
    factor = rope.attention_factor(cfg.rope)
    return rope.rotate(q, angle, factor), rope.rotate(k, angle, factor), v


def _finish(x: Array, mixed: Array, w: Params, cfg: ModelConfig, rules: ShardingRules | None):
    """Adds a layer's attention output and its feed-forward block to the residual stream."""
    out = rules and rules.spec("batch", "length", "act_embed")
    wo = _gather(w["wo"], rules, "heads", "head_dim", "embed")
    attended = einsum("BTNH,NHD->BTD", mixed, wo, out=out)
    if cfg.output_bias:
        attended = attended + w["bo"].astype(x.dtype)[None, None]
    x = x + attended
    h = rms_norm(x, w["ffn_norm"], cfg.norm_eps)
    gate = einsum("BTD,DF->BTF", h, _gather(w["w_gate"], rules, "embed", "ffn"))
    up = einsum("BTD,DF->BTF", h, _gather(w["w_up"], rules, "embed", "ffn"))
    w_down = _gather(w["w_down"], rules, "ffn", "embed")
    return x + einsum("BTF,FD->BTD", swiglu(gate, up), w_down, out=out)


def _gather(w, rules: ShardingRules | None, *axes: str):
    """Gathers the FSDP shards of a weight for use (ZeRO-3); tensor shards stay apart."""
    if rules is None:
        return w
    return jax.sharding.reshard(w, rules.gathered().spec(*axes))


def _angles(cfg: ModelConfig, positions: Array, inv_freq: Array | None, dtype) -> Array:
    freq = rope.inv_freq(cfg) if inv_freq is None else inv_freq
    wide_dtype = wide(dtype)
    return rope.angles(positions, jnp.asarray(freq, wide_dtype), dtype)
