"""What an engine is told at its start, and what it counts."""

from dataclasses import dataclass

from internjax.errors import UserError
from internjax.kernels.cpu.library import available
from internjax.kernels.cpu.matmul import ACTIVATIONS
from internjax.kernels.platform import not_for_hopper

KV_DTYPES = ("float32", "bfloat16", "int8", "int4")


@dataclass(frozen=True)
class EngineConfig:
    """How much runs at once, and in what precision.

    Fields:
      slots: requests decoded together; every step has this shape whoever is there.
      context: positions a slot holds, prompt and answer together; 0 is the model's, at most 2048.
      kv_dtype: "float32", "bfloat16", "int8" (a scale per token and head) or "int4" (a step and a
        least value per token and head; no kernel reads it, so it saves memory and costs time).
      block: positions of a block of the cache; whole blocks are shared by prompts that begin alike.
      blocks: of the cache, all slots together. 0: as many as full slots need; below 1: that share
        of the memory that is free when the weights are there; else their number. With fewer than
        all slots need, the youngest request waits and is computed anew when they run out.
      prefix_cache: look for blocks that hold what a prompt begins with.
      max_waiting: requests that may wait for a slot before new ones are refused.
      prefill_tokens: prompt tokens prefilled between two decoding steps.
      attend_tokens: positions that these may attend to in all, or a long prompt's later pieces
        would hold up the others more than its first ones; 0 sets no bound.
      weights: "keep" computes with quantized or adapted weights as they are, "expand" turns them
        into plain float arrays once, "pack" lays integers out for the CPU kernels and floats too,
        "turn" integers for those of Hopper GPUs. "auto" packs or turns where those run, but for
        models of nothing but float32; on a CPU without them it expands, for unpacking at every step
        costs more than reading the floats.
      speculate: guesses a step checks for every request, 0 for none: of the draft model if the
        engine is given one, else of what followed the same words before.
      invariant: no bit of an answer depends on what was cached, how a prompt was cut, or whether a
        request was computed anew. The CPU kernels over packed weights see to that by themselves;
        elsewhere prompts go through the decoding step, token by token, which is slower.
      adapters: places for LoRA adapters that are loaded at run time; with any, every step has one
        size and multiplies with the corrections of all of them.
      adapter_rank: the largest rank that a place takes; smaller ones are filled with zeros.
      activations: what products with packed weights round their activations to: "int8" by groups,
        "bf16", or "f32" for none.
      tensor: devices that share out heads, feed-forward columns and vocabulary, see `tensor.py`.
    """

    slots: int = 16
    context: int = 0
    kv_dtype: str = "float32"
    block: int = 64
    blocks: float = 0
    prefix_cache: bool = True
    max_waiting: int = 256
    prefill_tokens: int = 256
    attend_tokens: int = 65536
    weights: str = "auto"
    activations: str = "int8"
    speculate: int = 0
    invariant: bool = False
    adapters: int = 0
    adapter_rank: int = 16
    tensor: int = 1

    def __post_init__(self):
        if self.adapters and self.tensor > 1:
            raise UserError(
                f"adapters={self.adapters} and tensor={self.tensor}: adapters are served on one"
                " device; give one of the two."
            )
        for name in ("slots", "block", "max_waiting", "prefill_tokens", "adapter_rank", "tensor"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1.")
        for name in ("blocks", "attend_tokens", "speculate", "adapters"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 0.")
        if self.blocks > 1 and self.blocks != int(self.blocks):
            raise UserError(f"blocks={self.blocks}: give a share below 1 or a whole number.")
        if self.kv_dtype not in KV_DTYPES:
            raise UserError(f"kv_dtype={self.kv_dtype!r}: legal are {', '.join(KV_DTYPES)}.")
        if self.weights not in ("auto", "keep", "expand", "pack", "turn"):
            raise UserError(f"weights={self.weights!r}: legal are auto, keep, expand, pack, turn.")
        if self.activations not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise UserError(f"activations={self.activations!r}: legal are {names}.")
        if self.tensor > 1 and self.weights in ("pack", "turn"):
            raise UserError(
                f"weights={self.weights} is for kernels, which tensor={self.tensor} cannot cut:"
                " take auto, expand or keep."
            )
        if self.weights == "pack" and not available():
            raise UserError("weights=pack needs the CPU kernels: keep, expand or auto run without.")
        if self.weights == "turn" and (why := not_for_hopper()):
            raise UserError(f"weights=turn is for the GPU kernels: {why}")


@dataclass
class EngineStats:
    """Counters since the start, for /metrics and benchmarks.

    Fields:
      prefix_tokens: prompt tokens found in the cache; preempted: times a request had to give its
        blocks back; poisoned: requests failed for NaN or infinite logits.
      programs: compiled shapes in use; recompilations: those met after the warm-up.
      hangs: rounds that did not end in time, see `thread.EngineThread`.
      guessed, accepted: tokens that speculation guessed, and those that were right.
      grammar_seconds: what the engine's thread spent on masks for `grammar_tokens` tokens; steps
        with a constrained request also wait for the step before.
      blocks, held_blocks, cached_blocks: of the cache, now: all, used by requests, kept for others.
    """

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    max_in_flight: int = 0
    prefix_tokens: int = 0
    preempted: int = 0
    poisoned: int = 0
    hangs: int = 0
    programs: int = 0
    recompilations: int = 0
    guessed: int = 0
    accepted: int = 0
    grammar_tokens: int = 0
    grammar_seconds: float = 0.0
    blocks: int = 0
    held_blocks: int = 0
    cached_blocks: int = 0
