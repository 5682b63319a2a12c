"""Our scores equal those of lm-evaluation-harness on the same task files and log-likelihoods.

The goldens are the output of `tests/reference/harness_scores.py` (lm-eval 0.4.13, bigram model).
"""

import json
from pathlib import Path

import pytest

from internjax.evals.run import evaluate
from tests.ngram_lm import BigramLM

GOLDENS = json.loads(
    (Path(__file__).parent / "goldens" / "harness_scores.json").read_text(encoding="utf-8")
)
SHIPPED = ("retention_choices", "retention_text")


def _check(name: str) -> None:
    results = evaluate(BigramLM(), [name])
    for metric, (value, stderr) in GOLDENS[name].items():
        score = results.score(name, metric)
        assert score.value == pytest.approx(value, abs=1e-9), metric
        if stderr != "N/A" and metric != "bits_per_byte":  # theirs is a bootstrap there
            assert score.stderr == pytest.approx(stderr, abs=1e-9), metric


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_tasks_equal_the_harness(name):
    _check(name)


@pytest.mark.needs_mirror
@pytest.mark.parametrize("name", ["copa", "openbookqa", "piqa", "winogrande", "siqa"])
def test_real_sets_equal_the_harness(name, mirror, tmp_path, monkeypatch):
    """boolq and hellaswag agree too; they are left out for their length."""
    monkeypatch.setenv("INTERNJAX_CACHE", str(tmp_path))
    _check(name)
