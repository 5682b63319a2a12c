"""What every benchmark makes of its numbers: rows, shown as a table or kept as CSV."""

import csv
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from internjax.errors import UserError

Row = dict[str, float]


def percentiles(name: str, seconds: Any) -> Row:
    """The usual percentiles of some times; none where there are no times."""
    values = np.asarray(seconds)
    if not values.size:
        return {}
    return {f"{name}_p{p}_seconds": float(np.percentile(values, p)) for p in (50, 75, 95, 99)}


def peak_memory() -> int:
    """Most bytes held so far: of the device where it counts them, else of this process."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or peak_process_bytes()


def peak_process_bytes() -> int:
    """Peak resident memory; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def table(rows: list[Row]) -> Table:
    """A column for each case, a line for each quantity."""
    shown = Table(box=None, show_header=False, pad_edge=False)
    for name in _columns(rows):
        shown.add_row(f"[dim]{name}[/]", *(_cell(row.get(name)) for row in rows))
    for column in shown.columns[1:]:
        column.justify = "right"
    return shown


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def check_writable(key: str, path: Path) -> None:
    """Refuses, before anything is measured, a file that could not be written afterwards."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"{key}={path}: no file can be written there; name another.")


def write_csv(path: Path, rows: list[Row]) -> None:
    """Writes a line for each case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def _columns(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
