"""Tables of scores and comparisons for the terminal."""

import math
from collections.abc import Callable, Sequence

from rich.table import Table

from internjax.evals.core import Results, Score
from internjax.evals.run import Comparison


def score_table(results: Results) -> Table:
    """One line a score: value, standard error, 95% interval, blind guessing, samples, version."""
    table = _table(f"scores of {results.model}")
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("score", "95% CI", "baseline", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("version", style="dim", no_wrap=True)
    for score in results.scores:
        table.add_row(*score_cells(score))
    return table


def score_cells(score: Score) -> tuple[str, ...]:
    """A score's fields as text, in the order of the table; ↓ marks what should be low."""
    show = _number if _is_amount(score.metric) else _percent
    return (
        score.task,
        score.metric + ("" if score.higher_is_better else " ↓"),
        f"{show(score.value)} ±{show(score.stderr).rstrip('%')}",
        _interval(score.low, score.high, show),
        show(score.baseline),
        str(score.n),
        score.version,
    )


def comparison_table(comparisons: Sequence[Comparison], before: str, after: str) -> Table:
    """One line a shared score: both values, the change with its interval, wins, losses, p."""
    table = _table(f"{before} → {after}")
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("before", "after", "change", "95% CI", "won/lost", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for c in comparisons:
        show = _number if _is_amount(c.metric) else _percent
        changed = f"{c.wins}/{c.losses}" if not math.isnan(c.p_value) else "–"
        p_value = f"{c.p_value:.3f}" if not math.isnan(c.p_value) else "–"
        interval = _interval(c.low, c.high, show)
        figures = (show(c.before), show(c.after), show(c.change), interval, changed, p_value)
        table.add_row(c.task, c.metric, *figures)
    return table


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        header_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _interval(low: float, high: float, show: Callable[[float], str]) -> str:
    return f"{show(low).rstrip('%')}…{show(high)}"


def _is_amount(metric: str) -> bool:
    return metric in ("bits_per_byte", "margin")


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}%"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"
