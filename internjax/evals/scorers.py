"""Judgement: from a raw response to values per sample, and from values to one score.

Definitions are those of lm-evaluation-harness where it has them (`acc`, `acc_norm`, `acc_bytes`,
`exact_match`, `bits_per_byte`); every one is a plain function, chosen by name from a dict.
"""

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from internjax.errors import UserError
from internjax.evals.core import Row, Sample, Score, Task
from internjax.evals.identity import identity_value
from internjax.evals.stats import Z95, mean_stderr, ratio_stderr, wilson_interval

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
BITS_OF_A_BYTE = 8.0
"""Bits per byte of a model that knows nothing: all 256 bytes alike."""


# ------------------------------------------------------------------------------------ choices


def choice_values(logliks: Sequence[float], choices: Sequence[str], gold: int) -> dict[str, float]:
    """Whether the gold choice has the highest log-likelihood: in all, per character, per byte.

    Lengths are of the choice's text without its delimiter, in characters (acc_norm) and UTF-8 bytes
    (acc_bytes: they differ in Chinese); a tie goes to the first. `margin` is how far the gold one
    lies above its best rival, nats a character: it moves before accuracy does.
    """
    total = np.asarray(logliks, dtype=np.float64)
    per_char = total / [max(len(choice), 1) for choice in choices]
    per_byte = total / [max(len(choice.encode()), 1) for choice in choices]
    rivals = np.delete(per_char, gold)
    return {
        "acc": float(np.argmax(total) == gold),
        "acc_norm": float(np.argmax(per_char) == gold),
        "acc_bytes": float(np.argmax(per_byte) == gold),
        "margin": float(per_char[gold] - rivals.max()) if len(rivals) else 0.0,
    }


# ----------------------------------------------------------------------------------- generation


def exact_match(answer: str, target: str, options: Mapping[str, Any]) -> float:
    """Equality after the clean-up the task file asks for (the harness's exact_match)."""
    for pattern in options.get("regexes_to_ignore", ()):
        answer, target = re.sub(pattern, "", answer), re.sub(pattern, "", target)
    if options.get("ignore_case"):
        answer, target = answer.lower(), target.lower()
    if options.get("ignore_punctuation"):
        drop = str.maketrans("", "", string.punctuation)
        answer, target = answer.translate(drop), target.translate(drop)
    if options.get("ignore_numbers"):
        drop = str.maketrans("", "", string.digits)
        answer, target = answer.translate(drop), target.translate(drop)
    return float(answer == target)


def last_number(answer: str, target: str, options: Mapping[str, Any]) -> float:
    """Whether the last number of the answer equals the last of the target, as numbers.

    `1,080.00`, `$1080` and `1080.` are one number; the harness compares the strings.
    """
    return float(_last(answer) is not None and _last(answer) == _last(target))


