"""Draws blocks as html: lines and histograms as inline SVG, bars and funnels as styled boxes.

Colours are CSS variables of the page (`--s0`…), so a chart follows the light or dark scheme; every
text is escaped here. A chart is a string and needs no script.
"""

import math
from collections.abc import Sequence
from html import escape

from internjax.report.blocks import Bars, Funnel, Histogram, Lines, Number, finite, number

WIDTH, HEIGHT = 480, 240  # of the drawing, in units of about one pixel
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 38
COLOURS = 6
MAX_POINTS = 400  # of a line; more cannot be seen
DASHES = ("", "6 4", "2 3", "8 3 2 3")  # lines differ without their colours too

Range = tuple[float, float]


def lines(block: Lines) -> str:
    """The curves, axes and legend."""
    points = {
        name: thin([(x, y) for x, y in line if finite(x)]) for name, line in block.series.items()
    }
    shown = [(x, y) for line in points.values() for x, y in line if y is not None and finite(y)]
    if not shown:
        return empty()
    x_range = spread([x for x, _ in shown], margin=0)
    y_range = spread([y for _, y in shown], margin=0.06)
    body = [axes(x_range, y_range, block.x_label, block.y_label)]
    for index, (name, line) in enumerate(points.items()):
        body.append(curve(name, line, x_range, y_range, index))
    key = legend(list(points), dashes=True) if len(points) > 1 else ""
    return key + svg(body, f"{block.title}: {', '.join(points)}")


def curve(
    name: str, line: Sequence[tuple[float, Number]], x_range: Range, y_range: Range, index: int
) -> str:
    """One line, broken where values are missing, with a dot at its end and values on hovering."""
    parts, pen, last, hovers = [], "M", None, []
    for x, y in line:
        if y is None or not finite(y):
            pen = "M"
            continue
        left, top = place_x(x, x_range), place_y(y, y_range)
        parts.append(f"{pen}{left:.1f} {top:.1f}")
        pen, last = "L", (left, top)
        tip = escape(f"{name}: {number(y)} at {number(x)}")
        hovers.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="6"><title>{tip}</title></circle>')
    if last is None:
        return ""
    dash = DASHES[index % len(DASHES)]
    style = f' stroke-dasharray="{dash}"' if dash else ""
    colour = f"var(--s{index % COLOURS})"
    return (
        f'<path class="line" style="stroke:{colour}"{style} d="{"".join(parts)}"/>'
        f'<circle style="fill:{colour}" cx="{last[0]:.1f}" cy="{last[1]:.1f}" r="3.5"/>'
        f'<g class="hover">{"".join(hovers)}</g>'
    )


def histogram(block: Histogram) -> str:
    """Columns of counts, with named marks."""
    values = [value for value in block.values if finite(value)]
    if not values:
        return empty()
    marked = [place for place in block.marks.values() if finite(place)]
    low, high = spread(values + marked, margin=0)
    width = (high - low) / block.bins
    counts = [0] * block.bins
    for value in values:
        counts[min(int((value - low) / width), block.bins - 1)] += 1
    x_range, y_range = (low, high), (0.0, max(counts) * 1.15)
    body = [axes(x_range, y_range, block.unit, "count", whole_y=True)]
    floor = place_y(0, y_range)
    for index, count in enumerate(counts):
        start = low + index * width
        left, right = place_x(start, x_range), place_x(start + width, x_range)
        top = place_y(count, y_range)
        tip = escape(f"{number(start)} to {number(start + width)} {block.unit}: {count}")
        body.append(
            f'<rect class="column" x="{left + 0.75:.1f}" y="{top:.1f}" '
            f'width="{max(right - left - 1.5, 0.5):.1f}" height="{floor - top:.1f}" rx="1.5">'
            f"<title>{tip}</title></rect>"
        )
    for index, (name, where) in enumerate(block.marks.items()):
        if finite(where):
            text = f"{name} {where:.3g} {block.unit}"
            body.append(mark(text, place_x(where, x_range), floor, index))
    return svg(body, f"{block.title}: {len(values)} values")


