"""The shape of a decoder: everything that decides its parameter tree and its forward pass."""

from dataclasses import dataclass

from internjax.errors import UserError

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
EXPERT_FIELDS = (
    "experts_per_token",
    "expert_d_ff",
    "shared_experts",
    "capacity_factor",
    "balance_loss",
    "router_z_loss",
)
FAMILIES = ("internlm", "internlm2", "internlm3", "llama", "qwen2", "qwen3", "smollm2")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv:2104.09864) and how it is stretched beyond its training.

    Fields:
      kind: one of `ROPE_KINDS`.
      theta: base of the geometric frequencies.
      factor: stretch of the context (linear, dynamic, llama3, yarn).
      original_context: positions of the original training; 0 means the model's `max_context`.
      low_freq_factor, high_freq_factor: band limits of Llama 3's rule, in wavelengths a context.
      beta_fast, beta_slow: band limits of YaRN (arXiv:2309.00071), in rotations a context.
      attention_factor: YaRN's factor on cos and sin; 0 means 0.1 ln(factor) + 1.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise UserError(f"rope.kind={self.kind!r}: legal kinds are {', '.join(ROPE_KINDS)}.")


@dataclass(frozen=True)
class ModelConfig:
    """One decoder of the Llama line. Scalars only, so that it is hashable and static under `jit`.

    Fields: D is `d_model`, N `num_heads`, K `num_kv_heads`, H `head_dim`, F `d_ff`, V `vocab_size`.
      qkv_bias: q, k and v carry biases (InternLM v1, Qwen2).
      output_bias: the attention output carries one (InternLM v1).
      qk_norm: RMS norm on q and k over H before the rotation (Qwen3).
      tie_embeddings: the head is the transposed embedding.
      num_experts: experts of every layer's feed-forward block; 0 for a dense one. With experts,
        d_ff is the width that a token passes: experts_per_token * expert_d_ff + shared_experts.
      experts_per_token: how many experts a token is given to; expert_d_ff: width of each.
      shared_experts: width of the block that every token passes beside them; 0 for none.
      capacity_factor: in training an expert takes at most so many times its even share of a
        device's tokens and drops the rest; 0 drops none. Scoring and decoding never drop.
      normalize_gates: a token's experts share 1, as in GShard and Mixtral; false leaves them their
        probabilities, as in Switch. With one expert a token, true hides the router from the loss.
      balance_loss, router_z_loss: weights of the two auxiliary losses (`moe.auxiliary_loss`).
      dtype: dtype of the computation; weights may be stored in another.
    """

    name: str
    family: str
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    max_context: int
    norm_eps: float
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_d_ff: int = 0
    shared_experts: int = 0
    capacity_factor: float = 0.0
    normalize_gates: bool = True
    balance_loss: float = 0.0
    router_z_loss: float = 0.0
    dtype: str = "float32"

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise UserError(f"family={self.family!r}: legal families are {', '.join(FAMILIES)}.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}:"
                " each KV head must serve an equal group of query heads."
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd: the rotation pairs its dimensions.")
        _check_experts(self)


def _check_experts(cfg: ModelConfig) -> None:
    k, E = cfg.experts_per_token, cfg.num_experts
    if not E:
        given = {name: getattr(cfg, name) for name in EXPERT_FIELDS if getattr(cfg, name)}
        if given:
            raise UserError(f"num_experts=0 is a dense model, which has no {given}: leave them 0.")
        return
    if not 1 <= k <= E or cfg.expert_d_ff < 1:
        raise UserError(
            f"experts_per_token={k} and expert_d_ff={cfg.expert_d_ff}: with num_experts={E} a token"
            f" is given to 1..{E} experts, each at least 1 wide."
        )
    least = min(cfg.shared_experts, cfg.capacity_factor, cfg.balance_loss, cfg.router_z_loss)
    if least < 0:
        raise UserError(
            f"{least} is negative: shared_experts, capacity_factor and the weights of"
            " auxiliary losses are at least 0."
        )
    width = k * cfg.expert_d_ff + cfg.shared_experts
    if cfg.d_ff != width:
        raise UserError(
            f"d_ff={cfg.d_ff} is not the width that a token passes: experts_per_token={k} *"
            f" expert_d_ff={cfg.expert_d_ff} + shared_experts={cfg.shared_experts} = {width}."
        )
