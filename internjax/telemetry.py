"""What a run tells while it runs: one JSON line a step and a progress bar for people.

Metrics are read one step late. Utilisation is told twice, model and hardware, with its formula,
length, recomputation and peak beside it (`Work`). Knows no model class and no batch.
"""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

type Record = dict[str, Any]

FORMULA = (
    "model FLOPs a token = 6 P + 12 L N H T, P = L (2 D N H + 2 D K H + 3 D F) + D V"
    " (arXiv:2204.02311, appendix B: every product once forward and twice backward, attention over"
    " the whole row, causal or not); hardware FLOPs add remat x the layers' forward pass;"
    " internevo_tflops = c ((8 + 4 r) D^2 + 4 T D) L + 6 D V with r = 1.5 F / D, c = 3 + remat"
)

# Dense bfloat16 FLOP/s of one device, data sheets of NVIDIA; found in `jax.Device.device_kind`.
PEAK_FLOPS = {"A100": 312e12, "A800": 312e12, "H100": 989.4e12, "H200": 989.4e12}
PEAK_FLOPS |= {"H800": 989.4e12, "B200": 2250e12}


@dataclass(frozen=True)
class Work:
    """What a token costs and what a device could do: all that a utilisation needs to be read.

    Fields:
      model_flops, hardware_flops, internevo_flops: a token, forward and backward.
      length: tokens a row; remat: share of the layers computed twice; devices: of the whole run.
      peak_flops: FLOP/s of one device, None where it is not known; device: its kind.
      formula: how the numbers were got.
    """

    model_flops: float
    hardware_flops: float
    internevo_flops: float
    length: int
    remat: float
    devices: int
    peak_flops: float | None
    device: str
    formula: str = FORMULA


def work_of(
    cfg: Any, *, length: int, remat: float, devices: int, device: str, peak_tflops: float = 0.0
) -> Work:
    """Counts the FLOPs of a token of a dense decoder.

    Args:
      cfg: has num_layers, d_model, num_heads, num_kv_heads, head_dim, d_ff, vocab_size.
      peak_tflops: of one device, in place of the table's.
    """
    L, D, F, V = cfg.num_layers, cfg.d_model, cfg.d_ff, cfg.vocab_size
    heads, kv_heads = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    weights = L * (2 * D * heads + 2 * D * kv_heads + 3 * D * F)
    forward = 2 * weights + 4 * L * heads * length
    r = 1.5 * F / D
    internevo = (3 + remat) * ((8 + 4 * r) * D * D + 4 * length * D) * L + 6 * D * V
    known = [flops for name, flops in PEAK_FLOPS.items() if name in device]
    return Work(
        model_flops=3.0 * forward + 6 * D * V,
        hardware_flops=(3.0 + remat) * forward + 6 * D * V,
        internevo_flops=float(internevo),
        length=length,
        remat=float(remat),
        devices=devices,
        peak_flops=peak_tflops * 1e12 if peak_tflops else (known[0] if known else None),
        device=device,
    )


def utilisation(work: Work, tokens_per_second: float) -> Record:
    """Returns TFLOP/s of one device and, where its peak is known, the shares of it."""
    rate = tokens_per_second / work.devices
    told = {
        "tflops": rate * work.internevo_flops / 1e12,
        "model_tflops": rate * work.model_flops / 1e12,
        "hardware_tflops": rate * work.hardware_flops / 1e12,
    }
    if work.peak_flops:
        told["mfu"] = rate * work.model_flops / work.peak_flops
        told["hfu"] = rate * work.hardware_flops / work.peak_flops
    return told


