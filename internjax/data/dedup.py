"""Exact and near duplicates: MinHash finds candidates, exact Jaccard decides, one document is kept.

Shingles are 5-grams of normalised words (single characters in Han and Kana), hashed to 64 bits.
Signatures come from rensa or from the NumPy oracle below; as every removal is verified on the
shingles themselves, both give the same decisions wherever both see the candidate.
"""

import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt32, UInt64

from internjax.errors import UserError

NGRAM = 5
NUM_PERM = 112  # 14 bands of 8 rows, as datatrove and FineWeb
BANDS, ROWS = 14, 8
MAX_CHARACTERS = 500_000  # of a document that are shingled: giants saturate signatures
MAX_BUCKET = 64  # documents of one bucket that are compared all with all
KEEP = ("longest", "first")
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
TOKEN = re.compile(rf"[{CJK}]|[^\W{CJK}]+")

# "_": the sets of one call differ in length.
Shingles = UInt64[np.ndarray, "_"]


@dataclass(frozen=True)
class Dup:
    """What deduplication says of one document.

    Fields:
      cluster: index of the cluster's first document; size: documents in the cluster.
      kept: whether this one stays; of: index of the kept document it repeats (itself if kept).
      jaccard: exact similarity to `of`, 1 for itself; exact: its text equals that of `of`.
    """

    cluster: int
    size: int
    kept: bool
    of: int
    jaccard: float
    exact: bool


def normalize(text: str) -> str:
    """Lower case, digits to 0, no marks, punctuation to spaces: what near duplicates differ in."""
    text = unicodedata.normalize("NFD", text[:MAX_CHARACTERS].lower())
    text = "".join(c for c in text if not unicodedata.combining(c))
    return re.sub(r"\d", "0", re.sub(r"[^\w]|_", " ", unicodedata.normalize("NFC", text)))


def shingles(text: str, n: int = NGRAM) -> Shingles:
    """Returns the sorted distinct hashes of the text's word n-grams; a shorter text is one gram."""
    import xxhash

    words = TOKEN.findall(normalize(text))
    hashes = np.array([xxhash.xxh64_intdigest(w.encode()) for w in words], dtype=np.uint64)
    width = min(n, len(words))
    if not width:
        return hashes
    gram = np.zeros(len(words) - width + 1, dtype=np.uint64)
    for i in range(width):  # a polynomial in an odd number, modulo 2**64: order matters
        gram = gram * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + len(gram)]
    return np.unique(_mix(gram))


def jaccard(a: Shingles, b: Shingles) -> float:
    """Exact Jaccard similarity of two sorted sets; two empty sets are equal."""
    if not len(a) and not len(b):
        return 1.0
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def signatures(
    sets: Sequence[Shingles], *, seed: int = 1, backend: str = "rensa"
) -> UInt32[np.ndarray, "N P"]:
    """Returns the MinHash signatures of non-empty shingle sets by `rensa` or `numpy`."""
    if backend not in SIGNERS:
        raise UserError(f"no MinHash backend {backend!r}: legal are {', '.join(SIGNERS)}.")
    if not sets:
        return np.zeros((0, NUM_PERM), dtype=np.uint32)
    return SIGNERS[backend](sets, seed)


def _sign_rensa(sets: Sequence[Shingles], seed: int) -> UInt32[np.ndarray, "N P"]:
    import rensa

    if rensa.RMinHash.ALGORITHM_VERSION != 2:  # versions differ in every bit of a signature
        raise UserError(
            f"rensa's RMinHash has version {rensa.RMinHash.ALGORITHM_VERSION}, 2 is known: "
            "pip install 'rensa>=0.5,<0.6', or minhash=numpy."
        )
    offsets = np.concatenate([[0], np.cumsum([len(s) for s in sets])]).astype(np.uint64)
    rows = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(sets), offsets, num_perm=NUM_PERM, seed=seed
    ).to_rows()
    return np.array(rows, dtype=np.uint32)


