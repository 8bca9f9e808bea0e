"""Charts of the page as HTML and SVG, drawn by the browser alone: no script, nothing to load, any width."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 210, 52, 12, 12, 30
"""The size and margins of a line chart, in its own units."""


class Bar(NamedTuple):
    """A row of bars: its name as HTML, the parts of its bar by CSS class, the text after it, and marks across it."""

    name: str
    parts: Mapping[str, float]
    text: str
    marks: Mapping[str, float] = {}


def bars(rows: Sequence[Bar], most: float | None = None) -> str:
    """Stacked bars, one per row, on one scale up to `most`; `marks` are lines across a bar, at its end if beyond."""
    longest = most or max((sum(row.parts.values()) for row in rows), default=0.0) or 1.0

    def share(value: float) -> float:
        return 100 * min(max(value / longest, 0.0), 1.0)

    def row_of(row: Bar) -> str:
        fills = "".join(
            f'<i class="{css}" style="width:{share(value):.2f}%"></i>' for css, value in row.parts.items() if value
        )
        marks = "".join(f'<b class="{css}" style="left:{share(value):.2f}%"></b>' for css, value in row.marks.items())
        track = f'<div class="track">{fills}{marks}</div>'
        return f'<div class="bar"><span>{row.name}</span>{track}<span class="number">{escape(row.text)}</span></div>'

    return "".join(map(row_of, rows))


def keys(names: Mapping[str, str]) -> str:
    """A legend: names by CSS class."""
    each = (f'<span class="key"><i class="{css}"></i>{escape(name)}</span>' for css, name in names.items())
    return f"<p>{''.join(each)}</p>"


def lines(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    shown: Callable[[float], str],
    *,
    label: str = "time step",
    band: Sequence[tuple[float, float, float]] = (),
) -> str:
    """A line chart starting at zero: points (whole number, value) by series, with values printed by `shown`.

    `band` is an interval, (whole number, low, high), of the first series.
    """
    points = [point for one in series.values() for point in one]
    if not points:
        return ""
    low, high = (choice(x for x, _ in points) for choice in (min, max))
    step, top = _scale(max(y for _, y in [*points, *((x, end) for x, _, end in band)]))

    def at(x: float, y: float) -> tuple[float, float]:
        across = 0.5 if high == low else (x - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in range(round(top / step) + 1):
        y = at(low, tick * step)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{escape(shown(tick * step))}</text>')
    whole = range(round(low), round(high) + 1)
    for x in whole[:: math.ceil(len(whole) / 10)]:
        parts.append(f'<text x="{at(x, 0)[0]:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{x}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(label)}</text>')
    if band:
        edge = [*((x, upper) for x, _, upper in band), *((x, max(lower, 0.0)) for x, lower, _ in reversed(band))]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in edge))
        parts.append(f'<polygon class="s0" points="{path}"/>')
    for number, (name, one) in enumerate(series.items()):
        where = [at(x, y) for x, y in one]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in where)
        parts.append(f'<g class="s{number % 6}"><title>{escape(name)}</title><polyline points="{path}"/>{dots}</g>')
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    legend = keys({f"s{number % 6}": name for number, name in enumerate(series)}) if len(series) > 1 else ""
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{drawing}{legend}</figure>'


def _scale(most: float) -> tuple[float, float]:
    """The distance between the grid lines of a chart, and the highest one, three to six lines up."""
    if most <= 0:
        return 1.0, 1.0
    rough = most / 4
    size = 10 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough * 0.999)
    return step, step * math.ceil(most / step * 0.999)


def tabs(group: str, contents: Mapping[str, str]) -> str:
    """Several contents of which one is visible, chosen by name; without a script."""
    inputs = "".join(
        f'<input type="radio" name="{group}" id="{group}{number}"{" checked" if not number else ""}>'
        f'<label for="{group}{number}">{escape(name)}</label>'
        for number, name in enumerate(contents)
    )
    shown = "".join(
        f"#{group}{number}:checked ~ .panels > div:nth-child({number + 1}) {{ display: block; }}"
        for number in range(len(contents))
    )
    panels = "".join(f"<div>{content}</div>" for content in contents.values())
    return f'<div class="tabs"><style>{shown}</style>{inputs}<div class="panels">{panels}</div></div>'
