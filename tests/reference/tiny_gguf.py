"""Tiny GGUF files as other programs write them: llama.cpp's names, rows of q and k interleaved.

    python -m tests.reference.tiny_gguf VARIANT KIND FILE

Written apart from the package, by index arithmetic.
"""

import sys
from pathlib import Path

import gguf
import numpy as np

from tests.reference.tiny import VARIANTS, tiny_config, tiny_tensors

ARCHITECTURES = {"llama2": "llama", "llama3": "llama", "smollm2": "llama", "internlm": "llama"} | {
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "internlm2": "internlm2",
}
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    "attention_norm": "attn_norm",
    "model.embed_tokens": "token_embd",
    "model.tok_embeddings": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def tiny_gguf_tensors(variant: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns a variant's float32 tensors under GGUF's names and in its row order."""
    config, arch = tiny_config(variant), ARCHITECTURES[variant]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim", config["hidden_size"] // heads)
    named = {}
    for name, x in tiny_tensors(variant, seed).items():
        if "wqkv" in name:
            group = heads // kv_heads + 2
            place = np.arange(len(x)) // size % group
            parts = {"q": x[place < group - 2], "k": x[place == group - 2]}
            parts |= {"v": x[place == group - 1]}
            named |= {name.replace("attention.wqkv", f"attn_{p}"): y for p, y in parts.items()}
            continue
        for old, new in _NAMES.items():
            name = name.replace(old, new) if old in name else name
        named[name] = x
    named = {name.replace("model.layers.", "blk."): x for name, x in named.items()}
    if arch in ("llama", "internlm2"):
        paired = [
            2 * i + j for j in (0, 1) for i in range(size // 2)
        ]  # half-split row -> its place
        for name, x in named.items():
            if ".attn_q." in name or ".attn_k." in name:
                rows = np.empty_like(x)
                for row in range(len(x)):
                    rows[row // size * size + paired[row % size]] = x[row]
                named[name] = rows
    return named


def write_tiny_gguf(variant: str, kind: str, path: str | Path, *, seed: int = 0) -> Path:
    """Writes a GGUF file of a variant: matrices in `kind`, vectors in F32, no tokenizer."""
    config, arch = tiny_config(variant), ARCHITECTURES[variant]
    heads = config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(f"tiny {VARIANTS[variant][0]}")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    theta = (config.get("rope_parameters") or config)["rope_theta"]
    writer.add_rope_freq_base(theta)
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    scaling = config["rope_scaling"] or {}
    if scaling.get("rope_type") == "llama3":
        size = config["hidden_size"] // heads
        writer.add_tensor("rope_freqs.weight", _llama3_factors(scaling, theta, size))
    quant = gguf.GGMLQuantizationType[kind]
    for name, x in tiny_gguf_tensors(variant, seed).items():
        if x.ndim == 1:
            writer.add_tensor(name, x)
        else:
            writer.add_tensor(name, gguf.quants.quantize(x, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _llama3_factors(scaling: dict, theta: float, size: int) -> np.ndarray:
    """By how much Llama 3 slows each frequency: 1 for short waves, `factor` for long ones."""
    factors = []
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    for i in range(0, size, 2):
        wave_length = 2 * np.pi * theta ** (i / size)
        if wave_length < context / high:
            factors.append(1.0)
        elif wave_length > context / low:
            factors.append(scaling["factor"])
        else:
            smooth = (context / wave_length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ARCHITECTURES or sys.argv[2] not in KINDS:
        usage = f"{', '.join(ARCHITECTURES)}; {', '.join(KINDS)}"
        raise SystemExit(f"usage: python -m tests.reference.tiny_gguf VARIANT KIND FILE\n{usage}")
    print(write_tiny_gguf(*sys.argv[1:]))
