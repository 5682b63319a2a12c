"""The named sizes of the InternLM line and of the small model that runs everywhere.

Sources: InternLM v1 and InternLM2 configurations and converters (InternLM/InternLM,
InternLM/InternEvo), the InternLM2 report (arXiv:2403.17297) and the checkpoints' config.json
where noted. 104B and 123B are our shapes: their constants were never published.
"""

from dataclasses import replace

from internjax.errors import UserError
from internjax.models.config import ModelConfig, RopeConfig


def _internlm(name: str, D: int, L: int, N: int, F: int, context: int, bias: bool) -> ModelConfig:
    """InternLM v1: Llama with attention biases (o too), eps 1e-6 in the published checkpoints."""
    return ModelConfig(
        name=name,
        family="internlm",
        num_layers=L,
        d_model=D,
        num_heads=N,
        num_kv_heads=N,
        head_dim=128,
        d_ff=F,
        vocab_size=103168,
        max_context=context,
        norm_eps=1e-6,
        rope=RopeConfig("dynamic", 10000.0, original_context=context),
        qkv_bias=bias,
        output_bias=bias,
    )


def _internlm2(name: str, D: int, L: int, N: int, K: int, F: int, factor: float) -> ModelConfig:
    """InternLM2 and 2.5: grouped queries, no biases, theta 1e6, 32k context and dynamic NTK."""
    return ModelConfig(
        name=name,
        family="internlm2",
        num_layers=L,
        d_model=D,
        num_heads=N,
        num_kv_heads=K,
        head_dim=128,
        d_ff=F,
        vocab_size=92544,
        max_context=32768,
        norm_eps=1e-5,
        rope=RopeConfig("dynamic", 1e6, factor=factor, original_context=32768),
    )


_INTERNLM3 = ModelConfig(
    # Unverified: the rope scaling of the published checkpoint was not seen, so none is stated.
    name="internlm3-8b-instruct",
    family="internlm3",
    num_layers=48,
    d_model=4096,
    num_heads=32,
    num_kv_heads=2,
    head_dim=128,
    d_ff=10240,
    vocab_size=128512,
    max_context=32768,
    norm_eps=1e-5,
    rope=RopeConfig("default", 5e7),
)

_SMOLLM2 = ModelConfig(
    # Source: metadata of SmolLM2-135M-Instruct.Q4_1.gguf.
    name="smollm2-135m-instruct",
    family="smollm2",
    num_layers=30,
    d_model=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    d_ff=1536,
    vocab_size=49152,
    max_context=8192,
    norm_eps=1e-5,
    rope=RopeConfig("default", 1e5),
    tie_embeddings=True,
)

# 20B v1: the published config says bias false [unverified]; an import reads the checkpoint's keys.
_ALL = (
    _internlm("internlm-7b", 4096, 32, 32, 11008, 2048, True),
    _internlm("internlm-20b", 5120, 60, 40, 13824, 4096, False),
    _internlm2("internlm2-1_8b", 2048, 24, 16, 8, 8192, 2.0),
    _internlm2("internlm2-7b", 4096, 32, 32, 8, 14336, 2.0),
    _internlm2("internlm2-20b", 6144, 48, 48, 8, 16384, 2.0),
    _internlm2("internlm2_5-7b", 4096, 32, 32, 8, 14336, 2.0),
    _internlm2("internlm2_5-20b", 6144, 48, 48, 8, 16384, 2.0),
    _INTERNLM3,
    replace(_INTERNLM3, name="internlm3-8b"),
    # Our shapes: the constants of the 104B and 123B models were never published.
    _internlm("internlm-104b", 10240, 82, 80, 27392, 2048, True),
    _internlm("internlm-123b", 12288, 68, 96, 32768, 2048, True),
    _SMOLLM2,
)

CONFIGS: dict[str, ModelConfig] = {cfg.name: cfg for cfg in _ALL}


def config(name: str) -> ModelConfig:
    """Returns a named size, or raises with the legal names."""
    if name not in CONFIGS:
        raise UserError(f"unknown architecture {name!r}: legal are {', '.join(CONFIGS)}.")
    return CONFIGS[name]
