"""The nouns of evaluation: what is asked (Task, Sample), what came back (Row), what it is worth.

Pure records; `tasks.py` reads them from files, `run.py` asks a model, `scorers.py` judges.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from internjax.errors import Corrupt, Missing, UserError
from internjax.models.lm import Prompt, SamplingParams

KINDS = ("choice", "generate", "rolling")


@dataclass(frozen=True)
class Sample:
    """One question, ready to be asked.

    Attributes:
        id: unique within its task and stable between runs; pairs two models' answers.
        input: the prompt: text, or messages for a chat; the whole text of a rolling sample.
        target: index of the right choice, or the text of the right answer.
        choices: texts of the choices without delimiter (a choice task only).
        pairs: (context, continuation) of each choice, as scored.
        meta: the rest of the row, such as the aspect an identity question asks for.
    """

    id: str
    input: Prompt
    target: int | str
    choices: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A benchmark: where its rows are, how each becomes a prompt, how answers are judged.

    Attributes:
        name: unique; what `tasks=[...]` selects.
        dimension: language, knowledge, understanding, reasoning, exam, safety or identity.
        kind: "choice" (log-likelihoods), "generate" (text) or "rolling" (bits per byte).
        ask: the fields of the task file that make the prompt: all that `version` hashes.
        metrics: names of the scorers; the first is the headline.
        source: ("package" | "catalog", file): shipped rows, or a dataset of the catalogue.
        params: how to sample the answers of a generate task.
        baseline: score of blind guessing; None: computed from the samples.
        tags: groups that also select it.
        options: extra arguments of its scorers, such as the identity to look for.
        version: six hex digits over everything that shapes prompts and judgement.
    """

    name: str
    dimension: str
    kind: str
    ask: Mapping[str, Any]
    metrics: tuple[str, ...]
    source: tuple[str, str]
    params: SamplingParams = field(default_factory=SamplingParams)
    baseline: float | None = None
    tags: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""


@dataclass(frozen=True)
class Row:
    """One answered sample: the raw response and its value for every metric of the task."""

    task: str
    version: str
    id: str
    response: Mapping[str, Any]
    values: Mapping[str, float]


@dataclass(frozen=True)
class Score:
    """One figure with everything needed to doubt it.

    Attributes:
        value: the mean over samples, or bits per byte over all of them.
        stderr: standard error, NaN for a single sample.
        low, high: 95% interval (Wilson for shares of right answers, normal otherwise).
        baseline: the value of guessing blindly.
        n: samples scored.
        higher_is_better: direction of the metric.
    """

    task: str
    metric: str
    value: float
    stderr: float
    low: float
    high: float
    baseline: float
    n: int
    version: str
    dimension: str
    higher_is_better: bool = True


@dataclass(frozen=True)
class Results:
    """Scores of one model with the rows they stand on."""

    model: str
    scores: tuple[Score, ...]
    rows: tuple[Row, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)

    def score(self, task: str, metric: str | None = None) -> Score:
        """The score of `task`; without `metric` its headline, which comes first."""
        found = [s for s in self.scores if s.task == task and metric in (None, s.metric)]
        if not found:
            have = ", ".join(f"{s.task}/{s.metric}" for s in self.scores)
            raise UserError(f"No score {task}/{metric or '*'}: these results hold {have}.")
        return found[0]

    def values(self, task: str, metric: str) -> dict[str, float]:
        """Value of `metric` by sample id."""
        return {row.id: row.values[metric] for row in self.rows if row.task == task}

    def save(self, path: Path) -> None:
        """Writes everything as one JSON file, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(path.name + ".part")
        half.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1), encoding="utf-8")
        half.replace(path)


def load_results(path: Path) -> Results:
    """Reads what `Results.save` wrote.

    Raises:
        Missing: no such file.
        Corrupt: not a results file.
    """
    if not path.is_file():
        raise Missing(f"No results at {path}: run `internjax evaluate` with out={path.parent}.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        scores = tuple(Score(**score) for score in raw["scores"])
        rows = tuple(Row(**row) for row in raw["rows"])
        return Results(raw["model"], scores, rows, raw["seconds"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise Corrupt(
            f"{path} is no results file ({error}): delete it and evaluate again."
        ) from None


class Incomplete(UserError):
    """Some requests failed after every retry: they are named, and `results` holds the others."""

    def __init__(self, failures: list[tuple[str, str, str]], results: Results):
        first = "; ".join(f"{task}/{sample}: {why}" for task, sample, why in failures[:3])
        more = f" and {len(failures) - 3} more" if len(failures) > 3 else ""
        super().__init__(
            f"{len(failures)} of {len(failures) + len(results.rows)} samples got no answer "
            f"({first}{more}). The others are kept: run again with the same out= to ask these."
        )
        self.failures = failures
        self.results = results
