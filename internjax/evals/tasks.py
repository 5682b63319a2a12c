"""Tasks from files: lm-evaluation-harness's YAML dialect in, ready samples out.

One file a task under `tasks/`. What the public harness knows (doc_to_text, doc_to_choice,
doc_to_target, output_type, metric_list, filter_list, generation_kwargs, few-shot settings) keeps
its meaning, so the harness can run the same file; what it does not know stands under `metadata`:

    metadata:
      dimension: reasoning     # where the score counts
      source: catalog          # data_files is <dataset>/<file> of the catalogue; or "package"
      chat: true               # generate: the prompt is a user's message, not raw text
      metrics: [last_number]   # scorers the harness does not have
      baseline: 0.0            # score of blind guessing, where samples do not tell it

Prompts are Jinja templates in a sandbox, and a misspelt field is an error, not an empty string.
"""

import ast
import csv
import gzip
import hashlib
import json
import random
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from internjax import catalog
from internjax.errors import Corrupt, Missing, UserError
from internjax.evals.core import Sample, Task
from internjax.models.lm import SamplingParams

FOLDER = Path(__file__).parent
KIND_OF_OUTPUT = {
    "multiple_choice": "choice",
    "generate_until": "generate",
    "loglikelihood_rolling": "rolling",
}
ASK_FIELDS = (
    "output_type",
    "description",
    "doc_to_text",
    "doc_to_choice",
    "doc_to_target",
    "target_delimiter",
    "fewshot_delimiter",
    "num_fewshot",
    "fewshot_config",
    "generation_kwargs",
    "filter_list",
    "metric_list",
)
DATA_FIELDS = ("task", "tag", "dataset_path", "dataset_kwargs", "test_split", "metadata")


def task_names() -> list[str]:
    """Names of the tasks that ship with the package."""
    return sorted(path.stem for path in (FOLDER / "tasks").glob("*.yaml"))


def load_task(name: str | Path, **options: Any) -> Task:
    """Reads one task by name, or from a YAML file of the user's.

    Args:
        options: arguments for its scorers; part of the version.
    Raises:
        Missing: no such task.
        Corrupt: the file is no task.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / "tasks" / f"{name}.yaml"
    if not path.is_file():
        raise Missing(f"No task {str(name)!r}: there are {', '.join(task_names())}.")
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise Corrupt(
            f"{path} holds no mapping: a task needs at least task, output_type, metadata."
        )
    unknown = sorted(set(raw) - set(ASK_FIELDS) - set(DATA_FIELDS))
    missing = sorted({"task", "output_type", "dataset_kwargs", "metadata"} - set(raw))
    if unknown or missing:
        raise Corrupt(f"{path}: unknown keys {unknown}, missing keys {missing}.")
    return _task(raw, options)


def resolve_tasks(names: list[str | Task]) -> list[Task]:
    """Tasks by name, by file or by tag (`commonsense` = every task that carries the tag)."""
    found: list[Task] = []
    for name in names:
        tagged = [] if isinstance(name, Task) else _tagged().get(str(name), [])
        found += [name] if isinstance(name, Task) else tagged or [load_task(name)]
    return list({task.name: task for task in found}.values())


@cache
def _tagged() -> dict[str, list[Task]]:
    groups: dict[str, list[Task]] = {}
    for task in map(load_task, task_names()):
        for tag in task.tags:
            groups.setdefault(tag, []).append(task)
    return groups


def _task(raw: Mapping[str, Any], options: Mapping[str, Any]) -> Task:
    meta = raw["metadata"]
    if raw["output_type"] not in KIND_OF_OUTPUT:
        raise Corrupt(
            f"Task {raw['task']}: output_type {raw['output_type']!r} is not one of "
            f"{', '.join(KIND_OF_OUTPUT)}."
        )
    ask = {key: raw[key] for key in ASK_FIELDS if key in raw} | {"chat": meta.get("chat", False)}
    metrics = [*meta.get("metrics", []), *(m["metric"] for m in raw.get("metric_list", []))]
    (data_file,) = raw["dataset_kwargs"]["data_files"].values()
    tags = raw.get("tag", [])
    task = Task(
        name=raw["task"],
        dimension=meta["dimension"],
        kind=KIND_OF_OUTPUT[raw["output_type"]],
        ask=ask,
        metrics=tuple(metrics),
        source=(meta["source"], data_file),
        params=_sampling(raw.get("generation_kwargs", {})),
        baseline=meta.get("baseline"),
        tags=(tags,) if isinstance(tags, str) else tuple(tags),
    )
    return with_options(task, **options)


def with_options(task: Task, **options: Any) -> Task:
    """The same task with these scorer options, and the version that goes with them."""
    asked = [task.name, task.source, task.ask, task.metrics, options]
    text = json.dumps(asked, sort_keys=True, ensure_ascii=False)
    return replace(task, options=options, version=hashlib.sha256(text.encode()).hexdigest()[:6])


def _sampling(kwargs: Mapping[str, Any]) -> SamplingParams:
    """Sampling of a task file; greedy unless it says do_sample, whatever its temperature."""
    return SamplingParams(
        max_tokens=kwargs.get("max_gen_toks", 256),
        temperature=kwargs.get("temperature", 1.0) if kwargs.get("do_sample") else 0.0,
        top_p=kwargs.get("top_p", 1.0),
        stop=tuple(kwargs.get("until", ())),
    )


# ---------------------------------------------------------------------------- rows of a dataset


def read_rows(task: Task) -> list[dict[str, Any]]:
    """Rows of the task's data file, from the package or through the catalogue.

    Raises:
        Missing: the dataset is neither shipped nor to be had.
    """
    origin, name = task.source
    if origin == "package":
        return _parse(FOLDER / "data" / name)
    dataset, _, file = name.partition("/")
    return _parse(catalog.get(dataset, file))


def _parse(path: Path) -> list[dict[str, Any]]:
    """Rows of jsonl, json (one list) or csv with a header line; .gz is unpacked on the way."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        text = file.read()
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if kind == "csv":
        return list(csv.DictReader(text.splitlines()))
    if kind == "json" and text.lstrip().startswith("["):
        return _json(text, path, 0)
    lines = enumerate(text.split("\n"))
    return [_json(line, path, index) for index, line in lines if line.strip()]


