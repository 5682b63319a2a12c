"""What rounding activations to int8 costs: SmolLM2 on the CPU kernels against float32.

    .venv/bin/python benchmarks/cpu_accuracy.py [MODEL] [prompts=100] [peer=false]

Feeds `prompts` pieces of 64 tokens of English text that ships with the repository (evaluation texts
and the manual), all teacher-forced, and compares the logits at every position with those of the
same weights expanded to float32 and multiplied in float32:

    ACCURACY name  top-1 agreement  mean KL(float32 || it) in nats  perplexity  its change

Beside ours stands llama.cpp on the same file, which rounds activations too (`make peers`; without
it the script exits with 3). Goals: agreement >= 95%, perplexity within 1%.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from internjax.experiments.compilation_cache import enable_compilation_cache
from internjax.kernels.cpu.matmul import ACTIVATIONS
from internjax.models.decoder import forward
from internjax.models.load import load
from internjax.weights import PackedWeight, packed

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-peers" / "bin" / "python"
LENGTH, BATCH = 64, 10


def pieces(tokenizer, number: int) -> np.ndarray:
    """Cuts the repository's English texts into `[number, LENGTH]` ids."""
    lines = (ROOT / "internjax/evals/data/retention_text.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    texts += [path.read_text("utf-8") for path in sorted((ROOT / "docs" / "en").glob("*.md"))]
    ids = [i for text in texts for i in tokenizer.encode(text)]
    return np.asarray(ids[: number * LENGTH], np.int32).reshape(number, LENGTH)


def compare(exact: np.ndarray, other: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns sums over positions: agreements, KL, -log p of the next id (float32's, other's)."""
    p, q = (_log_softmax(x) for x in (exact, other))
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    nll = [-np.take_along_axis(x[:, :-1], ids[:, 1:, None], axis=-1).sum() for x in (p, q)]
    return np.asarray([(p.argmax(-1) == q.argmax(-1)).sum(), kl.sum(), *nll])


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def show(name: str, sums: np.ndarray, ids: np.ndarray) -> None:
    """Prints one row."""
    agree, kl = sums[:2] / ids.size
    exact, here = np.exp(sums[2:] / (ids.size - len(ids)))
    print(f"ACCURACY {name:12} {agree:.2%} {kl:.5f} {here:.3f} {here / exact - 1:+.2%}", flush=True)


def main(args: list[str]) -> int:
    """Scores with every kind of activations, then with the peer."""
    options = dict(a.split("=", 1) for a in args if "=" in a)
    name = next((a for a in args if "=" not in a), "smollm2-135m-instruct")
    enable_compilation_cache()
    exact, model = load(name), load(name, packed=True)
    if not isinstance(model.params["embed"], PackedWeight):
        sys.exit(f"{name}: has no packed weights here (no quantized GGUF, or no CPU kernels)")
    ids = pieces(model.tokenizer, int(options.get("prompts", 100)))
    run = jax.jit(forward, static_argnames="cfg")
    kind = lambda x: isinstance(x, PackedWeight)  # noqa: E731
    trees = {
        f"ours {how}": jax.tree.map(
            lambda x, how=how: packed(x, how, "float32") if kind(x) else x,
            model.params,
            is_leaf=kind,
        )
        for how in ACTIVATIONS
    }
    sums = {row: np.zeros(4) for row in trees}
    peer = _peer(model.path) if options.get("peer", "true") == "true" else None
    if peer:
        sums["llama.cpp"] = np.zeros(4)
    for at in range(0, len(ids), BATCH):
        rows = ids[at : at + BATCH]
        want = np.asarray(run(exact.params, jnp.asarray(rows), cfg=exact.cfg), np.float64)
        for row, tree in trees.items():
            got = np.asarray(run(tree, jnp.asarray(rows), cfg=model.cfg), np.float64)
            sums[row] += compare(want, got, rows)
        if peer:
            sums["llama.cpp"] += compare(want, _scores(peer, rows), rows)
    for row, total in sums.items():
        show(row, total, ids)
    if peer is None:
        print(f"missing: llama.cpp in {PEERS}; `make peers` builds it")
        return 3
    peer.close()
    return 0


def _peer(path: Path):
    from cpu_decode import Peer

    peer = Peer("peer_llama.py", path) if PEERS.is_file() else None
    return peer if peer and peer.there() else None


def _scores(peer, rows: np.ndarray) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        out = []
        for i, row in enumerate(rows):
            question = json.dumps(["score", row.tolist(), f"{folder}/{i}.npy"])
            peer.process.stdin.write(question + "\n")
            peer.process.stdin.flush()
            out.append(np.load(json.loads(peer.process.stdout.readline())))
        return np.asarray(out, np.float64)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
