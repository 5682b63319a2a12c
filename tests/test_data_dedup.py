"""Duplicates: exact Jaccard decides, both signature makers agree, no kept document is lost."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from internjax.data import dedup
from internjax.data.dedup import (
    BANDS,
    ROWS,
    DisjointSets,
    banding,
    candidates,
    clusters,
    estimate,
    find_duplicates,
    jaccard,
    normalize,
    shingles,
    signatures,
)
from internjax.errors import UserError


def sets_of(similarity: float, size: int, rng: np.random.Generator) -> tuple:
    """Two sets of `size` hashes whose Jaccard similarity is known: 2 shared / (1 + ...)."""
    shared = round(2 * size * similarity / (1 + similarity))
    values = rng.integers(0, 2**64, 2 * size - shared, dtype=np.uint64)
    return np.sort(values[:size]), np.sort(np.concatenate([values[:shared], values[size:]]))


def story(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices("abcdefgh", k=6)) for _ in range(count)]


def change(words: list[str], every: int) -> list[str]:
    """Replaces every n-th word by a new one."""
    return [f"new{i}" if i % every == every // 2 else w for i, w in enumerate(words)]


# --- the known-Jaccard oracle ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["rensa", "numpy"])
@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.7, 0.9])
def test_signatures_estimate_a_known_similarity(backend: str, similarity: float):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(40):
        a, b = sets_of(similarity, 500, rng)
        assert jaccard(a, b) == pytest.approx(similarity, abs=2e-3)
        found.append(estimate(signatures([a, b], backend=backend))[0, 1])
    # The mean of 40 estimates of 112 trials each: sd = sqrt(J (1 - J) / 4480) < .0075; 4 sd.
    assert np.mean(found) == pytest.approx(similarity, abs=0.03)


def test_known_answers_of_rensa():
    """Signatures are stored beside corpora: another version of rensa may not change them."""
    sets = [np.arange(1, 6, dtype=np.uint64), np.array([2**63, 2**64 - 1], dtype=np.uint64)]
    found = signatures(sets, seed=1)
    assert found.shape == (2, 112) and found.dtype == np.uint32
    assert found[:, :3].tolist() == [
        [3264571612, 3592674595, 3354837172],
        [3828416598, 3992459614, 3645300216],
    ]


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.7, 0.8, 0.9])
def test_candidates_follow_the_s_curve(similarity: float):
    rng = np.random.default_rng(1)
    pairs = [sets_of(similarity, 300, rng) for _ in range(150)]
    signs = signatures([s for pair in pairs for s in pair])
    found = set(candidates(signs, BANDS, ROWS))
    share = np.mean([(2 * i, 2 * i + 1) in found for i in range(len(pairs))])
    expected = 1 - (1 - similarity**ROWS) ** BANDS
    # binomial, 150 trials: sd <= .041; 4 sd
    assert share == pytest.approx(expected, abs=0.165)


def test_rensa_and_the_oracle_decide_alike():
    """Away from the threshold both find every pair; near it verification decides, not luck."""
    rng = random.Random(2)
    texts = []
    for i in range(40):
        words = story(rng, 200)
        texts.append(" ".join(words))
        if i % 2:
            texts.append(" ".join(change(words, 60)))  # J ~ .85
        if i % 3 == 0:
            texts.append(" ".join(change(words, 12)))  # J ~ .4: never a duplicate at .7
    a, b = (find_duplicates(texts, backend=backend) for backend in ("rensa", "numpy"))
    assert a == b
    assert sum(not d.kept for d in a) == 20
    truth = [jaccard(shingles(x), shingles(y)) for x, y in itertools.pairwise(texts)]
    assert sum(j >= 0.7 for j in truth) == 20, "the oracle set is what it says"


# --- decisions ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["longest", "first"]))
def test_every_removal_is_verified_against_a_kept_document(seed: int, keep: str):
    rng = random.Random(seed)
    base = story(rng, 80)
    texts = [" ".join(change(base, rng.choice([11, 25, 40, 90]))) for _ in range(8)]
    texts += [rng.choice(texts) for _ in range(3)] + [" ".join(story(rng, 80))]
    found = find_duplicates(texts, keep=keep)
    for i, dup in enumerate(found):
        assert found[dup.of].kept
        similarity = jaccard(shingles(texts[i]), shingles(texts[dup.of]))
        assert dup.jaccard == pytest.approx(similarity) and (dup.kept or similarity >= 0.7)
        assert dup.exact == (not dup.kept and texts[i] == texts[dup.of])


def test_a_chain_does_not_remove_what_is_far_from_the_kept():
    words = story(random.Random(3), 300)
    chain = [list(words)]
    for step in range(4):
        chain.append(
            [f"s{step}" if 60 * step <= i < 60 * step + 25 else w for i, w in enumerate(chain[-1])]
        )
    found = find_duplicates([" ".join(c) for c in chain], threshold=0.8, keep="first")
    assert len({d.cluster for d in found}) == 1, "the links join all of them"
    assert sum(d.kept for d in found) > 1, "the ends are too far apart for one to stand for all"


def test_keep_policies_and_cluster_sizes():
    text = " ".join(story(random.Random(4), 100))
    texts = [text, text + " and a longer end of it", text, "", "", "other text"]
    longest, first = (find_duplicates(texts, keep=k) for k in ("longest", "first"))
    assert [d.kept for d in longest] == [False, True, False, True, False, True]
    assert [d.kept for d in first] == [True, False, False, True, False, True]
    assert [d.size for d in first] == [3, 3, 3, 2, 2, 1]
    assert [d.exact for d in first] == [False, False, True, False, True, False]


def test_short_texts_are_duplicates_only_when_equal():
    kept = [d.kept for d in find_duplicates(["one two", "one two", "one three", "二 三", "二 四"])]
    assert kept == [True, False, True, True, True]


def test_boilerplate_in_a_large_bucket_stays_linear():
    rng = random.Random(5)
    same = np.tile(signatures([shingles(" ".join(story(rng, 50)))]), (500, 1))
    assert len(candidates(same, BANDS, ROWS)) < 2 * 500
    texts = ["the same " + " ".join(["page of the site"] * 20)] * 300
    assert sum(d.kept for d in find_duplicates(texts)) == 1


# --- parts ----------------------------------------------------------------------------------------


def test_normalisation_and_shingles():
    assert normalize("Çà et là, 1984_x!").split() == ["ca", "et", "la", "0000", "x"]
    assert len(shingles("灯塔立在北边的悬崖")) == 9 - 5 + 1, "Han characters are words"
    assert len(shingles("one two three")) == 1 and len(shingles("?!")) == 0
    assert np.array_equal(shingles("A b, c d e."), shingles("a B c D (e)"))
    assert not np.intersect1d(shingles("a b c d e"), shingles("e d c b a")).size, "order matters"
    assert len(shingles("word " * 10**6)) == 1


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
def test_jaccard_is_that_of_sets(a: set, b: set):
    x, y = (np.array(sorted(s), dtype=np.uint64) for s in (a, b))
    assert jaccard(x, y) == (len(a & b) / len(a | b) if a | b else 1.0)


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19))))
def test_disjoint_sets_are_the_connected_components(edges: list):
    joined, label = DisjointSets(20), list(range(20))
    for i, j in edges:
        joined.union(i, j)
        low, high = sorted((label[i], label[j]))
        label = [low if x == high else x for x in label]
    assert [joined.find(i) for i in range(20)] == label


def test_banding_is_as_selective_as_the_threshold_allows():
    assert banding(0.7) == banding(0.95) == (BANDS, ROWS)
    for threshold in (0.2, 0.3, 0.5, 0.6):
        bands, rows = banding(threshold)
        assert bands * rows <= dedup.NUM_PERM
        assert 1 - (1 - threshold**rows) ** bands >= 0.9


def test_clusters_are_named_by_their_first_document():
    rng = np.random.default_rng(6)
    a, b = sets_of(0.9, 200, rng)
    assert clusters([a, b, rng.integers(0, 2**64, 50, dtype=np.uint64)], 0.7) == [0, 0, 2]


@pytest.mark.parametrize(
    "wrong", [{"threshold": 0.0}, {"threshold": 1.1}, {"keep": "best"}, {"backend": "datasketch"}]
)
def test_wrong_settings_are_named(wrong: dict):
    with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
        find_duplicates(["a b c d e f"], **wrong)
