"""Tokens/s a core of our loader beside Grain's own packing pipeline, same shards, one run.

    .venv/bin/python benchmarks/loader.py [BATCH] [LENGTH]

Ours draws any batch from a mixture of two sources (`Mixture.batch_at`) through the prefetching
reader; the peer is the plain pipeline that Grain offers for the same end: documents shuffled,
concatenated, cut to rows with segment ids and positions (`ConcatThenSplitIterDataset`), batched,
with as many reading threads. The peer cannot jump to a step, does not weigh sources, and makes no
targets. Rounds alternate; the medians of tokens a second of processor time (all threads) and of
wall time are printed, and at last `RATIO loader_tokens_per_second ours peer ratio`.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import numpy as np

from internjax.data.loader import ReadAhead
from internjax.data.mixture import Mixture, MixtureConfig, WeightsFrom, open_sources
from internjax.data.schedule import BatchPlan
from internjax.data.shards import TokenShards, write_shards

ROUNDS, SECONDS, THREADS = 7, 2.0, 1
VOCAB, TOKENS = 92_544, 2**24  # InternLM2's vocabulary: 4 bytes a token; tokens a source


def write(folder: Path, seed: int) -> None:
    """Random ids in documents as long as web pages are: log-normal, median 500, mean 820 tokens."""
    rng = np.random.default_rng(seed)
    lengths = np.ceil(rng.lognormal(np.log(500), 1.0, TOKENS // 800)).astype(int).tolist()
    rows = ((str(i), rng.integers(0, VOCAB, n, np.uint32), n) for i, n in enumerate(lengths))
    write_shards(folder, rows, tokenizer_hash="0" * 64, vocab_size=VOCAB, shard_tokens=TOKENS // 4)


def peer(sources: dict[str, TokenShards], batch: int, length: int) -> Iterator[dict]:
    """Grain's pipeline over the same documents, without our index."""
    documents = grain.MapDataset.concatenate(
        [grain.MapDataset.source(shards) for shards in sources.values()]
    )
    rows = documents.seed(0).shuffle().repeat().map(lambda ids: {"tokens": ids})
    stream = rows.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=64))
    packed = grain.experimental.ConcatThenSplitIterDataset(stream, length_struct={"tokens": length})
    return iter(packed.batch(batch))


def measure(next_batch: Callable[[], object], tokens: int) -> tuple[float, float]:
    """Returns tokens a second of processor time, and of wall time."""
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < SECONDS:
        next_batch()
        count += tokens
    return count / (time.process_time() - cpu), count / (time.perf_counter() - wall)


def main() -> int:
    """Alternates rounds and prints the medians."""
    batch, length = (int(x) for x in [*sys.argv[1:], "16", "4096"][:2])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, source in enumerate(("en", "zh")):
            write(folder / source, seed)
        sources = open_sources(folder)
        weights = (WeightsFrom(0, {"en": 0.6, "zh": 0.4}),)
        readers, runs = {}, {}
        for packing in ("apart", "concat", "first_fit"):
            start = time.perf_counter()
            config = MixtureConfig(length=length, packing=packing, weights=weights)
            mixture = Mixture(sources, BatchPlan(batch), config)
            mixture.batch_at(0)
            print(f"OPEN {packing} {time.perf_counter() - start:.3f} seconds to the first batch")
            readers[packing] = ReadAhead(mixture.batch_at, stop=10**9, threads=THREADS)
            steps = iter(range(10**9))
            runs[packing] = lambda r=readers[packing], s=steps: r(next(s))
        theirs = peer(sources, batch, length)
        runs["grain"] = lambda: next(theirs)
        found: dict[str, list] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                run()  # starts the threads, so that no round pays for another's
                found[name].append(measure(run, batch * length))
                if name in readers:
                    readers[name].close()
    medians = {n: [statistics.median(column) for column in zip(*rows)] for n, rows in found.items()}
    for name, (cpu, wall) in medians.items():
        print(f"OURS {name}" if name in readers else f"PEER {name}", end=" ")
        print(f"{cpu / 1e6:.2f} M tokens a core-second, {wall / 1e6:.2f} M a wall second")
    ours, other = medians["apart"][0], medians["grain"][0]
    print(f"RATIO loader_tokens_per_second {ours:.0f} {other:.0f} {ours / other:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
