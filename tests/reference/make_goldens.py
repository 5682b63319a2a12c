"""Makes tests/goldens/logits.npz: the logits of every tiny checkpoint, computed by torch.

    make peers && .venv-peers/bin/python -m tests.reference.make_goldens

transformers computes every family; it holds no InternLM, so those are laid out as Llama here,
apart from the package, and must agree with `torch_decoder` besides.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.reference.tiny import VARIANTS, tiny_config, tiny_tensors, write_tiny
from tests.reference.torch_decoder import reference_logits

GOLDENS = Path(__file__).parents[1] / "goldens" / "logits.npz"
LENGTHS = (12, 40)  # below and past the context limit (16) of the dynamic variants
KEPT = (0, 5, -1)  # positions whose logits are stored


def golden_tokens(length: int) -> list[int]:
    """Fixed ids below the vocabulary size."""
    return np.random.default_rng(7).integers(0, 288, length).tolist()


def main() -> None:
    """Computes and writes all goldens; prints how far the two witnesses are apart."""
    torch.manual_seed(0)
    goldens = {"kept": np.array(KEPT)}
    for length in LENGTHS:
        goldens[f"tokens-{length}"] = np.array(golden_tokens(length), np.int32)
    for variant in VARIANTS:
        model = load(variant)
        for length in LENGTHS:
            tokens = golden_tokens(length)
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0].float()
            check(variant, tokens, logits)
            goldens[f"{variant}-{length}"] = logits[list(KEPT)].numpy()
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **goldens)
    print(f"{GOLDENS.name}: {GOLDENS.stat().st_size / 1e3:.0f} kB")


def load(variant: str) -> torch.nn.Module:
    """Builds the transformers model of a variant, from its folder or laid out as Llama."""
    family = VARIANTS[variant][0]
    if not family.startswith("internlm"):
        with tempfile.TemporaryDirectory() as folder:
            write_tiny(variant, folder)
            options = {"dtype": torch.float32, "attn_implementation": "eager"}
            return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    config = tiny_config(variant)
    weights = {k: torch.tensor(v) for k, v in tiny_tensors(variant).items()}
    if family == "internlm2":
        weights = llama_names(weights, config)
    biased = "model.layers.0.self_attn.q_proj.bias" in weights
    model = LlamaForCausalLM(llama_config(config, biased)).eval()
    if biased and family == "internlm3":  # its bias covers q, k, v; Llama's covers o too
        for i in range(config["num_hidden_layers"]):
            weights[f"model.layers.{i}.self_attn.o_proj.bias"] = torch.zeros(config["hidden_size"])
    model.load_state_dict(weights, strict=True)
    return model


def llama_config(config: dict, biased: bool) -> LlamaConfig:
    """Returns the Llama config that computes what an InternLM config describes."""
    rotary = config.get("rotary") or {}
    scaling = config.get("rope_scaling")
    if rotary.get("type") == "dynamic":
        scaling = {"rope_type": "dynamic", "factor": rotary["scaling_factor"]}
    same = (
        "hidden_size intermediate_size max_position_embeddings num_attention_heads rms_norm_eps"
        " num_hidden_layers num_key_value_heads vocab_size tie_word_embeddings rope_theta"
    )
    return LlamaConfig(
        **{key: config[key] for key in same.split()},
        rope_scaling=scaling and {"rope_type": scaling.get("type", "dynamic"), **scaling},
        attention_bias=biased,
        attn_implementation="eager",
    )


def llama_names(weights: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """Lays an InternLM2 checkpoint out as Llama: row by row of wqkv, by index arithmetic."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size, group = config["hidden_size"] // heads, heads // kv_heads
    plain = {
        "tok_embeddings": "embed_tokens",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
    }
    renamed = {}
    for name, tensor in weights.items():
        if "wqkv" in name:
            rows = {"q": [], "k": [], "v": []}
            for row in range(len(tensor)):
                place = row // size % (group + 2)
                rows["k" if place == group else "v" if place == group + 1 else "q"].append(row)
            for part, chosen in rows.items():
                renamed[name.replace("attention.wqkv", f"self_attn.{part}_proj")] = tensor[chosen]
            continue
        for old, new in plain.items():
            name = name.replace(old, new)
        renamed["lm_head.weight" if name == "output.weight" else name] = tensor
    return renamed


def check(variant: str, tokens: list[int], logits: torch.Tensor) -> None:
    """Compares transformers with the independent decoder, for the families it knows."""
    if not VARIANTS[variant][0].startswith("internlm"):
        return
    weights = {k: torch.tensor(v) for k, v in tiny_tensors(variant).items()}
    other = reference_logits(variant, weights, tokens)
    distance = (other - logits).abs().max().item()
    print(f"{variant} at {len(tokens)} tokens: the two references differ by {distance:.1e}")
    if distance > 2e-5:  # float32 sums of 64 to 96 terms in another order
        raise SystemExit(f"{variant}: the references disagree by {distance}")


if __name__ == "__main__":
    main()
