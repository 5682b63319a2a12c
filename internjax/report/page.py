"""Lays blocks out as one html file: no script, nothing from outside, light and dark, any width."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from internjax.report import charts
from internjax.report.blocks import (
    Bars,
    Block,
    Funnel,
    Histogram,
    KeyValues,
    Lines,
    Section,
    Table,
    Text,
    Trace,
    TraceStep,
    duration,
    plain,
)
from internjax.report.style import STYLE

LONG_TEXT = 900  # letters; longer steps of a trace are folded
WORDS = {True: "passed", False: "failed", None: ""}


def render(
    title: str,
    sections: Sequence[Section],
    path: Path,
    *,
    ok: bool | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the report to `path` (whole or not at all) and returns it.

    Args:
        ok: the verdict beside the title; None shows none.
        facts: a few short facts under the title: date, model, seconds.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(page(title, sections, ok=ok, facts=facts), encoding="utf-8")
    os.replace(temporary, path)
    return path


def page(
    title: str,
    sections: Sequence[Section],
    *,
    ok: bool | None = None,
    facts: Mapping[str, Any] | None = None,
) -> str:
    """The report as html text."""
    chips = "".join(
        f"<span><b>{escape(name)}</b> {escape(plain(value))}</span>"
        for name, value in (facts or {}).items()
    )
    ids = [f"s{index}-{slug(section.title)}" for index, section in enumerate(sections)]
    links = "".join(
        f'<a href="#{where}">{dot(section.ok)}{escape(section.title)}</a>'
        for where, section in zip(ids, sections)
    )
    body = "".join(section_html(section, where) for where, section in zip(ids, sections))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{escape(title)} {badge(ok)}</h1><div class="facts">{chips}</div></header>
<nav>{links}</nav>
<main>{body}</main>
</body>
</html>
"""


# Nothing may be loaded or run, even if some text should slip through unescaped.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def section_html(section: Section, where: str) -> str:
    """A section's card."""
    took = "" if section.seconds is None else f"<small>{duration(section.seconds)}</small>"
    lead = f'<p class="lead">{escape(section.lead)}</p>' if section.lead else ""
    blocks = "".join(block_html(block) for block in section.blocks)
    return (
        f'<section id="{where}"><h2>{escape(section.title)} {badge(section.ok)}{took}</h2>{lead}'
        f'<div class="blocks">{blocks}</div></section>'
    )


def block_html(block: Block) -> str:
    """A block in its figure, with title and note."""
    draw = DRAW[type(block)]
    title = getattr(block, "title", "")
    note = getattr(block, "note", "")
    caption = f"<h3>{escape(title)}</h3>" if title else ""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    kind = type(block).__name__.lower() + ("" if isinstance(block, NARROW) else " wide")
    return f'<figure class="{kind}">{caption}{draw(block)}{below}</figure>'


def text(block: Text) -> str:
    """Paragraphs."""
    parts = [part.strip() for part in re.split(r"\n\s*\n", block.text) if part.strip()]
    return "".join(f"<p>{escape(part)}</p>" for part in parts)


def key_values(block: KeyValues) -> str:
    """A list of names and values."""
    rows = "".join(
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(plain(value))}</dd></div>"
        for name, value in block.values.items()
    )
    return f"<dl>{rows}</dl>"


def table(block: Table) -> str:
    """A table that scrolls sideways where it does not fit."""
    for row in block.rows:
        if len(row) != len(block.columns):
            raise ValueError(f"a row of {len(row)} cells for the {len(block.columns)} columns "
                             f"{list(block.columns)}: {list(row)}")  # fmt: skip
    columns = [[row[i] for row in block.rows] for i in range(len(block.columns))]
    numeric = [all(type(value) in (int, float, type(None)) for value in c) for c in columns]
    kinds = [' class="n"' if is_number else "" for is_number in numeric]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, block.columns))
    rows = ""
    for row in block.rows:
        cells = "".join(f"<td{kind}>{cell(value)}</td>" for kind, value in zip(kinds, row))
        rows += f"<tr>{cells}</tr>"
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll">{grid}</div>'


def cell(value: Any) -> str:
    """A cell's html; verdicts get their sign."""
    return badge(value) if isinstance(value, bool) else escape(plain(value))


def trace(block: Trace) -> str:
    """The steps, one under the other."""
    return f"<ol>{''.join(step_html(step) for step in block.steps)}</ol>"


def step_html(step: TraceStep) -> str:
    """A step with its kind, tool and time; long text is folded."""
    took = "" if step.seconds is None else f"<small>{duration(step.seconds)}</small>"
    name = f"<code>{escape(step.name)}</code>" if step.name else ""
    kind = slug(step.kind)
    shown = f"<pre>{escape(step.text)}</pre>"
    if len(step.text) > LONG_TEXT:
        first = escape(step.text[: LONG_TEXT // 3].rstrip())
        shown = f"<details><summary>{first} …</summary>{shown}</details>"
    who = f'<div class="who"><b>{escape(step.kind)}</b>{name}{took}</div>'
    return f'<li class="{kind}">{who}{shown}</li>'


def badge(ok: bool | None) -> str:
    """A verdict in words and colour."""
    if ok is None:
        return ""
    return f'<span class="badge {WORDS[ok]}">{"✓" if ok else "✗"} {WORDS[ok]}</span>'


def dot(ok: bool | None) -> str:
    """A verdict as a small sign, for the list of sections."""
    return "" if ok is None else f'<i class="dot {WORDS[ok]}">{"✓" if ok else "✗"}</i>'


def slug(words: str) -> str:
    """A name safe inside an attribute."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


DRAW: dict[type, Callable[[Any], str]] = {
    Text: text,
    KeyValues: key_values,
    Table: table,
    Lines: charts.lines,
    Bars: charts.bars,
    Histogram: charts.histogram,
    Funnel: charts.funnel,
    Trace: trace,
}
NARROW = (Lines, Histogram, Bars, Funnel, KeyValues)  # two of them fit side by side on a desk