def by_source(metrics: Mapping[str, Any], names: Sequence[str]) -> Record:
    """Splits `source_loss_sum`, `source_tokens`, `source_correct` (each `[S]`) by source names.

    A source without a counted token in this batch is left out.
    """
    if "source_tokens" not in metrics:
        return {}
    tokens = np.asarray(metrics["source_tokens"])
    told = {}
    for field, label in (("source_loss_sum", "loss"), ("source_correct", "accuracy")):
        if field in metrics:
            sums = np.asarray(metrics[field])
            pairs = zip(names, sums, tokens, strict=True)
            told |= {f"{label}/{name}": float(s / n) for name, s, n in pairs if n > 0}
    return told


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

    Args:
      work: adds utilisation; sources: names for the metrics that are split by source.
      on_record: called with every finished record, after its line is written.
      primary: whether this process writes; the others only keep the records.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        start: int,
        total: int,
        progress: bool = True,
        work: Work | None = None,
        sources: Sequence[str] = (),
        on_record: Callable[[Record], None] = lambda record: None,
        primary: bool = True,
    ):
        self.records: list[Record] = []
        self._path, self._start, self._primary = Path(path), start, primary
        self._work, self._sources, self._on_record = work, sources, on_record
        self._bar = progress_bar(visible=progress and primary)
        self._task = self._bar.add_task(name, total=total, completed=start, info="compiling")
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=50)  # tokens, seconds
        self._all = (0.0, 0.0)
        self._file = None

    def __enter__(self) -> "StepLog":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._drop_lines_after(self._start)
        if self._primary:
            self._file = self._path.open("a", encoding="utf-8")
        self._bar.start()
        self._clock = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            self._bar.stop()
            if self._file:
                self._file.close()

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics (arrays or numbers) of the update that led to `step`."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Waits for the newest step and writes its line; then no crash of the process loses it."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        record = {"step": step} | {k: _number(v) for k, v in metrics.items() if _is_number(v)}
        record |= by_source(metrics, self._sources)
        now = time.perf_counter()
        record["seconds"], self._clock = now - self._clock, now
        record |= self._derived(record)
        if self._file:
            self._file.write(_line(record))
            self._file.flush()
        self.records.append(record)
        self._show(record)
        self._on_record(record)

    def _derived(self, record: Record) -> Record:
        """What follows from a step's own numbers and from those before."""
        last = self.records[-1] if self.records else {}
        told = {}
        if "num_tokens" in record:
            told["tokens_per_second"] = record["num_tokens"] / record["seconds"]
        if "loss" in record:
            told["perplexity"] = math.exp(min(record["loss"], 700.0))  # NaN stays NaN
        if "num_correct" in record and record.get("num_tokens"):
            told["accuracy"] = record["num_correct"] / record["num_tokens"]
        if "finite" in record:
            told["skipped_batches"] = last.get("skipped_batches", 0) + (not record["finite"])
        if "batch_tokens" in record:
            told["consumed_tokens"] = last.get("consumed_tokens", 0) + record["batch_tokens"]
            told |= self._rates(record["batch_tokens"], record["seconds"])
        return told

    def _rates(self, tokens: float, seconds: float) -> Record:
        """Tokens a second and device (TGS) of this step, the last 10 and 50, and all.

        The first step of a process compiles: it counts in its own rate only.
        """
        devices = self._work.devices if self._work else 1
        told = {"tgs": tokens / seconds / devices}
        if self._work:
            told |= utilisation(self._work, tokens / seconds)
        if self.records and self.records[-1]["step"] > self._start:
            self._recent.append((tokens, seconds))
            self._all = (self._all[0] + tokens, self._all[1] + seconds)
            for count in (10, 50):
                part = list(self._recent)[-count:]
                spent = sum(s for _, s in part)
                told[f"tgs_last_{count}"] = sum(t for t, _ in part) / spent / devices
            told["tgs_all"] = self._all[0] / self._all[1] / devices
        return told

    def _show(self, record: Record) -> None:
        shown = f"loss {record['loss']:.3f}" if "loss" in record else ""
        if "tokens_per_second" in record:
            shown += f" · {record['tokens_per_second']:.0f} tok/s"
        if "mfu" in record:
            shown += f" · MFU {record['mfu']:.1%}"
        self._bar.update(self._task, completed=record["step"], info=shown)

    def _drop_lines_after(self, step: int) -> None:
        """A resumed run repeats the steps since its checkpoint: their old lines go."""
        if not self._path.exists():
            return
        lines = [_parsed(line) for line in self._path.read_text(encoding="utf-8").split("\n")]
        self.records = [r for r in lines if r is not None and r["step"] <= step]
        if not self._primary:
            return
        half = self._path.with_name(f".{self._path.name}.half")
        half.write_text("".join(_line(r) for r in self.records), encoding="utf-8")
        half.replace(self._path)  # dying here must not lose the lines of the steps before


def _line(record: Mapping[str, Any]) -> str:
    """Formats a record; JSON has no NaN or infinity, so these become null."""
    plain = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
    return json.dumps(plain) + "\n"


def _parsed(line: str) -> Record | None:
    """Reads a line of the log; one cut short by a dying process counts as none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _is_number(value: Any) -> bool:
    return getattr(value, "ndim", 0) == 0


def _number(value: Any) -> float | int | bool:
    return value.item() if hasattr(value, "item") else value
