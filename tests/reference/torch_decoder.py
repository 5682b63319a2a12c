"""The decoder once more, in torch and plain steps, as an independent witness for the goldens.

Written from the published description of the checkpoints (InternLM2: rows of `wqkv` grouped by KV
head, q first, then k and v) and from the rotation's definition, pair by pair. Slow on purpose.
"""

import math

import torch

from tests.reference.tiny import VARIANTS, tiny_config


def reference_logits(variant: str, weights: dict[str, torch.Tensor], tokens: list[int]):
    """Returns the logits [T, V] of one row of tokens."""
    family, config = VARIANTS[variant][0], tiny_config(variant)
    names = _names(family)
    x = weights[names["embed"]][tokens]
    frequencies = _frequencies(config, len(tokens))
    for i in range(config["num_hidden_layers"]):
        w = {k.removeprefix(f"model.layers.{i}."): v for k, v in weights.items()}
        h = _norm(x, w[names["attn_norm"]], config["rms_norm_eps"])
        x = x + _attention(h, w, config, frequencies, family)
        h = _norm(x, w[names["ffn_norm"]], config["rms_norm_eps"])
        gate, up = h @ w[names["gate"]].T, h @ w[names["up"]].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[names["down"]].T
    return _norm(x, weights["model.norm.weight"], config["rms_norm_eps"]) @ weights[names["head"]].T


def _names(family: str) -> dict[str, str]:
    if family == "internlm2":
        return {
            "embed": "model.tok_embeddings.weight",
            "head": "output.weight",
            "attn_norm": "attention_norm.weight",
            "ffn_norm": "ffn_norm.weight",
            "gate": "feed_forward.w1.weight",
            "up": "feed_forward.w3.weight",
            "down": "feed_forward.w2.weight",
        }
    return {
        "embed": "model.embed_tokens.weight",
        "head": "lm_head.weight",
        "attn_norm": "input_layernorm.weight",
        "ffn_norm": "post_attention_layernorm.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
    }


def _norm(x, scale, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * scale


def _attention(x, w, config, frequencies, family):
    """Attends head by head; query head n reads KV head n // (heads / KV heads)."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    queries, keys, values = _project(x, w, heads, kv_heads, size, family)
    length = len(x)
    mixed = []
    for n in range(heads):
        q = _rotate(queries[n], frequencies)
        k = _rotate(keys[n * kv_heads // heads], frequencies)
        scores = q @ k.T / math.sqrt(size)
        future = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        weights = torch.softmax(scores.masked_fill(future, -torch.inf), -1)
        mixed.append(weights @ values[n * kv_heads // heads])
    out = torch.cat(mixed, -1)
    if family == "internlm2":
        return out @ w["attention.wo.weight"].T
    return out @ w["self_attn.o_proj.weight"].T + w.get("self_attn.o_proj.bias", 0)


def _project(x, w, heads, kv_heads, size, family):
    """Returns lists of [T, size]: a query each head, a key and a value each KV head."""
    if family == "internlm2":
        rows = list((x @ w["attention.wqkv.weight"].T).split(size, -1))
        queries, keys, values = [], [], []
        for _ in range(kv_heads):
            queries += [rows.pop(0) for _ in range(heads // kv_heads)]
            keys.append(rows.pop(0))
            values.append(rows.pop(0))
        return queries, keys, values
    return tuple(
        (x @ w[f"self_attn.{n}_proj.weight"].T + w.get(f"self_attn.{n}_proj.bias", 0)).split(
            size, -1
        )
        for n in "qkv"
    )


def _rotate(x, frequencies):
    """Turns the pair (i, i + size/2) at position t by t * frequency_i."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies
    cos, sin = torch.cos(angle), torch.sin(angle)
    first, second = x[:, :half].double(), x[:, half:].double()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)


def _frequencies(config, length):
    """Default or dynamic NTK: past the limit M, base * (f * length / M - (f - 1)) ^ (d / (d-2))."""
    size = config["hidden_size"] // config["num_attention_heads"]
    base, limit = config["rope_theta"], config["max_position_embeddings"]
    rotary, scaling = config.get("rotary") or {}, config.get("rope_scaling") or {}
    factor = None
    if rotary.get("type") == "dynamic":
        factor = rotary["scaling_factor"]
    elif scaling.get("type") == "dynamic":
        factor = scaling["factor"]
    if factor is not None and length > limit:
        base = base * (factor * length / limit - (factor - 1)) ** (size / (size - 2))
    return torch.tensor([base ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float64)
