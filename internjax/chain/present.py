"""The chain's report for people: one html page, one JSON file, one table for the terminal."""

import json
from pathlib import Path
from typing import Any

from internjax.chain.run import BUDGET_SECONDS, Record, Stage, summary
from internjax.evals.core import Results
from internjax.report import (
    Bars,
    Funnel,
    Histogram,
    KeyValues,
    Lines,
    Section,
    Table,
    Text,
    Trace,
    TraceStep,
    render,
    write_json,
)

SHOWN = ("identity", "identity_leak", "retention_choices", "piqa", "svamp")


def write_report(record: Record, folder: Path) -> Path:
    """Writes report.html and report.json into `folder`; returns the html file."""
    write_json(folder / "report.json", summary(record))
    facts = {
        "model": ", ".join(record.cfg.models) or record.cfg.model,
        "identity": record.cfg.identity.name,
        "started": record.started.isoformat(timespec="minutes"),
        "seconds": round(sum(stage.seconds for stage in record.stages)),
    }
    sections = [_overview(record), *_data(record), *_training(record), *_scores(record)]
    sections += [*_serving(record), *_agent(record), _lineage(record)]
    path = folder / "report.html"
    return render("InternJAX chain", sections, path, ok=record.ok, facts=facts)


def terminal_rows(record: Record) -> list[dict[str, Any]]:
    """Rows for `report.summary_table`."""
    return [
        {
            "name": stage.name + (" (reused)" if stage.reused else ""),
            "ok": stage.ok,
            "seconds": stage.seconds or None,
            "budget_seconds": BUDGET_SECONDS.get(stage.name),
            "metrics": _cell(record, stage),
        }
        for stage in record.stages
    ]


def _cell(record: Record, stage: Stage) -> dict[str, Any]:
    """What the terminal says of a stage: a gate in a word a condition, a failure in full."""
    if not stage.ok and stage.why:
        return {"": stage.why}
    if stage.name in record.checks:
        checks = record.checks[stage.name]
        return {check.name: "holds" if check.ok else "fails" for check in checks}
    return _short(stage.metrics)


