"""`config.json` of Hugging Face checkpoints <-> ModelConfig, for every family and both rope forms.

Whether a model has biases, q/k norms or an own head is read from the checkpoint's tensor names,
not from the config: published configs contradict their weights (InternLM-20B).
"""

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from internjax.errors import Corrupt, UserError
from internjax.models import layouts
from internjax.models.config import FAMILIES, ROPE_KINDS, ModelConfig, RopeConfig

ARCHITECTURES = {
    "internlm": "InternLMForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "smollm2": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
LAYOUTS = {f: layouts.INTERNLM2 if f == "internlm2" else layouts.LLAMA for f in FAMILIES}


def config_from_hf(raw: dict[str, Any], names: Collection[str], *, where: str) -> ModelConfig:
    """Reads a ModelConfig from a parsed `config.json` and the names of the checkpoint's tensors.

    Raises: UserError for a family or a variant that the decoder does not have, Corrupt when a
      needed key is missing.
    """
    family = _family(raw, where)
    _refuse_variants(raw, where)

    def has(path: str) -> bool:
        return any(e.source.format(i=0) in names for e in LAYOUTS[family] if path in e.paths)

    try:
        d_model, num_heads = raw["hidden_size"], raw["num_attention_heads"]
        return ModelConfig(
            name=raw.get("_name_or_path") or where.rstrip("/").rsplit("/", 1)[-1],
            family=family,
            num_layers=raw["num_hidden_layers"],
            d_model=d_model,
            num_heads=num_heads,
            num_kv_heads=raw.get("num_key_value_heads") or num_heads,
            head_dim=raw.get("head_dim") or d_model // num_heads,
            d_ff=raw["intermediate_size"],
            vocab_size=raw["vocab_size"],
            max_context=raw["max_position_embeddings"],
            norm_eps=raw["rms_norm_eps"],
            rope=_rope_from_hf(raw, where),
            qkv_bias=has("layers/bq"),
            output_bias=has("layers/bo"),
            qk_norm=has("layers/q_norm"),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise Corrupt(f"{where}/config.json: is damaged or lacks {error}.") from error


def config_to_hf(cfg: ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    """Writes the `config.json` of a model, in the keys that old and new transformers both read.

    Raises: UserError when the family's layout cannot say what the model has.
    """
    _check_expressible(cfg)
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[cfg.family]],
        "model_type": "llama" if cfg.family == "smollm2" else cfg.family,
        "_name_or_path": cfg.name,
        "hidden_act": "silu",
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_context,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "torch_dtype": str(np.dtype(dtype)),
        "rope_theta": cfg.rope.theta,
        "rope_scaling": _rope_to_hf(cfg),
    }
    if cfg.family in ("internlm", "internlm2"):
        raw["bias"] = cfg.output_bias
    if cfg.family == "internlm":
        raw["rotary"] = _rotary(cfg.rope)
    if cfg.family == "internlm3":
        raw |= {"qkv_bias": cfg.qkv_bias, "bias": cfg.output_bias}
    if cfg.family in ("llama", "smollm2", "qwen3"):
        raw["attention_bias"] = cfg.qkv_bias
    if cfg.family == "smollm2":
        raw["is_llama_config"] = True
    if cfg.family in ("llama", "smollm2"):
        raw["mlp_bias"] = False
    if cfg.family in ("qwen2", "qwen3"):
        raw["use_sliding_window"] = False
    return raw


def _family(raw: dict[str, Any], where: str) -> str:
    kind = raw.get("model_type")
    if kind == "llama":
        # SmolLM2's published configs carry this key; Llama's do not.
        return "smollm2" if raw.get("is_llama_config") else "llama"
    if kind not in FAMILIES:
        raise UserError(f"{where}: model_type {kind!r}; legal are {', '.join(FAMILIES)}.")
    return kind


def _refuse_variants(raw: dict[str, Any], where: str) -> None:
    if raw.get("use_sliding_window"):
        raise UserError(f"{where}: use_sliding_window is true; the decoder attends to all tokens.")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{where}: hidden_act {raw['hidden_act']!r}; the decoder has silu only.")


def _rope_from_hf(raw: dict[str, Any], where: str) -> RopeConfig:
    """Reads rope_parameters (new), rope_theta with rope_scaling (older) or InternLM v1's rotary."""
    rope = dict(raw.get("rope_scaling") or {}) | dict(raw.get("rope_parameters") or {})
    rotary = raw.get("rotary") or {}
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or rotary.get("base", 10000.0))
    if rotary and not rope and rotary.get("type") == "dynamic":
        rope = {"rope_type": "dynamic", "factor": rotary.get("scaling_factor", 1.0)}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise UserError(f"{where}: rope type {kind!r}; legal are {', '.join(ROPE_KINDS)}.")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor; the decoder rotates whole heads.")
    if kind == "default":
        return RopeConfig(theta=theta)
    common = {
        "kind": kind,
        "theta": theta,
        "factor": float(rope["factor"]),
        "original_context": int(rope.get("original_max_position_embeddings") or 0),
    }
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        return RopeConfig(**common, low_freq_factor=float(low), high_freq_factor=float(high))
    if kind == "yarn":
        return RopeConfig(**common, **_yarn_from_hf(rope, where))
    return RopeConfig(**common)


