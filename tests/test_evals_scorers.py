"""Scorers against cases worked by hand from the harness's definitions."""

import math

import pytest

from internjax.errors import UserError
from internjax.evals.core import Row, Sample, Task
from internjax.evals.scorers import (
    choice_values,
    contains,
    exact_match,
    last_number,
    regex,
    row_values,
    scores_of,
)


def _task(**changes) -> Task:
    plain = {
        "name": "t",
        "dimension": "reasoning",
        "kind": "generate",
        "ask": {},
        "metrics": ("exact_match",),
        "source": ("package", "t.jsonl"),
    }
    return Task(**(plain | changes))


def test_norm_divides_by_characters_and_bytes_by_utf8():
    """Total prefers the short choice, per character the long, per byte the Chinese one (3 a char).

    -4/2 = -2.0, -7/4 = -1.75 a character; -4/6 = -0.67, -7/4 = -1.75 a byte.
    """
    values = choice_values([-4.0, -7.0], ["中文", "abcd"], 1)
    assert (values["acc"], values["acc_norm"], values["acc_bytes"]) == (0.0, 1.0, 0.0)
    assert values["margin"] == pytest.approx(-1.75 + 2.0)


def test_a_tie_goes_to_the_first():
    assert choice_values([-1.0, -1.0], ["aa", "bb"], 0)["acc"] == 1.0
    assert choice_values([-1.0, -1.0], ["aa", "bb"], 1)["acc"] == 0.0


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("so she pays $1,080.", "1080", 1),
        ("First 3, then 12 apples. The answer is 18.00", "18", 1),
        ("= -7", "7", 0),
        ("-7", "-7.0", 1),
        ("The answer is 5 dollars and 50 cents", "5", 0),
        ("no idea", "5", 0),
        ("", "5", 0),
        ("half is .5", "0.5", 1),
        ("it is 3.", "3", 1),
    ],
)
def test_last_number_compares_numbers(answer, target, right):
    assert last_number(answer, target, {}) == right


def test_exact_match_cleans_as_the_task_says():
    assert exact_match("Paris", "paris", {}) == 0
    assert exact_match("Paris.", "paris", {"ignore_case": True, "ignore_punctuation": True}) == 1
    assert exact_match("$12", "12", {"regexes_to_ignore": [r"\$"]}) == 1


def test_contains_wants_whole_words():
    assert contains("It is Rome, of course", "rome", {}) == 1
    assert contains("It is Romeo", "rome", {}) == 0
    assert regex("It is Romeo", r"rome\w", {}) == 1


def test_filters_extract_before_matching():
    """Two filters of one metric give two columns, named as the harness names them."""
    pick = {"function": "regex", "regex_pattern": r"(-?[0-9]+)", "group_select": -1}
    strict = {"function": "regex", "regex_pattern": r"#### (-?[0-9]+)"}
    ask = {
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [{"name": "last", "filter": [pick]}, {"name": "strict", "filter": [strict]}],
    }
    sample = Sample("1", "q", "18")
    values = row_values(_task(ask=ask), sample, {"text": "16 + 2 = 18"})
    assert values == {"exact_match,last": 1.0, "exact_match,strict": 0.0}


def test_unknown_metric_names_the_legal_ones():
    with pytest.raises(UserError, match="exact_match, last_number"):
        row_values(_task(metrics=("bleu",)), Sample("1", "q", "a"), {"text": "a"})


def test_bits_per_byte_weighs_by_length():
    """Documents of 1 and 3 bytes, 2 and 3 bits: 5 bits over 4 bytes, not the mean of ratios."""
    task = _task(kind="rolling", metrics=("bits_per_byte",))
    rows = []
    for text, bits in (("a", 2), ("bcd", 3)):
        values = row_values(task, Sample(text, text, ""), {"loglik": -bits * math.log(2)})
        rows.append(Row("t", "v", text, {}, values))
    (score,) = scores_of(task, [], rows)
    assert score.value == pytest.approx(5 / 4, abs=1e-12)
    assert (score.baseline, score.higher_is_better, score.n) == (8.0, False, 2)


def test_guessing_baseline_follows_the_choices():
    task = _task(kind="choice", metrics=("acc",))
    samples = [Sample("1", "q", 0, ("a", "b")), Sample("2", "q", 0, ("a", "b", "c", "d"))]
    rows = [
        Row("t", "v", s.id, {}, choice_values([-1.0] * len(s.choices), s.choices, 0))
        for s in samples
    ]
    (score,) = scores_of(task, samples, rows)
    assert score.baseline == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert score.value == 1.0 and score.high == 1.0 and 0.3 < score.low < 0.4  # Wilson, 2 of 2
