"""How many more requests fit into the memory of keys and values when they are kept in int8.

    .venv/bin/python benchmarks/kv_slots.py [MODEL]

Two ways. By arithmetic: a position takes, of each layer, head, and of K and V, `head_dim` numbers,
and in int8 a float32 scale besides. By allocation: the bytes of all arrays that an engine with 16
slots holds less those with 8, over 8 slots (what sampling keeps for a slot is counted, too). Prints

    KV dtype bytes-a-token (arithmetic) bytes-a-slot (allocated) bytes-a-token (allocated)
    GOAL kv_int8_slots_vs_bf16_arithmetic value 1.85 met|missed
    GOAL kv_int8_slots_vs_bf16_allocated value 1.85 met|missed
"""

import gc
import sys

import jax

from internjax.models.config import ModelConfig
from internjax.models.load import Model, load
from internjax.serve.engine import Engine, EngineConfig

CONTEXT, FEW, MANY = 1024, 8, 16
BYTES = {"bfloat16": 2, "int8": 1}
BOUND = 1.85


def per_token(cfg: ModelConfig, dtype: str) -> int:
    """Bytes of one position by arithmetic."""
    head = cfg.head_dim * BYTES[dtype] + (4 if dtype == "int8" else 0)
    return 2 * cfg.num_layers * cfg.num_kv_heads * head


def held(model: Model, dtype: str, slots: int) -> int:
    """Bytes of all arrays of this process while an engine with so many slots exists."""
    engine = Engine(model, EngineConfig(slots=slots, context=CONTEXT, kv_dtype=dtype))
    gc.collect()
    total = sum(array.nbytes for array in jax.live_arrays())
    del engine
    gc.collect()
    return total


def main(args: list[str]) -> int:
    """Prints both ways and whether the goal is met."""
    model = load(args[0] if args else "smollm2-135m-instruct", packed=True)
    counted = {dtype: per_token(model.cfg, dtype) for dtype in BYTES}
    allocated = {}
    for dtype in BYTES:
        more = held(model, dtype, MANY) - held(model, dtype, FEW)
        allocated[dtype] = more / (MANY - FEW)
        slot = allocated[dtype]
        print(f"KV {dtype} {counted[dtype]} {slot:.0f} {slot / CONTEXT:.1f}", flush=True)
    for way, sizes in (("arithmetic", counted), ("allocated", allocated)):
        ratio = sizes["bfloat16"] / sizes["int8"]
        verdict = "met" if ratio >= BOUND else "missed"
        print(f"GOAL kv_int8_slots_vs_bf16_{way} {ratio:.3f} {BOUND} {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
