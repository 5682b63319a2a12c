"""Reports: every text escaped, nothing from outside, numbers drawn where they belong."""

import io
import json
import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from rich.console import Console

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
    charts,
    page,
    render,
    summary_table,
    write_json,
)
from internjax.report.blocks import duration, number, plain

EVIL = """<script>alert(1)</script>"><img src=x onerror='alert(2)'></style></title> & "it's" 书生"""
VOID = {"meta", "br", "img", "link", "input"}


class Checker(HTMLParser):
    """Collects tags and texts, and checks that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)


def check(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def every_block(words: str) -> list:
    return [
        Text(f"{words}\n\nsecond"),
        KeyValues({words: words, "nested": {words: [words, 1]}}, title=words),
        Table([words, "n", "ok"], [[words, 1.5, True], [words, None, False]], words, words),
        Lines(words, {words: [(0, 1.0), (1, math.nan), (2, 0.5)]}, words, words, words),
        Bars(words, [words], {words: [1.0]}, {words: [0.1]}, [0.5], words, note=words),
        Histogram(words, [1.0, 2.0, 2.5], words, marks={words: 2.0}, note=words),
        Funnel(words, [(words, 10), (words, 7)], words, words),
        Trace(words, [TraceStep(words, words * 40, words, 1.5), TraceStep("call", words)], words),
    ]


def test_hostile_text_stays_text():
    sections = [Section(EVIL, every_block(EVIL), ok=True, lead=EVIL, seconds=3)]
    html = page.page(EVIL, sections, ok=False, facts={EVIL: EVIL})
    found = check(html)
    assert found.tags.isdisjoint({"script", "img", "iframe", "object", "link", "base", "form"})
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    for name, value in found.attributes:
        if name in ("class", "id", "href"):
            assert re.fullmatch(r"[#\w\- ]*", value or ""), (name, value)
    assert EVIL in "".join(found.texts)  # and a reader sees it as it was written


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=30))
def test_any_text_gives_a_well_formed_page(words):
    html = page.page(words, [Section(words, every_block(words))], facts={words: words})
    assert check(html).tags.isdisjoint({"script", "img"})


def test_page_needs_nothing_from_outside(tmp_path):
    sections = [Section("All", every_block("words"), ok=True)]
    path = render("Report", sections, tmp_path / "a" / "r.html")
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)|url\(|@import|https?://", html)
    assert "default-src 'none'" in html and 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html
    assert [p.name for p in path.parent.iterdir()] == ["r.html"]


def test_report_is_written_whole_or_not_at_all(tmp_path):
    path = render("one", [], tmp_path / "r.html")
    before = path.read_bytes()
    ragged = Table(["a", "b"], [[1]])
    with pytest.raises(ValueError, match="a row of 1 cells for the 2 columns"):
        render("two", [Section("s", [ragged])], path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_lines_stand_where_their_values_are():
    html = charts.lines(Lines("loss", {"a": [(0, 10.0), (5, 20.0), (10, 30.0)]}))
    [path] = re.findall(r'<path class="line"[^>]* d="M([^"]+)"', html)
    points = [tuple(map(float, point.split())) for point in path.split("L")]
    assert [x for x, _ in points] == [58.0, 262.0, 466.0]
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.11)
    assert points[0][1] > points[2][1]  # larger values stand higher
    assert "a: 20 at 5" in html


def test_lines_break_at_missing_values():
    values = [1.0, 2.0, math.nan, 1.0, 2.0]
    html = charts.lines(Lines("loss", {"a": list(enumerate(values))}))
    [path] = re.findall(r' d="(M[^"]+)"', html)
    assert path.count("M") == 2 and path.count("L") == 2


@settings(max_examples=50, deadline=None)
@given(st.integers(401, 3000), st.integers(0, 10**6))
def test_thinning_keeps_spikes_ends_and_order(count, seed):
    rng = np.random.default_rng(seed)
    line = [(float(i), float(y)) for i, y in enumerate(rng.normal(size=count))]
    kept = charts.thin(line)
    assert len(kept) <= charts.MAX_POINTS + 2
    assert kept == sorted(kept) and kept[-1] == line[-1]
    values = [y for _, y in line]
    assert {min(values), max(values)} <= {y for _, y in kept}


@settings(max_examples=200, deadline=None)
@given(
    st.floats(-1e9, 1e9, allow_nan=False), st.floats(1e-6, 1e9, allow_nan=False), st.integers(3, 8)
)
def test_ticks_are_round_few_and_inside(low, width, wanted):
    high = low + width
    if high - low < 1e-6 * max(abs(low), 1.0):
        return  # closer than the numbers on an axis can tell apart
    found = charts.ticks((low, high), wanted)
    assert len(found) <= wanted + 1
    slack = 1e-6 * (high - low) + 1e-9 * abs(low)
    assert all(low - slack <= tick <= high + slack for tick in found)
    assert found == sorted(set(found))


def test_histogram_counts_every_value_once():
    values = [0.0, 0.1, 0.5, 0.99, 1.0, math.nan]
    html = charts.histogram(Histogram("t", values, "s", bins=4, marks={"p50": 0.5}))
    counts = [int(count) for count in re.findall(r" s: (\d+)</title>", html)]
    assert counts == [2, 0, 1, 2]
    assert "p50 0.5 s" in html


def test_bars_are_as_long_as_their_values():
    block = Bars(
        "scores",
        ["identity", "maths"],
        {"before": [0.0, None], "after": [75.0, 20.0]},
        {"after": [5.0, None]},
        baseline=[25.0, None],
        unit="%",
        maximum=100,
    )
    html = charts.bars(block)
    assert re.findall(r'class="bar" style="left:0.00%;width:([\d.]+)%', html) == [
        "0.00",
        "75.00",
        "20.00",
    ]
    assert re.findall(r'class="whisker" style="left:([\d.]+)%;width:([\d.]+)%', html) == [
        ("70.00", "10.00")
    ]
    assert re.findall(r'class="tick" style="left:([\d.]+)%', html) == ["25.00", "25.00"]
    assert "75 ± 5 %" in html and ">–<" in html


def test_negative_bars_start_at_zero():
    html = charts.bars(Bars("d", ["a", "b"], {"x": [-1.0, 3.0]}))
    assert re.findall(r'class="bar" style="left:([\d.]+)%;width:([\d.]+)%', html) == [
        ("0.00", "25.00"),
        ("25.00", "75.00"),
    ]


def test_bars_of_another_length_are_refused():
    with pytest.raises(ValueError):
        charts.bars(Bars("d", ["a"], {"x": [1.0]}, errors={"x": [1.0, 2.0]}))


def test_funnel_tells_what_each_step_took():
    html = charts.funnel(Funnel("docs", [("read", 200), ("rules", 150), ("dedup", 150)]))
    assert re.findall(r"width:([\d.]+)%", html) == ["100.00", "75.00", "75.00"]
    assert "−50 (25.0%)" in html and "unchanged" in html


@pytest.mark.parametrize(
    "block",
    [
        Lines("t", {}),
        Lines("t", {"a": [(0, math.nan)]}),
        Bars("t", [], {}),
        Bars("t", ["a"], {"x": [None]}),
        Histogram("t", []),
        Funnel("t", []),
        Trace("t", []),
        Table([], []),
        KeyValues({}),
        Text(""),
        Lines("t", {"a": [(3, 7.0)]}),
        Histogram("t", [4.0]),
        Bars("t", ["a"], {"x": [0.0]}),
        Funnel("t", [("none", 0), ("none", 0)]),
    ],
)
def test_little_or_nothing_to_show_is_no_error(block):
    check(page.page("t", [Section("s", [block])]))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (0, "0"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (12345.6, "12,346"),
        (1e-9, "1e-09"),
        (2.0, "2"),
        (math.inf, "–"),
    ],
)
def test_numbers_as_people_read_them(value, text):
    assert number(value) == text


def test_values_as_text():
    assert plain(np.float32(0.5)) == "0.5"
    assert plain({"a": [1, True], "b": None}) == "a 1, yes, b –"
    assert [duration(s) for s in (0.0123, 0.9999, 59.96, 99.96, 3725)] == [
        "12 ms",
        "1.0 s",
        "60.0 s",
        "1 min 40 s",
        "62 min 05 s",
    ]


def test_summary_table_prints_verdicts_and_budgets():
    rows = [
        {"name": "data", "ok": True, "seconds": 14.2, "metrics": {"documents": 158}},
        {"name": "[red]gate", "ok": False, "seconds": 99, "budget_seconds": 60, "metrics": {}},
        {"name": "serve", "ok": None, "seconds": None, "metrics": None},
    ]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(summary_table(rows, title="[b]chain"))
    lines = console.export_text().splitlines()
    assert "[b]chain" in lines[0]
    assert re.search(r"✓ +data +14.2 s +documents 158", lines[2])
    assert re.search(r"✗ +\[red\]gate +99.0 s +60.0 s", lines[3])
    assert re.search(r"· +serve", lines[4])


def test_json_is_strict_and_whole(tmp_path):
    @dataclass(frozen=True)
    class Stage:
        name: str
        loss: float

    path = write_json(
        tmp_path / "x" / "r.json", {"ok": True, "stages": [Stage("调", math.nan)], "n": np.int64(3)}
    )
    text = Path(path).read_text(encoding="utf-8")
    expected = {"ok": True, "stages": [{"name": "调", "loss": None}], "n": 3}
    assert json.loads(text) == expected and "NaN" not in text and "调" in text
    with pytest.raises(ValueError, match=r"r.json/bad is a set"):
        write_json(path, {"bad": {1}})
    assert json.loads(path.read_text(encoding="utf-8")) == expected
