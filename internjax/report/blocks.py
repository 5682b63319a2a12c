"""What a report is made of: plain records of numbers and text, and how both are written out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Number = int | float | None  # None, NaN and infinity are shown as missing


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by empty lines."""

    text: str


@dataclass(frozen=True)
class KeyValues:
    """Facts as name and value: config, hashes, headline numbers."""

    values: Mapping[str, Any]
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells; columns that hold only numbers stand to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Lines:
    """Curves over a common x axis, for instance losses over steps."""

    title: str
    series: Mapping[str, Sequence[tuple[float, Number]]]  # name -> (x, y) in the order of x
    x_label: str = ""
    y_label: str = ""
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """Groups of bars, for instance scores before and after."""

    title: str
    groups: Sequence[str]
    series: Mapping[str, Sequence[Number]]  # name -> one value a group
    errors: Mapping[str, Sequence[Number]] = field(default_factory=dict)  # name -> standard errors
    baseline: Sequence[Number] = ()  # one a group, for instance what guessing scores
    unit: str = ""
    maximum: float | None = None  # right end of the scale; None: the largest value
    note: str = ""


@dataclass(frozen=True)
class Histogram:
    """How values are spread, for instance latencies."""

    title: str
    values: Sequence[float]
    unit: str = ""
    bins: int = 24
    marks: Mapping[str, float] = field(default_factory=dict)  # name -> place, for instance p95
    note: str = ""


@dataclass(frozen=True)
class Funnel:
    """What is left after each step, for instance documents after each filter."""

    title: str
    steps: Sequence[tuple[str, int]]
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class TraceStep:
    """One thing an agent was told, thought, called, saw or answered."""

    kind: str  # user | system | thought | call | result | answer | error; others are shown plainly
    text: str
    name: str = ""  # of the tool
    seconds: float | None = None


@dataclass(frozen=True)
class Trace:
    """An agent's steps in order."""

    title: str
    steps: Sequence[TraceStep]
    note: str = ""


Block = Text | KeyValues | Table | Lines | Bars | Histogram | Funnel | Trace


@dataclass(frozen=True)
class Section:
    """A part of a report; `ok` marks it as passed or failed."""

    title: str
    blocks: Sequence[Block]
    ok: bool | None = None
    seconds: float | None = None
    lead: str = ""  # one sentence under the title


def finite(value: Number) -> bool:
    """Whether there is a number to show."""
    return value is not None and math.isfinite(value)


def number(value: Number) -> str:
    """A number as people read it: 4 significant digits, thousands parted, a dash when missing."""
    if value is None or not finite(value):
        return "–"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.3g}"
    return f"{value:.4g}"


def plain(value: Any) -> str:
    """Any value as text for a cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, int | float):
        return number(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a scalar of NumPy or JAX
        return plain(value.item())
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(inner) for inner in value)
    return str(value)


def duration(seconds: float) -> str:
    """Seconds as people say them: 340 ms, 4.2 s, 3 min 05 s."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
