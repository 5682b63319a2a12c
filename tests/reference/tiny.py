"""Writes a tiny random checkpoint of any family in its upstream layout: NumPy only, seeded.

    python -m tests.reference.tiny FAMILY DIR

Written apart from the package (it imports nothing of it), so that a mistake in our name tables
cannot hide here. `VARIANTS` names every family and rope rule; sizes: d 64, 4 heads, 2 KV heads,
3 layers, 288 tokens of a byte-level BPE.
"""

import json
import sys
from pathlib import Path

import numpy as np

D, LAYERS, HEADS, KV_HEADS, HEAD_DIM, D_FF, VOCAB, CONTEXT = 64, 3, 4, 2, 16, 96, 288, 64
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# variant -> (family, changes to config.json); every rope rule and every way to write one is here.
VARIANTS: dict[str, tuple[str, dict]] = {
    "internlm": ("internlm", {}),
    "internlm-dynamic": (
        "internlm",
        {
            "max_position_embeddings": 16,
            "rotary": {"base": 10000, "type": "dynamic", "scaling_factor": 2.0},
        },
    ),
    "internlm-nobias": ("internlm", {"bias": False}),
    "internlm2": ("internlm2", {}),
    "internlm2-dynamic": (
        "internlm2",
        {"max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    "internlm3": ("internlm3", {}),
    "internlm3-bias": ("internlm3", {"qkv_bias": True}),
    "llama2": ("llama", {"num_key_value_heads": HEADS}),
    "llama2-linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama3": ("llama", {"rope_theta": 500000.0, "rope_scaling": _LLAMA3_ROPE}),
    "qwen2": ("qwen2", {"rope_theta": 1000000.0}),
    "qwen2-yarn": (
        "qwen2",
        {
            "rope_theta": 1000000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen3": (
        "qwen3",
        {
            "head_dim": 32,  # not hidden_size / heads, as in the published models
            "rope_theta": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "smollm2": ("smollm2", {"rope_theta": 100000.0, "tie_word_embeddings": True}),
}
FAMILIES = ("internlm", "internlm2", "internlm3", "llama2", "llama3", "qwen2", "qwen3", "smollm2")
_ARCHITECTURES = {
    "internlm": "InternLMForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "smollm2": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def tiny_config(variant: str) -> dict:
    """Returns the `config.json` of a variant, in the keys that its upstream release uses."""
    family, changes = VARIANTS[variant]
    config = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": "llama" if family == "smollm2" else family,
        "hidden_act": "silu",
        "hidden_size": D,
        "intermediate_size": D_FF,
        "max_position_embeddings": CONTEXT,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS if family == "internlm" else KV_HEADS,
        "rms_norm_eps": 1e-6 if family == "internlm" else 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": VOCAB,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    config |= {
        "internlm": {"bias": True, "rotary": {"base": 10000, "type": "origin"}},
        "internlm2": {"bias": False, "rope_theta": 1000000.0},
        "internlm3": {"bias": False, "qkv_bias": False, "head_dim": HEAD_DIM},
        "llama": {"attention_bias": False, "mlp_bias": False},
        "smollm2": {"attention_bias": False, "mlp_bias": False, "is_llama_config": True},
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"attention_bias": False, "use_sliding_window": False},
    }[family]
    return {k: v for k, v in (config | changes).items() if v is not None or k == "rope_scaling"}


def tiny_shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Lists the tensors of a variant's checkpoint: name -> shape, in PyTorch's [out, in]."""
    family, config = VARIANTS[variant][0], tiny_config(variant)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", D // heads)
    q, kv = heads * head_dim, kv_heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        if family == "internlm2":
            shapes[layer + "attention.wqkv.weight"] = (q + 2 * kv, D)
            shapes[layer + "attention.wo.weight"] = (D, q)
            shapes[layer + "feed_forward.w1.weight"] = (D_FF, D)
            shapes[layer + "feed_forward.w3.weight"] = (D_FF, D)
            shapes[layer + "feed_forward.w2.weight"] = (D, D_FF)
            shapes[layer + "attention_norm.weight"] = (D,)
            shapes[layer + "ffn_norm.weight"] = (D,)
            continue
        for name, rows in (("q", q), ("k", kv), ("v", kv), ("o", D)):
            shapes[layer + f"self_attn.{name}_proj.weight"] = (rows, q if name == "o" else D)
            if name in _biased(family, config):
                shapes[layer + f"self_attn.{name}_proj.bias"] = (rows,)
        if family == "qwen3":
            shapes[layer + "self_attn.q_norm.weight"] = (head_dim,)
            shapes[layer + "self_attn.k_norm.weight"] = (head_dim,)
        shapes[layer + "mlp.gate_proj.weight"] = (D_FF, D)
        shapes[layer + "mlp.up_proj.weight"] = (D_FF, D)
        shapes[layer + "mlp.down_proj.weight"] = (D, D_FF)
        shapes[layer + "input_layernorm.weight"] = (D,)
        shapes[layer + "post_attention_layernorm.weight"] = (D,)
    two = family == "internlm2"
    shapes["model.tok_embeddings.weight" if two else "model.embed_tokens.weight"] = (VOCAB, D)
    shapes["model.norm.weight"] = (D,)
    if not config["tie_word_embeddings"]:
        shapes["output.weight" if two else "lm_head.weight"] = (VOCAB, D)
    return shapes


def tiny_tensors(variant: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Draws a variant's float32 tensors. Norms lie around 1, biases are large enough to matter."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tiny_shapes(variant).items():
        x = rng.standard_normal(shape).astype(np.float32)
        is_norm = len(shape) == 1 and not name.endswith(".bias")
        tensors[name] = 1 + 0.1 * x if is_norm else 0.1 * x
    return tensors


def write_tiny(
    variant: str,
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: np.dtype | str = "float32",
    num_shards: int = 1,
) -> Path:
    """Writes the checkpoint folder of a variant, in one file or in shards with their index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.astype(dtype) for k, v in tiny_tensors(variant, seed).items()}
    if num_shards == 1:
        _write_safetensors(folder / "model.safetensors", tensors)
    else:
        _write_shards(folder, tensors, num_shards)
    _write_json(folder / "config.json", tiny_config(variant) | {"torch_dtype": str(dtype)})
    write_tiny_tokenizer(folder)
    return folder


def write_tiny_tokenizer(folder: Path) -> None:
    """Writes a byte-level BPE of 256 bytes, three markers and 20 merges, split as GPT-2 does."""
    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(moved))]
    pairs = ["t h", "th e", "i n", "a n", "an d", "o r", "e r", "Ġ t", "Ġ a", "Ġ the", "o n"]
    pairs += ["e n", "r e", "l e", "Ġ w", "o u", "Ġ s", "i s", "Ġ and", "in g"]
    pieces = markers + letters + [p.replace(" ", "") for p in pairs]
    added = [
        {"id": i, "content": text, "special": True}
        | dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
        for i, text in enumerate(markers)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                byte_level | {"use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": pairs,
        },
    }
    names = {"bos_token": markers[1], "eos_token": markers[2], "pad_token": markers[2]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "chat_template": CHATML}
    _write_json(folder / "tokenizer.json", spec)
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", names)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2]})


def _biased(family: str, config: dict) -> str:
    """Names the projections that carry a bias."""
    if family == "internlm":
        return "qkvo" if config["bias"] else ""
    return "qkv" if family == "qwen2" or config.get("qkv_bias") else ""


def _write_shards(folder: Path, tensors: dict[str, np.ndarray], num_shards: int) -> None:
    names = sorted(tensors)
    weight_map = {}
    for i in range(num_shards):
        shard = names[i::num_shards]
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        _write_safetensors(folder / file, {n: tensors[n] for n in shard})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Runs `FAMILY DIR`."""
    if len(arguments) != 2 or arguments[0] not in VARIANTS:
        raise SystemExit(f"usage: python -m tests.reference.tiny FAMILY DIR\n{', '.join(VARIANTS)}")
    print(write_tiny(*arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
