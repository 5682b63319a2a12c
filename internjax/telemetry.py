"""What a run tells while it runs: one JSON line a step and a progress bar for people."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(*, visible: bool = True) -> Progress:
    """Makes a bar with count, time left and a free text `info`; silent where nobody looks."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not (visible and sys.stderr.isatty()),
    )


class StepLog:
    """Writes metrics of every step to `path` (JSON lines) and shows them on a progress bar.

    A context manager. Metrics are read one step late, so that the host never waits for the step
    it has just dispatched.
    """

    def __init__(self, path: Path, *, name: str, start: int, total: int, progress: bool = True):
        self.records: list[dict[str, Any]] = []
        self._path, self._start = Path(path), start
        self._bar = progress_bar(visible=progress)
        self._task = self._bar.add_task(name, total=total, completed=start, info="compiling")
        self._pending: tuple[int, Mapping[str, Any]] | None = None

    def __enter__(self) -> "StepLog":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_lines_after(self._start)
        self._file = self._path.open("a", encoding="utf-8")
        self._bar.start()
        self._clock = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            self._bar.stop()
            self._file.close()

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics (arrays or numbers) of the update that led to `step`."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Waits for the newest step and writes its line; then no crash of the process loses it."""
        if self._pending is None:
            return
        step, metrics = self._pending
        record = {"step": step} | {k: _number(v) for k, v in metrics.items()}
        now = time.perf_counter()
        record["seconds"], self._clock = now - self._clock, now
        if "num_tokens" in record:
            record["tokens_per_second"] = record["num_tokens"] / record["seconds"]
        self._file.write(_line(record))
        self._file.flush()
        self.records.append(record)
        shown = f"loss {record['loss']:.3f}" if "loss" in record else ""
        if "tokens_per_second" in record:
            shown += f" · {record['tokens_per_second']:.0f} tok/s"
        self._bar.update(self._task, completed=step, info=shown)
        self._pending = None

    def _drop_lines_after(self, step: int) -> None:
        """A resumed run repeats the steps since its checkpoint: their old lines go."""
        if not self._path.exists():
            return
        lines = [_parsed(line) for line in self._path.read_text(encoding="utf-8").split("\n")]
        self.records = [r for r in lines if r is not None and r["step"] <= step]
        half = self._path.with_name(f".{self._path.name}.half")
        half.write_text("".join(_line(r) for r in self.records), encoding="utf-8")
        half.replace(self._path)  # dying here must not lose the lines of the steps before


def _line(record: Mapping[str, Any]) -> str:
    """Formats a record; JSON has no NaN or infinity, so these become null."""
    plain = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
    return json.dumps(plain) + "\n"


def _parsed(line: str) -> dict[str, Any] | None:
    """Reads a line of the log; one cut short by a dying process counts as none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _number(value: Any) -> float | int | bool:
    return value.item() if hasattr(value, "item") else value
