"""Asks a model every sample of some tasks and scores the answers; compares two such results.

Answers are appended to `rows.jsonl` as they come, keyed by a hash of model, task version, sample
and prompt: the file is the cache, the checkpoint to resume from and the evidence, in one.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internjax.errors import Corrupt, UserError
from internjax.evals.core import Incomplete, Results, Row, Sample, Score, Task
from internjax.evals.scorers import row_values, scores_of
from internjax.evals.stats import mcnemar_exact, paired_bootstrap
from internjax.evals.tasks import load_samples, resolve_tasks
from internjax.models.lm import LM, RequestFailed

CHUNK = 64
"""Samples asked in one call: what a crash can lose. The model batches inside a call."""

Progress = Callable[[str, int, int], None]
"""Called with (task, samples done, samples in all)."""


def evaluate(
    lm: LM,
    tasks: Sequence[str | Task],
    *,
    limit: int | Mapping[str, int] | None = None,
    seed: int = 0,
    out: Path | None = None,
    retries: int = 2,
    progress: Progress | None = None,
) -> Results:
    """Scores `lm` on `tasks`.

    Args:
        tasks: names, tags, YAML files or tasks.
        limit: samples a task, or by task name; drawn with `seed`, the same ones for every model.
        out: folder of `rows.jsonl` and `results.json`; None keeps nothing.
        retries: how often a failed request is asked again, alone.

    Raises:
        Incomplete: requests that failed in the end, by name; never scored as wrong.
    """
    found = resolve_tasks(list(tasks))
    store = _Rows(out / "rows.jsonl" if out else None)
    scores: list[Score] = []
    rows: list[Row] = []
    failures: list[tuple[str, str, str]] = []
    seconds: dict[str, float] = {}
    for task in found:
        begun = time.monotonic()
        size = limit.get(task.name) if isinstance(limit, Mapping) else limit
        samples = load_samples(task, size, seed)
        answers, failed = _answers(lm, task, samples, store, retries, progress)
        done = [
            Row(task.name, task.version, s.id, answers[s.id], row_values(task, s, answers[s.id]))
            for s in samples
            if s.id in answers
        ]
        rows += done
        scores += scores_of(task, samples, done) if done else []
        failures += [(task.name, sample, why) for sample, why in failed]
        seconds[task.name] = time.monotonic() - begun
    results = Results(lm.name, tuple(scores), tuple(rows), seconds)
    if failures:
        raise Incomplete(failures, results)
    if out:
        results.save(out / "results.json")
    return results


# -------------------------------------------------------------------------------------- asking


def _answers(
    lm: LM,
    task: Task,
    samples: Sequence[Sample],
    store: "_Rows",
    retries: int,
    progress: Progress | None,
) -> tuple[dict[str, dict], list[tuple[str, str]]]:
    """Responses by sample id, and (sample id, reason) of those that could not be had."""
    keys = {sample.id: request_key(lm.name, task, sample) for sample in samples}
    if len(keys) < len(samples):
        raise Corrupt(f"Task {task.name}: sample ids repeat, so answers could not be told apart.")
    answers = {name: store.found[key] for name, key in keys.items() if key in store.found}
    todo = [sample for sample in samples if sample.id not in answers]
    # Longest first, as the harness does: what does not fit in memory fails at once, not at the end.
    todo.sort(key=lambda sample: (-_size(sample), sample.id))
    failed: list[tuple[str, str]] = []
    for start in range(0, len(todo), CHUNK):
        for sample, response in _ask_chunk(lm, task, todo[start : start + CHUNK], retries):
            if isinstance(response, RequestFailed):
                failed.append((sample.id, str(response)))
                continue
            answers[sample.id] = response
            store.append(keys[sample.id], lm.name, task, sample, response)
        if progress:
            progress(task.name, len(answers) + len(failed), len(samples))
    return answers, failed


def _ask_chunk(
    lm: LM, task: Task, samples: list[Sample], retries: int
) -> Iterator[tuple[Sample, dict | RequestFailed]]:
    """Asks together; if that fails, one by one, so that one bad request costs only itself."""
    try:
        yield from zip(samples, _ask(lm, task, samples), strict=True)
        return
    except RequestFailed as error:
        last = error
    for sample in samples:
        for _ in range(retries):
            try:
                yield sample, _ask(lm, task, [sample])[0]
                break
            except RequestFailed as error:
                last = error
        else:
            yield sample, last


def _ask(lm: LM, task: Task, samples: list[Sample]) -> list[dict[str, Any]]:
    if task.kind == "choice":
        scored = iter(lm.loglikelihood([pair for sample in samples for pair in sample.pairs]))
        return [{"loglik": [next(scored).sum for _ in sample.pairs]} for sample in samples]
    if task.kind == "rolling":
        nats = lm.loglikelihood_rolling([sample.input for sample in samples])
        return [{"loglik": value} for value in nats]
    generations = lm.generate([sample.input for sample in samples], task.params)
    return [{"text": g.text, "finish_reason": g.finish_reason} for g in generations]


def _size(sample: Sample) -> int:
    asked = sample.pairs or [sample.input]
    return max(len(json.dumps(part, ensure_ascii=False)) for part in asked)


def request_key(model: str, task: Task, sample: Sample) -> str:
    """Hash of all that decides a response: model, task version, prompt and sampling."""
    prompt = [sample.id, sample.input, sample.pairs, asdict(task.params)]
    asked = [model, task.name, task.version, prompt]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]


class _Rows:
    """The append-only file of answers. A last line cut short by a crash is dropped on opening."""

    def __init__(self, path: Path | None):
        self.path = path
        self.found: dict[str, dict] = {}
        if path and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.decode("utf-8").split("\n"), 1):
            try:
                row = json.loads(line) if line else None
            except json.JSONDecodeError as error:
                raise Corrupt(
                    f"{path} line {number} is damaged ({error.msg}): delete it."
                ) from None
            if row:
                self.found[row["key"]] = row["response"]

    def append(self, key: str, model: str, task: Task, sample: Sample, response: dict) -> None:
        self.found[key] = response
        if self.path is None:
            return
        row = {
            "key": key,
            "model": model,
            "task": task.name,
            "version": task.version,
            "id": sample.id,
            "input": sample.input,
            "target": sample.target,
            "response": response,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# ----------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Comparison:
    """One metric of two models on the same samples.

    Attributes:
        change: after - before; `low`, `high`: its 95% interval by paired bootstrap.
        wins, losses: samples that turned right, turned wrong (metrics of 0 and 1 only).
        p_value: McNemar's exact test of wins against losses; NaN for other metrics.
    """

    task: str
    metric: str
    before: float
    after: float
    change: float
    low: float
    high: float
    n: int
    wins: int
    losses: int
    p_value: float
    higher_is_better: bool

    @property
    def relative(self) -> float:
        """Change as a share of the value before."""
        return self.change / self.before if self.before else float("inf")


def compare(before: Results, after: Results, *, seed: int = 0) -> list[Comparison]:
    """Pairs two results sample by sample, for every score they share.

    Raises:
        UserError: they share nothing, or share a task under different versions or samples.
    """
    shared = [
        (score, other)
        for score in before.scores
        for other in after.scores
        if (score.task, score.metric) == (other.task, other.metric)
    ]
    if not shared:
        raise UserError(f"{before.model} and {after.model} were scored on no task in common.")
    return [_compare(before, after, first, second, seed) for first, second in shared]


def _compare(before: Results, after: Results, first: Score, second: Score, seed: int) -> Comparison:
    if first.version != second.version:
        raise UserError(
            f"Task {first.task} changed between the two evaluations (version {first.version}, then "
            f"{second.version}): evaluate both models again."
        )
    metric = "nats" if first.metric == "bits_per_byte" else first.metric
    old, new = before.values(first.task, metric), after.values(first.task, metric)
    if old.keys() != new.keys():
        raise UserError(
            f"Task {first.task}: {len(old)} samples before and {len(new)} after, not the same "
            "ones: use the same limit and seed for both."
        )
    a, b = np.asarray([(old[key], new[key]) for key in old]).T
    weights, wins, losses, p_value = None, 0, 0, float("nan")
    if metric == "nats":
        sizes = before.values(first.task, "bytes")
        weights = np.asarray([sizes[key] for key in old]) * np.log(2)
    elif {*a.tolist(), *b.tolist()} <= {0.0, 1.0}:
        wins, losses = int(((a == 0) & (b == 1)).sum()), int(((a == 1) & (b == 0)).sum())
        p_value = mcnemar_exact(wins, losses)
    low, high = paired_bootstrap(a, b, weights=weights, seed=seed)
    return Comparison(
        task=first.task,
        metric=first.metric,
        before=first.value,
        after=second.value,
        change=second.value - first.value,
        low=low,
        high=high,
        n=len(a),
        wins=wins,
        losses=losses,
        p_value=p_value,
        higher_is_better=first.higher_is_better,
    )