def mark(text: str, left: float, floor: float, index: int) -> str:
    """A named upright line; names stand at different heights, so that near ones do not collide."""
    top = TOP + 10 + 15 * (index % 4)
    anchor, shift = ("end", -5) if left > WIDTH * 0.8 else ("start", 5)
    return (
        f'<line class="mark" x1="{left:.1f}" x2="{left:.1f}" y1="{top - 9}" y2="{floor:.1f}"/>'
        f'<text class="marktext" x="{left + shift:.1f}" y="{top}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def bars(block: Bars) -> str:
    """Groups of level bars with standard errors and the baseline's tick."""
    reach = [
        value + (error if finite(error) else 0)
        for name, values in block.series.items()
        for value, error in zip(values, block.errors.get(name) or [0] * len(values), strict=True)
        if finite(value)
    ]
    reach += [value for value in block.baseline if finite(value)]
    if not reach:
        return empty()
    low, high = min(0.0, *reach), block.maximum or max(0.0, *reach) or 1.0
    rows = []
    for index, group in enumerate(block.groups):
        base = block.baseline[index] if block.baseline else None
        tracks = "".join(
            track(block, name, index, slot, base, (low, high))
            for slot, name in enumerate(block.series)
        )
        rows.append(f'<div class="group"><div class="label">{escape(group)}</div>{tracks}</div>')
    key = legend(list(block.series), tick="baseline" if block.baseline else "")
    return f'{key}<div class="bars">{"".join(rows)}</div>'


def track(block: Bars, name: str, index: int, slot: int, base: Number, scale: Range) -> str:
    """One bar, its error whisker, the baseline and the value as text."""
    value = block.series[name][index]
    errors = block.errors.get(name)
    error = errors[index] if errors else None
    drawn, text = "", "–"
    if finite(value):
        left, right = sorted((percent(0, scale), percent(value, scale)))
        drawn = box("bar", left, right, f"background:var(--s{slot % COLOURS})")
        text = number(value)
        if finite(error):
            drawn += box("whisker", percent(value - error, scale), percent(value + error, scale))
            text += f" ± {number(float(f'{error:.2g}'))}"
    if finite(base):
        tip = escape(f"baseline {number(base)} {block.unit}".strip(), quote=True)
        drawn += f'<i class="tick" style="left:{percent(base, scale):.2f}%" title="{tip}"></i>'
    tip = escape(f"{name}: {text} {block.unit}".strip(), quote=True)
    unit = f" {escape(block.unit)}" if block.unit and text != "–" else ""
    return (
        f'<div class="row"><div class="track" title="{tip}">{drawn}</div>'
        f'<div class="value">{escape(text)}{unit}</div></div>'
    )


def funnel(block: Funnel) -> str:
    """What is left after each step, and what the step took."""
    if not block.steps:
        return empty()
    most = max(count for _, count in block.steps) or 1
    rows, before = [], None
    for label, count in block.steps:
        lost = "" if before is None else loss(before, count)
        bar = box("bar", 0, 100 * count / most, "background:var(--s0)")
        rows.append(
            f'<div class="group"><div class="label">{escape(label)}'
            f'<span class="lost">{lost}</span></div><div class="row"><div class="track">{bar}</div>'
            f'<div class="value">{number(count)} {escape(block.unit)}</div></div></div>'
        )
        before = count
    return f'<div class="bars funnel">{"".join(rows)}</div>'


def loss(before: int, after: int) -> str:
    """How a step changed the count."""
    if before == after:
        return "unchanged"
    share = f" ({abs(after - before) / before:.1%})" if before else ""
    return f"{'−' if after < before else '+'}{number(abs(after - before))}{share}"


def legend(names: Sequence[str], *, dashes: bool = False, tick: str = "") -> str:
    """Names of the series beside their colours."""
    items = []
    for index, name in enumerate(names):
        colour = f"var(--s{index % COLOURS})"
        sample = f'<i class="swatch" style="background:{colour}"></i>'
        if dashes:
            dash = DASHES[index % len(DASHES)]
            sample = (
                f'<svg class="sample" viewBox="0 0 22 8" aria-hidden="true"><path class="line" '
                f'style="stroke:{colour}" stroke-dasharray="{dash}" d="M0 4H22"/></svg>'
            )
        items.append(f"<span>{sample}{escape(name)}</span>")
    if tick:
        items.append(f'<span><i class="swatch tickswatch"></i>{escape(tick)}</span>')
    return f'<div class="legend">{"".join(items)}</div>'


def axes(
    x_range: Range, y_range: Range, x_label: str, y_label: str, *, whole_y: bool = False
) -> str:
    """Grid lines, tick numbers and axis names."""
    parts = []
    for value in ticks(y_range, 5, whole=whole_y):
        top = place_y(value, y_range)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{top:.1f}" '
                     f'y2="{top:.1f}"/><text x="{LEFT - 6}" y="{top + 4:.1f}" '
                     f'text-anchor="end">{short(value)}</text>')  # fmt: skip
    for value in ticks(x_range, 6):
        left = place_x(value, x_range)
        parts.append(
            f'<text x="{left:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">'
            f"{short(value)}</text>"
        )
    floor = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="axisname" x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    upright = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="axisname" transform="translate(11 {upright}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    return "".join(parts)