def _last(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def contains(answer: str, target: str, options: Mapping[str, Any]) -> float:
    """Whether the target stands in the answer as whole words, in any case."""
    return float(re.search(rf"(?<!\w){re.escape(target)}(?!\w)", answer, re.IGNORECASE) is not None)


def regex(answer: str, target: str, options: Mapping[str, Any]) -> float:
    """Whether the target, a pattern, is found in the answer."""
    return float(re.search(target, answer, re.IGNORECASE) is not None)


TEXT_SCORERS: dict[str, Callable[[str, str, Mapping[str, Any]], float]] = {
    "exact_match": exact_match,
    "last_number": last_number,
    "contains": contains,
    "regex": regex,
}


def _filtered(answer: str, steps: Sequence[Mapping[str, Any]]) -> str:
    """Answer extraction by the harness's filter functions."""
    for step in steps:
        match step["function"]:
            case "regex":
                answer = _extract(answer, step)
            case "lowercase":
                answer = answer.lower()
            case "remove_whitespace":
                answer = answer.strip()
            case "take_first":  # of repeated answers; there is one
                pass
            case name:
                raise UserError(
                    f"Filter {name!r}: regex, lowercase, remove_whitespace, take_first."
                )
    return answer


def _extract(answer: str, step: Mapping[str, Any]) -> str:
    found = re.findall(step["regex_pattern"], answer)
    if not found:
        return step.get("fallback", "[invalid]")
    picked = found[step.get("group_select", 0)]
    groups = picked if isinstance(picked, tuple) else (picked,)
    return next((group for group in groups if group), step.get("fallback", "[invalid]")).strip()


def _text_values(task: Task, sample: Sample, answer: str) -> dict[str, float]:
    options = {entry["metric"]: entry for entry in task.ask.get("metric_list", [])}
    values = {}
    for name in task.metrics:
        if name == "identity":
            values[name] = identity_value(answer, sample.meta["aspect"], task.options)
            continue
        if name not in TEXT_SCORERS:
            raise UserError(f"Metric {name!r}: a generate task has {', '.join(TEXT_SCORERS)}.")
        filters = task.ask.get("filter_list") if name in options else None
        for chain in filters or [{"name": "", "filter": []}]:
            column = name if not filters else f"{name},{chain['name']}"
            text = _filtered(answer, chain["filter"])
            values[column] = TEXT_SCORERS[name](text, str(sample.target), options.get(name, {}))
    return values


# ------------------------------------------------------------------------- rows and scores


def row_values(task: Task, sample: Sample, response: Mapping[str, Any]) -> dict[str, float]:
    """Values of one answered sample, by metric."""
    if task.kind == "choice":
        return choice_values(response["loglik"], sample.choices, int(sample.target))
    if task.kind == "rolling":
        text = str(sample.input)
        sizes = {"bytes": float(len(text.encode())), "words": float(len(text.split()))}
        return {"nats": -response["loglik"]} | sizes
    return _text_values(task, sample, response["text"])


def scores_of(task: Task, samples: Sequence[Sample], rows: Sequence[Row]) -> list[Score]:
    """Every score of a task over its answered rows, the headline first."""
    if task.kind == "rolling":
        return [_bits_per_byte(task, rows)]
    chance = task.baseline
    if chance is None:
        chance = _guessing(samples) if task.kind == "choice" else 0.0
    names = dict.fromkeys(task.metrics) if task.kind == "choice" else dict.fromkeys(rows[0].values)
    return [_mean_score(task, name, rows, chance) for name in names]


def _guessing(samples: Sequence[Sample]) -> float:
    return float(np.mean([1 / len(sample.choices) for sample in samples]))


def _mean_score(task: Task, name: str, rows: Sequence[Row], baseline: float) -> Score:
    if name not in rows[0].values:
        raise UserError(
            f"Task {task.name}: no metric {name!r}; rows hold {', '.join(rows[0].values)}."
        )
    values = np.asarray([row.values[name] for row in rows])
    mean, stderr = float(values.mean()), mean_stderr(values)
    low, high = mean - Z95 * stderr, mean + Z95 * stderr
    if set(values.tolist()) <= {0.0, 1.0}:
        low, high = wilson_interval(int(values.sum()), len(values))
    baseline = 0.0 if name == "margin" else baseline
    return _score(task, name, (mean, stderr, low, high), baseline, len(values))


def _bits_per_byte(task: Task, rows: Sequence[Row]) -> Score:
    nats = np.asarray([row.values["nats"] for row in rows]) / math.log(2)
    sizes = np.asarray([row.values["bytes"] for row in rows])
    value, stderr = float(nats.sum() / sizes.sum()), ratio_stderr(nats, sizes)
    interval = (value, stderr, value - Z95 * stderr, value + Z95 * stderr)
    return _score(task, "bits_per_byte", interval, BITS_OF_A_BYTE, len(rows), higher=False)


def _score(task, metric, figures, baseline, n, *, higher=True) -> Score:
    value, stderr, low, high = figures
    return Score(
        task=task.name,
        metric=metric,
        value=value,
        stderr=stderr,
        low=low,
        high=high,
        baseline=baseline,
        n=n,
        version=task.version,
        dimension=task.dimension,
        higher_is_better=higher,
    )
