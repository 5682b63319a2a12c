"""The same records for the terminal (a rich table) and for programs (JSON)."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internjax.lineage import canonical
from internjax.report.blocks import duration, plain

if TYPE_CHECKING:
    from rich.table import Table


def summary_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> "Table":
    """A rich table of results: name, verdict, time against its budget, metrics.

    Args:
        rows: mappings with name, ok (True, False, or None for skipped), seconds, metrics (a
            mapping of short names to values) and, if there is one, budget_seconds.
    """
    from rich.markup import escape
    from rich.table import Table

    signs = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[dim]·[/]"}
    budgets = any(row.get("budget_seconds") for row in rows)
    table = Table(title=escape(title) or None, box=None, header_style="dim", pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("stage", style="bold", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    if budgets:
        table.add_column("budget", justify="right", no_wrap=True, style="dim")
    table.add_column("result", overflow="fold")
    for row in rows:
        seconds, budget = row.get("seconds"), row.get("budget_seconds")
        took = "" if seconds is None else duration(seconds)
        if budget and seconds is not None and seconds > budget:
            took = f"[yellow]{took}[/]"
        cells = [signs[row.get("ok")], escape(str(row["name"])), took]
        if budgets:
            cells.append(duration(budget) if budget else "")
        metrics = row.get("metrics") or {}
        results = [f"{name} {plain(value)}" for name, value in metrics.items()]
        cells.append(escape(" · ".join(results)))
        table.add_row(*cells)
    return table


def write_json(path: Path, value: Any) -> Path:
    """Writes dataclasses or plain values as JSON, whole or not at all; NaN becomes null."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(canonical(value, path.name, finite=False), indent=2, ensure_ascii=False)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path
