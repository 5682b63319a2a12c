"""Closed forms equal SciPy's; intervals cover what they promise."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from internjax.evals.stats import (
    mcnemar_exact,
    mean_stderr,
    paired_bootstrap,
    ratio_stderr,
    wilson_interval,
)


def test_stderr_is_that_of_the_harness():
    """Sample deviation (n - 1) over root n: for 3 right of 4, sqrt(0.25 / 4)."""
    values = np.array([1.0, 1.0, 1.0, 0.0])
    assert mean_stderr(values) == pytest.approx(math.sqrt(0.25 / 4), abs=1e-15)
    assert mean_stderr(values) == pytest.approx(scipy_stats.sem(values), abs=1e-15)
    assert math.isnan(mean_stderr(np.array([1.0])))


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 40), (1, 40), (20, 40), (40, 40), (913, 1319)])
def test_wilson_equals_scipy(k, n):
    ours = wilson_interval(k, n)
    theirs = scipy_stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(-1, 4), (5, 4), (0, 0)])
def test_wilson_refuses_what_is_no_share(k, n):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(k, n)


@pytest.mark.parametrize(
    ("wins", "losses"), [(0, 0), (1, 0), (0, 6), (5, 5), (3, 12), (40, 71), (500, 430)]
)
def test_mcnemar_equals_the_exact_binomial_test(wins, losses):
    n = wins + losses
    theirs = scipy_stats.binomtest(wins, n, 0.5).pvalue if n else 1.0
    assert mcnemar_exact(wins, losses) == pytest.approx(theirs, rel=1e-10)


def test_bootstrap_is_paired():
    """Two noisy series with a constant gap: unpaired noise would swamp it, paired it is exact."""
    noise = np.random.default_rng(0).normal(0, 10, 200)
    assert paired_bootstrap(noise, noise + 0.5) == pytest.approx((0.5, 0.5), abs=1e-9)


def test_bootstrap_interval_matches_the_normal_one():
    rng = np.random.default_rng(1)
    before, after = rng.normal(0, 1, 400), rng.normal(0.2, 1, 400)
    low, high = paired_bootstrap(before, after, draws=4000)
    stderr = mean_stderr(after - before)
    mean = (after - before).mean()
    assert (low, high) == pytest.approx((mean - 1.96 * stderr, mean + 1.96 * stderr), abs=0.02)


def test_weighted_bootstrap_is_of_the_ratio():
    """One nat more a byte in every document is a change of 1, however they differ in size."""
    sizes = np.array([1.0, 10.0, 100.0])
    low, high = paired_bootstrap(sizes * 2, sizes * 3, weights=sizes)
    assert (low, high) == pytest.approx((1.0, 1.0), abs=1e-12)


def test_ratio_stderr_agrees_with_resampling():
    rng = np.random.default_rng(2)
    sizes = rng.uniform(50, 500, 300)
    nats = sizes * rng.normal(1.0, 0.1, 300)
    picks = rng.integers(0, 300, (4000, 300))
    resampled = np.std(nats[picks].sum(1) / sizes[picks].sum(1))
    assert ratio_stderr(nats, sizes) == pytest.approx(resampled, rel=0.05)
