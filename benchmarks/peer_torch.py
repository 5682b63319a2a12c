"""transformers + torch in bfloat16 as a peer of cpu_decode.py; runs in the peers' environment.

    .venv-peers/bin/python benchmarks/peer_torch.py HF_FOLDER

Answers one line of JSON for each line on standard input: ["prefill", 1, tokens, 0] and
["decode", batch, context, tokens] with tokens/s.
"""

import json
import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def prompts(batch: int, tokens: int) -> torch.Tensor:
    """Ids of no meaning, the same for every peer."""
    return torch.tensor([[5 + (7 * row + i) % 900 for i in range(tokens)] for row in range(batch)])


def main() -> None:
    """Loads the model, then answers until the input ends."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
    caches = {}

    def prefill(_batch: int, length: int, _new: int) -> float:
        ids = prompts(1, length)
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        return length / (time.perf_counter() - start)

    def decode(batch: int, length: int, new: int) -> float:
        ids = prompts(batch, length)
        if (batch, length) not in caches:
            out = model(ids, use_cache=True, logits_to_keep=1)
            caches[batch, length] = out.past_key_values
        cache = caches[batch, length]
        cache.crop(length - 1 - cache.get_seq_length())  # negative: how many go
        token = ids[:, -1:]
        start = time.perf_counter()
        for _ in range(new):
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return batch * new / (time.perf_counter() - start)

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        kind, *args = json.loads(line)
        print(json.dumps({"prefill": prefill, "decode": decode}[kind](*args)), flush=True)


if __name__ == "__main__":
    main()