def _short(metrics: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what is too long for a cell."""
    names = {
        "heldout_bits_per_byte_before": "bits/byte before",
        "heldout_bits_per_byte_after": "after",
        "tokens_per_second": "tok/s",
        "tokens_per_second_one": "one stream tok/s",
        "tokens_per_second_all": "all tok/s",
        "plants_found": "planted faults found",
    }
    shown = {}
    for key, value in metrics.items():
        if isinstance(value, list):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, float):
            value = float(f"{value:.4g}")
        shown[names.get(key, key.partition("/")[2] or key).replace("_", " ")] = value
    return shown


def _overview(record: Record) -> Section:
    rows = [
        [
            stage.name,
            "passed" if stage.ok else "failed",
            round(stage.seconds, 1),
            BUDGET_SECONDS.get(stage.name, ""),
            " · ".join(f"{k} {v}" for k, v in _short(stage.metrics).items()) or stage.why,
        ]
        for stage in record.stages
    ]
    blocks: list[Any] = [Text(record.error)] if record.error else []
    blocks.append(Table(("stage", "verdict", "seconds", "budget", "result"), rows))
    return Section("Stages", blocks, ok=record.ok)


def _data(record: Record) -> list[Section]:
    artefact = record.artefact("data")
    if artefact is None:
        return []
    metrics = artefact.metrics
    drops = [
        [stage, rule, count]
        for stage, rules in metrics["dropped"].items()
        for rule, count in rules.items()
    ]
    return [
        Section(
            "Data",
            [
                Funnel("Documents left", [tuple(step) for step in metrics["funnel"]], "documents"),
                Table(("stage", "reason", "documents"), drops, "Dropped"),
                KeyValues(metrics["plants_found"], "Planted faults found"),
                KeyValues(
                    {name: metrics[name] for name in ("train_tokens", "heldout_tokens")}, "Tokens"
                ),
            ],
            ok=True,
        )
    ]


def _training(record: Record) -> list[Section]:
    curves = {
        stage.name: list(enumerate(stage.artefact.metrics["loss"], start=1))
        for stage in record.stages
        if stage.artefact and "loss" in stage.artefact.metrics
    }
    if not curves:
        return []
    facts = {}
    if pretrained := record.artefact("pretrain"):
        for when in ("before", "after"):
            key = f"heldout_bits_per_byte_{when}"
            facts[f"held-out bits per byte {when} pretraining"] = round(pretrained.metrics[key], 4)
    lines = Lines("Training loss", curves, "update", "nats a token that counts")
    return [Section("Training", [lines, KeyValues(facts)], ok=True)]


def _scores(record: Record) -> list[Section]:
    if not record.scores:
        return []
    names = [n for n in ("base", "tuned", "quantized", "endpoint") if n in record.scores]
    tasks = [t for t in SHOWN if any(_has(record.scores[n], t) for n in names)]
    values: dict[str, list] = {}
    errors: dict[str, list] = {}
    for name in names:
        found = [_score(record.scores[name], task) for task in tasks]
        values[name] = [s and s.value for s in found]
        errors[name] = [s and s.stderr for s in found]
    baseline = [
        next(s.baseline for n in names if (s := _score(record.scores[n], task))) for task in tasks
    ]
    rows = [
        [name, s.task, s.metric, s.value, s.stderr, f"{s.low:.3f} to {s.high:.3f}", s.baseline, s.n]
        for name in names
        for s in record.scores[name].scores
    ]
    checks = [
        [gate, check.name, "passed" if check.ok else "failed", check.told]
        for gate, listed in record.checks.items()
        for check in listed
    ]
    columns = ("model", "task", "metric", "value", "std. error", "95%", "blind guess", "n")
    note = "SmolLM2-135M is a small English model: read scores beside blind guessing."
    blocks = [
        Bars("Before and after", tasks, values, errors, baseline, maximum=1.0, note=note),
        Table(("gate", "condition", "verdict", "figures"), checks, "Gates"),
        Table(columns, rows, "All scores"),
    ]
    return [Section("Evaluation", blocks, ok=all(c[2] == "passed" for c in checks))]


def _has(results: Results, task: str) -> bool:
    return any(score.task == task for score in results.scores)


def _score(results: Results, task: str):
    return results.score(task) if _has(results, task) else None


def _serving(record: Record) -> list[Section]:
    artefact = record.artefact("serve")
    if artefact is None:
        return []
    metrics = artefact.metrics
    first = sorted(metrics["first_token_seconds"])
    marks = {"median": first[len(first) // 2], "worst": first[-1]}
    rate = {
        "concurrent streams": metrics["streams"],
        "most in flight": metrics["max_in_flight"],
        "tokens/s, one stream": round(metrics["tokens_per_second_one"], 1),
        "tokens/s, all streams": round(metrics["tokens_per_second_all"], 1),
        "speed-up": round(metrics["speedup"], 2),
    }
    blocks = [
        KeyValues(rate, "Throughput"),
        Histogram("Time to the first token", first, "s", 12, marks),
        Histogram("Time to the whole answer", metrics["answer_seconds"], "s", 12),
        Table(("question", "answer"), metrics["answers"], "Answers of the deployed model"),
    ]
    return [Section("Serving", blocks, ok=True)]


def _agent(record: Record) -> list[Section]:
    artefact = record.artefact("agent")
    if artefact is None:
        return []
    metrics, blocks = artefact.metrics, []
    right = {"bare model": metrics["bare_right"]}
    policies = [key.removesuffix("_right") for key in metrics if key.endswith("_right")]
    for policy in policies:
        if policy != "bare":
            right[policy] = metrics[f"{policy}_right"]
    facts = {name: f"{count} of {metrics['sums']}" for name, count in right.items()}
    blocks.append(KeyValues(facts, "Right sums"))
    for policy in right:
        path = artefact.path / f"{policy}.json"
        if path.is_file():
            raw = json.loads(path.read_text(encoding="utf-8"))
            steps = [TraceStep(**step) for step in raw["steps"]]
            blocks.append(Trace(f"{policy}: {raw['title']}", steps, raw["note"]))
    stage = next(s for s in reversed(record.stages) if s.name == "agent")
    return [Section("Agent", blocks, ok=stage.ok)]


def _lineage(record: Record) -> Section:
    rows = [
        [
            stage.name,
            stage.artefact.key[:12],
            ", ".join(
                f"{name} {str(source.get('key') or source['sha256'])[:12]}"
                for name, source in stage.artefact.card["inputs"].items()
            ),
        ]
        for stage in record.stages
        if stage.artefact
    ]
    lead = "Every artefact lies in the store under its key, with a card.json beside it."
    return Section("Lineage", [Table(("stage", "artefact", "made from"), rows)], lead=lead)