def ticks(span: Range, wanted: int, *, whole: bool = False) -> list[float]:
    """About `wanted` round numbers inside `span`: multiples of 1, 2 or 5 times a power of 10."""
    low, high = span
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    if whole:
        step = max(step, 1.0)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def short(value: float) -> str:
    """A tick's number, short: 20k, 1.5e-4."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1000 if letter == 'k' else limit):g}{letter}"
    if 0 < abs(value) < 1e-3:
        digits, power = f"{value:.6e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:g}"


def spread(values: Sequence[float], margin: float) -> Range:
    """Smallest and largest, with a margin (a share of the span); never of zero width."""
    low, high = min(values), max(values)
    if low == high:
        around = abs(low) * 0.1 or 1.0
        return low - around, high + around
    return low - margin * (high - low), high + margin * (high - low)


def thin(line: Sequence[tuple[float, Number]]) -> list[tuple[float, Number]]:
    """At most about MAX_POINTS: of each stretch its lowest and highest, so that spikes stay."""
    if len(line) <= MAX_POINTS:
        return list(line)
    size = math.ceil(len(line) / (MAX_POINTS // 2))
    kept: list[tuple[float, Number]] = []
    for start in range(0, len(line), size):
        stretch = list(line[start : start + size])
        good = [point for point in stretch if finite(point[1])]
        if len(good) < len(stretch):
            kept.append(next(point for point in stretch if not finite(point[1])))
        if good:
            ends = {min(good, key=lambda p: p[1]), max(good, key=lambda p: p[1])}
            kept += sorted(ends)
    if kept[-1] != line[-1]:
        kept.append(line[-1])
    return kept


def place_x(value: float, span: Range) -> float:
    """Where a value stands from the left, in units of the drawing."""
    return LEFT + (value - span[0]) / (span[1] - span[0]) * (WIDTH - LEFT - RIGHT)


def place_y(value: float, span: Range) -> float:
    """Where a value stands from the top."""
    return HEIGHT - BOTTOM - (value - span[0]) / (span[1] - span[0]) * (HEIGHT - TOP - BOTTOM)


def percent(value: float, scale: Range) -> float:
    """Where a value stands on a bar's track, in per cent of its width, never outside."""
    return min(max(100 * (value - scale[0]) / (scale[1] - scale[0]), 0.0), 100.0)


def box(kind: str, left: float, right: float, style: str = "") -> str:
    """A box on a track, from left to right in per cent."""
    return f'<i class="{kind}" style="left:{left:.2f}%;width:{right - left:.2f}%;{style}"></i>'


def svg(parts: Sequence[str], label: str) -> str:
    """The drawing, with a name for those who cannot see it."""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label, quote=True)}">{"".join(parts)}</svg>'
    )


def empty() -> str:
    """What stands where there is nothing to draw."""
    return '<p class="note">no values</p>'
