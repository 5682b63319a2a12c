"""llama.cpp as a peer of cpu_decode.py and cpu_accuracy.py; runs in the peers' environment.

    .venv-peers/bin/python benchmarks/peer_llama.py MODEL.gguf

Answers one line of JSON for each line on standard input: ["prefill", 1, tokens, 0] and
["decode", batch, context, tokens] with tokens/s, ["score", ids, path] after writing the logits of
every position to a NumPy file.
"""

import ctypes
import json
import os
import sys
import time

import llama_cpp as llama
import numpy as np

THREADS = len(os.sched_getaffinity(0))
_quiet = llama.llama_log_callback(lambda *_: None)  # kept: C calls it for as long as it logs


class Context:
    """A context of some sequences; token ids go in, logits come out."""

    def __init__(self, model, sequences: int, length: int):
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * length, sequences
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = THREADS
        self.context = llama.llama_init_from_model(model, params)
        self.memory = llama.llama_get_memory(self.context)
        self.batch = llama.llama_batch_init(512, 0, 1)
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def feed(self, tokens, sequences, positions, asked) -> np.ndarray:
        """Runs up to 512 tokens; returns the logits of those that are asked for."""
        batch, rows = self.batch, []
        batch.n_tokens = len(tokens)
        for i, (token, sequence, position, ask) in enumerate(
            zip(tokens, sequences, positions, asked, strict=True)
        ):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), position, ask
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            rows += [i] if ask else []
        if (code := llama.llama_decode(self.context, batch)) != 0:
            sys.exit(f"llama_decode failed with {code}")
        size = self.vocab * ctypes.sizeof(ctypes.c_float)
        out = [llama.llama_get_logits_ith(self.context, i) for i in rows]
        logits = [ctypes.string_at(x, size) for x in out]
        return np.frombuffer(b"".join(logits), np.float32).reshape(len(rows), self.vocab)

    def fill(self, prompt: list[int], sequence: int) -> np.ndarray:
        """Prefills one sequence; returns the logits of its last token."""
        for at in range(0, len(prompt), 512):
            piece = prompt[at : at + 512]
            asked = [at + i == len(prompt) - 1 for i in range(len(piece))]
            logits = self.feed(piece, [sequence] * len(piece), range(at, at + len(piece)), asked)
        return logits[-1]

    def forget(self, start: int) -> None:
        """Drops the positions from `start` on, of all sequences."""
        llama.llama_memory_seq_rm(self.memory, -1, start, -1)


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """Ids of no meaning, the same for every peer."""
    return [5 + (7 * seed + i) % 900 for i in range(tokens)]


def main() -> None:
    """Loads the model, then answers until the input ends."""
    llama.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(
        sys.argv[1].encode(), llama.llama_model_default_params()
    )
    contexts: dict[tuple[int, int], Context] = {}

    def context(batch: int, length: int) -> Context:
        if (batch, length) not in contexts:
            contexts[batch, length] = Context(model, batch, length)
        return contexts[batch, length]

    def prefill(_batch: int, length: int, _new: int) -> float:
        here = context(1, length)
        here.forget(0)
        start = time.perf_counter()
        here.fill(prompt(length), 0)
        return length / (time.perf_counter() - start)

    def decode(batch: int, length: int, new: int) -> float:
        known = (batch, length + new) in contexts
        here = context(batch, length + new)
        if not known:
            for sequence in range(batch):
                here.fill(prompt(length, sequence), sequence)
        here.forget(length - 1)
        tokens = [prompt(length, sequence)[-1] for sequence in range(batch)]
        start = time.perf_counter()
        for step in range(new):
            at = [length - 1 + step] * batch
            tokens = here.feed(tokens, range(batch), at, [1] * batch).argmax(-1)
        return batch * new / (time.perf_counter() - start)

    def score(ids: list[int], path: str) -> str:
        here = context(1, 512)
        here.forget(0)
        np.save(path, here.feed(ids, [0] * len(ids), range(len(ids)), [1] * len(ids)))
        return path

    answers = {"prefill": prefill, "decode": decode, "score": score}
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        kind, *args = json.loads(line)
        print(json.dumps(answers[kind](*args)), flush=True)


if __name__ == "__main__":
    main()