def _sign_numpy(sets: Sequence[Shingles], seed: int) -> UInt32[np.ndarray, "N P"]:
    """The definition: the least of (a x + b) mod 2**64, its high half, for NUM_PERM pairs a, b."""
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 2**63, NUM_PERM, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    b = rng.integers(0, 2**63, NUM_PERM, dtype=np.uint64)
    out = np.empty((len(sets), NUM_PERM), dtype=np.uint32)
    for row, values in zip(out, sets):
        least = np.full(NUM_PERM, 2**64 - 1, dtype=np.uint64)
        for part in np.array_split(values, max(1, len(values) // 4096)):
            least = np.minimum(least, (part[:, None] * a + b).min(axis=0, initial=2**64 - 1))
        row[:] = least >> np.uint64(32)
    return out


SIGNERS = {"rensa": _sign_rensa, "numpy": _sign_numpy}


def banding(threshold: float) -> tuple[int, int]:
    """Returns the most selective (bands, rows) that find a pair at `threshold` 9 times in 10.

    The probability is 1 - (1 - J**rows)**bands; at .7 to .8 the published 14 x 8 is kept.
    """
    if threshold >= 0.7:
        return BANDS, ROWS
    for rows in range(ROWS, 0, -1):
        if 1 - (1 - threshold**rows) ** (NUM_PERM // rows) >= 0.9:
            return NUM_PERM // rows, rows
    return NUM_PERM, 1


def candidates(signs: UInt32[np.ndarray, "N P"], bands: int, rows: int) -> list[tuple[int, int]]:
    """Returns pairs i < j that agree on all rows of a band, sorted.

    A bucket of more than MAX_BUCKET documents compares each with the first and with the one before
    it only, so that one piece of boilerplate cannot make the work quadratic.
    """
    pairs: set[tuple[int, int]] = set()
    for band in range(bands):
        part = np.ascontiguousarray(signs[:, band * rows : (band + 1) * rows])
        _, bucket = np.unique(part, axis=0, return_inverse=True)
        order = np.argsort(bucket, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(bucket[order])) + 1):
            members = group.tolist()
            if len(members) <= MAX_BUCKET:
                pairs.update((i, j) for n, i in enumerate(members) for j in members[n + 1 :])
            else:
                pairs.update((members[0], j) for j in members[1:])
                pairs.update(itertools.pairwise(members))
    return sorted(pairs)


class DisjointSets:
    """Union-find over integers with path halving; a set is named by its least member."""

    def __init__(self, count: int):
        self.parent = list(range(count))

    def find(self, i: int) -> int:
        """Returns the least member of the set of i."""
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def union(self, i: int, j: int) -> None:
        """Joins the sets of i and j."""
        low, high = sorted((self.find(i), self.find(j)))
        self.parent[high] = low


def clusters(
    sets: Sequence[Shingles],
    threshold: float,
    *,
    seed: int = 1,
    backend: str = "rensa",
) -> list[int]:
    """Returns for every document the least index that pairs >= threshold join it to."""
    joined = DisjointSets(len(sets))
    filled = [i for i, s in enumerate(sets) if len(s)]
    signs = signatures([sets[i] for i in filled], seed=seed, backend=backend)
    for a, b in candidates(signs, *banding(threshold)):
        i, j = filled[a], filled[b]
        if joined.find(i) != joined.find(j) and jaccard(sets[i], sets[j]) >= threshold:
            joined.union(i, j)
    return [joined.find(i) for i in range(len(sets))]


def find_duplicates(
    texts: Sequence[str],
    *,
    threshold: float = 0.7,
    keep: str = "longest",
    seed: int = 1,
    backend: str = "rensa",
    sets: Sequence[Shingles] | None = None,
) -> list[Dup]:
    """Says for every text whether it stays, and which kept text a removed one repeats.

    A text is removed only if its exact Jaccard similarity to a text that is kept is >= threshold:
    chains a ~ b ~ c do not remove c for a's sake.

    Args:
      keep: of a cluster, the `longest` text or the `first` one; ties go to the first.
      sets: the texts' shingles, when they are already there.
    """
    if not 0 < threshold <= 1:
        raise UserError(f"the Jaccard threshold {threshold} must lie in 0 < x <= 1.")
    if keep not in KEEP:
        raise UserError(f"no keep policy {keep!r}: legal are {', '.join(KEEP)}.")
    sets = [shingles(t) for t in texts] if sets is None else sets
    plain = [" ".join(t.split()) for t in texts]
    labels = _join_equal(clusters(sets, threshold, seed=seed, backend=backend), plain)
    members: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        members.setdefault(label, []).append(i)
    out: dict[int, Dup] = {}
    for label, group in members.items():
        order = sorted(group, key=lambda i: (-len(texts[i]), i)) if keep == "longest" else group
        kept: list[int] = []
        for i in order:
            near = [(_similarity(plain, sets, i, k), -k) for k in kept]
            score, of = max(near, default=(0.0, 0))
            stays = score < threshold
            if stays:
                kept.append(i)
            of, score = (i, 1.0) if stays else (-of, score)
            out[i] = Dup(label, len(group), stays, of, score, not stays and plain[i] == plain[of])
    return [out[i] for i in range(len(texts))]


def split_groups(
    sets: Sequence[Shingles], threshold: float, *, seed: int = 1, backend: str = "rensa"
) -> list[int]:
    """Groups documents that must not be divided between training and held-out text.

    Looser than deduplication: two that share half of their text may both be worth training on, but
    one of them in the held-out part would make its score a memory test.
    """
    return clusters(sets, threshold, seed=seed, backend=backend)


def _join_equal(labels: list[int], plain: list[str]) -> list[int]:
    """Joins the clusters of equal texts (also of those too short to have shingles)."""
    joined, first = DisjointSets(len(labels)), {}
    for i, (label, text) in enumerate(zip(labels, plain)):
        joined.union(i, label)
        joined.union(i, first.setdefault(text, i))
    return [joined.find(i) for i in range(len(labels))]


def _similarity(plain: list[str], sets: Sequence[Shingles], i: int, j: int) -> float:
    if plain[i] == plain[j]:
        return 1.0
    return jaccard(sets[i], sets[j]) if len(sets[i]) and len(sets[j]) else 0.0


def _mix(x: UInt64[np.ndarray, "S"]) -> UInt64[np.ndarray, "S"]:
    """The finaliser of splitmix64: polynomial sums become uniform bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def estimate(signs: UInt32[np.ndarray, "N P"]) -> Float[np.ndarray, "N N"]:
    """Returns the Jaccard similarity that signatures estimate for all pairs (small N)."""
    return (signs[:, None, :] == signs[None, :, :]).mean(axis=-1)
