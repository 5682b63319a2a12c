"""Uncertainty of scores: standard errors, intervals and paired tests, in NumPy and exact integers.

Knows nothing of tasks or models. Formulas are checked against SciPy in the tests.
"""

import math

import numpy as np
from jaxtyping import Float, Int

Z95 = 1.959963984540054
"""Two-sided 95% point of the standard normal distribution."""


def mean_stderr(values: Float[np.ndarray, "n"]) -> float:
    """Standard error of a mean: sample standard deviation (n - 1) over root n; NaN for one value.

    The definition of lm-evaluation-harness, so that both print the same figure.
    """
    n = len(values)
    return float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def ratio_stderr(numerator: Float[np.ndarray, "n"], denominator: Float[np.ndarray, "n"]) -> float:
    """Standard error of sum(numerator) / sum(denominator) by linearisation (the delta method).

    For bits per byte, where documents are the sampled units and long ones weigh more.
    """
    ratio = numerator.sum() / denominator.sum()
    return mean_stderr((numerator - ratio * denominator) / denominator.mean())


def wilson_interval(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; stays inside [0, 1], sensible at 0 and n too."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"successes={successes} of n={n}: want 0 <= successes <= n and n >= 1.")
    share = successes / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided p-value of McNemar's exact test: is a changed answer as likely a win as a loss?

    Args:
        wins: pairs wrong before and right after.
        losses: pairs right before and wrong after.
    """
    changed = wins + losses
    tail = sum(math.comb(changed, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**changed)


def paired_bootstrap(
    before: Float[np.ndarray, "n"],
    after: Float[np.ndarray, "n"],
    *,
    weights: Float[np.ndarray, "n"] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """95% percentile interval of (after - before), the same samples being drawn for both.

    Args:
        weights: with weights the statistic is sum(values) / sum(weights), such as bits per byte;
            without, the mean.
    """
    picks = _draws(len(before), draws, seed)
    scale = np.ones_like(before) if weights is None else weights
    difference = (after - before)[picks].sum(axis=1) / scale[picks].sum(axis=1)
    low, high = np.quantile(difference, [0.025, 0.975])
    return float(low), float(high)


def _draws(n: int, draws: int, seed: int) -> Int[np.ndarray, "draws n"]:
    return np.random.default_rng(seed).integers(0, n, size=(draws, n))