def _json(text: str, path: Path, lines_before: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = lines_before + error.lineno
        raise Corrupt(f"{path} line {line} is not JSON ({error.msg}).") from None


# ------------------------------------------------------------------------------ rows to samples


def load_samples(task: Task, limit: int | None = None, seed: int = 0) -> list[Sample]:
    """Samples of a task; `limit` draws that many with `seed`, and fewer are a prefix of more.

    A deviation from the harness, which takes the first rows: many files are sorted by topic.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} asks for no samples: give 1 or more, or null for all.")
    rows = list(enumerate(read_rows(task)))
    if limit is not None and limit < len(rows):
        random.Random(seed).shuffle(rows)
        rows = rows[:limit]
    return [make_sample(task, row, str(row.get("id", index))) for index, row in rows]


def make_sample(task: Task, doc: Mapping[str, Any], sample_id: str) -> Sample:
    """One row of a dataset as a question."""
    ask = task.ask
    if task.kind == "rolling":
        return Sample(sample_id, input=str(_field(ask["doc_to_target"], doc)), target="", meta=doc)
    if task.kind == "generate":
        prompt = _fewshot(task) + str(_field(ask["doc_to_text"], doc))
        chat = [{"role": "user", "content": prompt}] if ask["chat"] else prompt
        target = str(_field(ask.get("doc_to_target", ""), doc))
        return Sample(sample_id, chat, target, meta=doc)
    return _choice_sample(task, doc, sample_id)


def _choice_sample(task: Task, doc: Mapping[str, Any], sample_id: str) -> Sample:
    """A question with choices; where doc_to_text is a number, choices are contexts (Winograd)."""
    ask = task.ask
    choices = tuple(map(str, _choices(ask["doc_to_choice"], doc)))
    text, target = _field(ask["doc_to_text"], doc), _field(ask["doc_to_target"], doc)
    shots, gap = _fewshot(task), ask.get("target_delimiter", " ")
    if isinstance(text, int):
        pairs = tuple((shots + choice, f"{gap}{target}") for choice in choices)
        return Sample(sample_id, shots, _gold(text, choices, task), choices, pairs, doc)
    pairs = tuple((shots + str(text), f"{gap}{choice}") for choice in choices)
    return Sample(sample_id, shots + str(text), _gold(target, choices, task), choices, pairs, doc)


def _gold(target: int | str, choices: tuple[str, ...], task: Task) -> int:
    index = choices.index(target) if target in choices else target
    if not isinstance(index, int) and str(index).strip().isdigit():
        index = int(index)
    if not isinstance(index, int) or not 0 <= index < len(choices):
        raise Corrupt(f"Task {task.name}: target {target!r} is none of {len(choices)} choices.")
    return index


def _fewshot(task: Task) -> str:
    """Description and solved examples before the question, joined as the harness joins them."""
    ask = task.ask
    shots = ask.get("fewshot_config", {}).get("samples", [])[: ask.get("num_fewshot", 0)]
    if len(shots) < ask.get("num_fewshot", 0):
        raise Corrupt(f"Task {task.name}: num_fewshot is more than the samples of fewshot_config.")
    gap, end = ask.get("target_delimiter", " "), ask.get("fewshot_delimiter", "\n\n")
    parts = [f"{_field(ask['doc_to_text'], s)}{gap}{_answer(ask, s)}{end}" for s in shots]
    return ask.get("description", "") + "".join(parts)


def _answer(ask: Mapping[str, Any], doc: Mapping[str, Any]) -> str:
    target = _field(ask["doc_to_target"], doc)
    if "doc_to_choice" in ask and isinstance(target, int):
        return str(_choices(ask["doc_to_choice"], doc)[target])
    return str(target)


def _field(template: str | int, doc: Mapping[str, Any]) -> Any:
    """A field by its bare name, or a rendered template; digits stay text, as a prompt needs."""
    if isinstance(template, int) or template in doc:
        return doc.get(template, template)
    return _render(template, doc)


def _choices(template: str | list[str], doc: Mapping[str, Any]) -> list[str]:
    if isinstance(template, list):
        return [_render(choice, doc) for choice in template]
    return doc[template] if template in doc else ast.literal_eval(_render(template, doc))


@cache
def _environment() -> SandboxedEnvironment:
    env = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    env.filters["regex_replace"] = lambda text, pattern, by="", count=0: re.sub(
        pattern, by, text, count=count
    )
    return env


@cache
def _compiled(template: str):
    return _environment().from_string(template)


def _render(template: str, doc: Mapping[str, Any]) -> str:
    try:
        return _compiled(template).render(**doc)
    except TemplateError as error:
        raise Corrupt(
            f"Template {template!r} does not fit a row with {sorted(doc)}: {error}"
        ) from None
