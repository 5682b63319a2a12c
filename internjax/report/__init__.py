"""Reports: one self-contained html page from plain records, tables for the terminal, and JSON.

`blocks` are the records, `charts` draws, `page` lays out, `terminal` prints. Nothing here knows
what a stage is: a section is a title and blocks.
"""

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
)
from internjax.report.page import render
from internjax.report.terminal import summary_table, write_json

__all__ = [
    "Bars",
    "Block",
    "Funnel",
    "Histogram",
    "KeyValues",
    "Lines",
    "Section",
    "Table",
    "Text",
    "Trace",
    "TraceStep",
    "render",
    "summary_table",
    "write_json",
]
