"""The sampler against definitions written apart in NumPy, and its independence of other rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from internjax.models.lm import SamplingParams
from internjax.serve.bans import ALWAYS, ban_row
from internjax.serve.sampling import (
    advance,
    first_max,
    init_sampling,
    inverse_cdf,
    keep_top_k,
    keep_top_p,
    keep_typical,
    sample,
    scalars,
)

V = 96
sample_jit, top_k_jit, top_p_jit = jax.jit(sample), jax.jit(keep_top_k), jax.jit(keep_top_p)
typical_jit, advance_jit = jax.jit(keep_typical), jax.jit(advance)


def state_of(rows, **tables):
    """Builds the state of one slot a `SamplingParams`."""
    columns = [scalars(p, p.seed or 0) for p in rows]
    fields = {name: jnp.asarray(np.stack([c[name] for c in columns])) for name in columns[0]}
    return init_sampling(len(rows), V).replace(**fields, **tables)


def choose(logits, rows, position=0, mask=None, masked=None, **tables):
    S = logits.shape[0]
    mask = jnp.zeros((S, V // 32), jnp.uint32) if mask is None else mask
    masked = jnp.zeros(S, bool) if masked is None else masked
    return sample_jit(
        jnp.asarray(logits),
        state_of(rows, **tables),
        jnp.arange(S),
        jnp.full(S, position),
        mask,
        masked,
    )


def random_logits(seed, rows=1):
    return np.random.default_rng(seed).normal(size=(rows, V)).astype(np.float32) * 3


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, -3.0]), min_size=V, max_size=V))
@settings(deadline=None)
def test_first_max_is_argmax_with_ties(values):
    row = jnp.asarray(values, jnp.float32)[None]
    assert first_max(row)[0] == int(np.argmax(values))


@given(st.integers(0, 10_000), st.integers(1, V))
@settings(max_examples=30, deadline=None)
def test_top_k_keeps_k(seed, k):
    weights = np.exp(random_logits(seed))
    weights /= weights.max()
    kept = np.asarray(top_k_jit(jnp.asarray(weights), jnp.asarray([k])))[0]
    largest = np.argsort(-weights[0])[:k]
    assert set(np.flatnonzero(kept)) == set(largest)


@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
@settings(max_examples=30, deadline=None)
def test_top_p_keeps_the_smallest_sufficient_set(seed, p):
    weights = np.exp(random_logits(seed))
    weights /= weights.max()
    kept = np.flatnonzero(top_p_jit(jnp.asarray(weights), jnp.asarray([p], jnp.float32))[0])
    order = np.argsort(-weights[0])
    mass = np.cumsum(weights[0][order].astype(np.float64)) / weights.sum(dtype=np.float64)
    size = int(np.searchsorted(mass, p)) + 1
    # float32 sums may put the border one token aside when the mass lands on it.
    assert abs(len(kept) - size) <= (np.abs(mass - p).min() < 1e-5)
    assert set(kept) == set(order[: len(kept)])


def typical_set(probs, p):
    """Locally typical sampling by its definition: sort by |-log p - H|, take until the mass."""
    surprise = -np.log(probs)
    distance = np.abs(surprise - (probs * surprise).sum())
    order = np.argsort(distance)
    mass = np.cumsum(probs[order])
    return order[: int(np.searchsorted(mass, p)) + 1], np.abs(mass - p).min()


@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
@settings(max_examples=30, deadline=None)
def test_typical_keeps_the_tokens_of_expected_surprise(seed, p):
    logits = random_logits(seed).astype(np.float64)[0]
    probs = np.exp(logits - logits.max())
    weights = jnp.asarray(probs, jnp.float32)[None]
    kept = set(np.flatnonzero(typical_jit(weights, jnp.asarray([p], jnp.float32))[0]))
    expected, margin = typical_set(probs / probs.sum(), p)
    # float32 sums may put the border one token aside when the mass lands on it.
    assert len(kept ^ set(expected)) <= (margin < 1e-5)


def kept_by(name, probs):
    """The exact distribution that one truncation of 0.6 (or of 5 tokens) leaves."""
    order = np.argsort(-probs)
    if name == "top_k":
        keep = order[:5]
    elif name == "min_p":
        keep = np.flatnonzero(probs >= 0.6 * probs.max())
    elif name == "top_p":
        keep = order[: int(np.searchsorted(np.cumsum(probs[order]), 0.6)) + 1]
    elif name == "typical_p":
        keep = typical_set(probs, 0.6)[0]
    else:
        keep = order
    left = np.zeros_like(probs)
    left[keep] = probs[keep]
    return left / left.sum()


@pytest.mark.parametrize("name", ["temperature", "top_k", "min_p", "top_p", "typical_p"])
def test_draws_of_each_truncation_follow_the_exact_distribution(name):
    value = {"top_k": 5, "temperature": 0.7}.get(name, 0.6)
    row = np.full(V, -40.0)
    row[::8] = np.random.default_rng(4).normal(size=V // 8)
    temperature = 0.7 if name == "temperature" else 1.0
    probs = np.exp(row / temperature)
    expected = kept_by(name, probs / probs.sum())
    rows = [SamplingParams(**{"temperature": 1.0, name: value, "seed": i}) for i in range(512)]
    logits = np.repeat(row[None].astype(np.float32), 512, axis=0)
    draws = np.concatenate([choose(logits, rows, position=t).token for t in range(8)])
    counts = np.bincount(draws, minlength=V)
    inside = expected > 1e-6
    assert counts[~inside].sum() == 0
    wanted = draws.size * expected[inside]
    # 11 degrees of freedom at most: 31.3 is passed by one run in a thousand; seeds are fixed
    assert ((counts[inside] - wanted) ** 2 / wanted).sum() < 31.3


def test_bans_exclude_a_token_after_its_head_until_their_time():
    bans = [((5,), ALWAYS), ((1, 2, 3), ALWAYS), ((7,), 4), ((2, 3), 0)]
    tables = {k: jnp.asarray(x)[None] for k, x in ban_row(bans).items()}
    logits = np.full((1, V), -9.0, np.float32)
    logits[0, [5, 3, 7, 9]] = [4, 3, 2, 1]

    def best(position, *said):
        state = tables | {"recent": jnp.asarray(ban_row(bans, said)["recent"])[None]}
        return int(choose(logits, [SamplingParams()], position=position, **state).token[0])

    assert best(0) == 3
    assert best(0, 2, 1) == best(0, 2) == best(0, 1, 2, 0) == 3
    assert best(0, 1, 2) == best(3, 9, 9, 1, 2) == 9
    assert best(4, 1, 2) == 7


def test_nothing_left_is_flagged_in_its_row_only():
    tables = [ban_row([((5,), ALWAYS)]), ban_row([])]
    state = {k: jnp.asarray(np.stack([t[k] for t in tables])) for k in tables[0]}
    mask = np.zeros((2, V // 32), np.uint32)
    mask[:, 0] = 1 << 5
    for params in (SamplingParams(), SamplingParams(temperature=1.0, seed=1)):
        out = choose(
            random_logits(5, rows=2), [params] * 2, mask=jnp.asarray(mask),
            masked=jnp.ones(2, bool), **state,
        )  # fmt: skip
        assert out.allowed.tolist() == [False, True]
        assert out.token[1] == 5


def test_only_active_rows_are_booked():
    state = state_of([SamplingParams()] * 2)
    for token in (4, 6):
        chosen, active = jnp.asarray([token, token]), jnp.asarray([True, False])
        state = advance_jit(state, jnp.arange(2), chosen, active)
    assert state.recent[0, -2:].tolist() == [4, 6]
    assert state.recent[1].tolist() == [-1] * 7
    assert np.asarray(state.counts).sum(axis=1).tolist() == [2, 0]


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True, width=32))
@settings(max_examples=50, deadline=None)
def test_inverse_cdf_never_returns_a_forbidden_token(seed, u):
    rng = np.random.default_rng(seed)
    weights = np.where(rng.random((1, V)) < 0.9, 0, rng.random((1, V))).astype(np.float32)
    weights[0, rng.integers(V)] = 1
    assert weights[0, int(inverse_cdf(jnp.asarray(weights), jnp.asarray([u]))[0])] > 0


def test_draws_follow_the_distribution():
    logits = np.full((512, V), -30.0, np.float32)
    logits[:, [3, 70, 95]] = np.log([0.5, 0.3, 0.2])
    rows = [SamplingParams(temperature=1.0, seed=i) for i in range(512)]
    tokens = np.concatenate([choose(logits, rows, position=t).token for t in range(8)])
    counts = np.array([(tokens == t).sum() for t in (3, 70, 95)])
    expected = 4096 * np.array([0.5, 0.3, 0.2])
    assert counts.sum() == 4096
    # chi-square with 2 degrees of freedom: 13.8 is passed by one run in a thousand; seeds are fixed
    assert ((counts - expected) ** 2 / expected).sum() < 13.8


def test_a_row_does_not_depend_on_the_others():
    rich = SamplingParams(
        temperature=0.8, top_p=0.8, top_k=9, min_p=0.01, typical_p=0.7, seed=3, logprobs=2,
        logit_bias={1: 2.0}, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2,
    )  # fmt: skip
    plain, warm = SamplingParams(), SamplingParams(temperature=1.0, seed=9)
    logits = random_logits(0, rows=4)
    none, some = ban_row([]), ban_row([((3,), ALWAYS), ((4,), 9)])
    for row in (plain, warm, rich):
        tables = [
            {k: jnp.asarray(np.stack([b[k] for b in bans])) for k in none}
            for bans in ([none] * 4, [none, some, some, none])
        ]
        alone = choose(logits, [row, plain, plain, plain], **tables[0])
        among = choose(logits, [row, rich, warm, rich], **tables[1])
        assert alone.token[0] == among.token[0]
        assert alone.logprob[0] == among.logprob[0]


def test_penalties_bias_and_mask_by_definition():
    logits = random_logits(1)
    counts = jnp.zeros((1, V), jnp.int32).at[0, 5].set(3)
    in_prompt = jnp.zeros((1, V), bool).at[0, 7].set(True)
    bias = jnp.zeros((1, V)).at[0, 9].set(1.5)
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={9: 1.5}
    )
    expected = logits[0].copy()
    expected[9] += 1.5
    for token in (5, 7):
        expected[token] = expected[token] / 2 if expected[token] > 0 else expected[token] * 2
    expected[5] -= 0.5 + 3 * 0.25
    tables = {"counts": counts, "in_prompt": in_prompt, "bias": bias}
    assert choose(logits, [params], **tables).token[0] == expected.argmax()

    allowed = int(np.argsort(expected)[2])
    mask = np.zeros((1, V // 32), np.uint32)
    mask[0, allowed // 32] = 1 << (allowed % 32)
    out = choose(logits, [params], mask=jnp.asarray(mask), masked=jnp.ones(1, bool), **tables)
    assert out.token[0] == allowed
    # reported log-probabilities are the model's own, whatever was added or forbidden
    log_total = np.log(np.exp(logits[0].astype(np.float64)).sum())
    assert float(out.logprob[0]) == pytest.approx(logits[0, allowed] - log_total, abs=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_logits_are_flagged(bad):
    logits = random_logits(2, rows=2)
    logits[1, 4] = bad
    assert choose(logits, [SamplingParams()] * 2).finite.tolist() == [True, False]