def _yarn_from_hf(rope: dict[str, Any], where: str) -> dict[str, float]:
    if not rope.get("truncate", True):
        raise UserError(f"{where}: yarn with truncate=false; the decoder truncates its bands.")
    factor = rope.get("attention_factor") or 0.0
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if not factor and mscale and mscale_all:  # transformers' rule for DeepSeek's two keys
        log = 0.1 * math.log(rope["factor"]) if rope["factor"] > 1 else 0.0
        factor = (mscale * log + 1) / (mscale_all * log + 1)
    return {
        "attention_factor": float(factor),
        "beta_fast": float(rope.get("beta_fast") or 32.0),
        "beta_slow": float(rope.get("beta_slow") or 1.0),
    }


def _rope_to_hf(cfg: ModelConfig) -> dict[str, Any] | None:
    rope = cfg.rope
    if rope.kind == "default":
        return None
    raw: dict[str, Any] = {"type": rope.kind, "rope_type": rope.kind, "factor": rope.factor}
    if rope.original_context:
        raw["original_max_position_embeddings"] = rope.original_context
    if rope.kind == "llama3":
        raw |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        raw |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.attention_factor:
            raw["attention_factor"] = rope.attention_factor
    return raw


def _rotary(rope: RopeConfig) -> dict[str, Any]:
    """InternLM v1's own modelling code knows these two kinds, under this key."""
    if rope.kind == "dynamic":
        return {"base": rope.theta, "type": "dynamic", "scaling_factor": rope.factor}
    return {"base": rope.theta, "type": "origin"}


def _check_expressible(cfg: ModelConfig) -> None:
    """Refuses what a family's upstream code would silently read as something else."""
    if cfg.num_experts:
        raise UserError(
            f"{cfg.name} is a mixture of {cfg.num_experts} experts, for which family={cfg.family}"
            " has no Hugging Face layout: keep it in our own folder."
        )
    both = cfg.qkv_bias == cfg.output_bias
    fits = {
        "internlm": both,
        "internlm2": both,
        "internlm3": not cfg.output_bias,  # upstream's `bias` would add biases to the MLP too
        "llama": both,
        "smollm2": both,
        "qwen2": cfg.qkv_bias and not cfg.output_bias,
        "qwen3": both and cfg.qk_norm,
    }[cfg.family]
    if not fits or (cfg.qk_norm and cfg.family != "qwen3"):
        raise UserError(
            f"family={cfg.family} cannot hold qkv_bias={cfg.qkv_bias},"
            f" output_bias={cfg.output_bias}, qk_norm={cfg.qk_norm}: choose the family they are of."
        )
