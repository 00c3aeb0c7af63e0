"""Drawings as SVG text: bars of ratios with their intervals, and logarithmic plots of lines and points.

All are 360 wide, with letters of 11, so that they read the same on a phone and in a column of a wide page. Colours are
classes, which style.py defines. Every drawing names itself by the title of its figure ({id}, see document.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Line", "Point", "bars", "plot"]

WIDTH = 360
STEP = 15  # between the lines of text
_MARKS = 6


@dataclass(frozen=True)
class Bar:
    """A row of `bars`: a ratio and its interval, or a heading where ratio is None."""

    label: str
    look: str = ""
    ratio: float | None = None
    low: float = 1.0
    high: float = 1.0
    note: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Point:
    """x, y, and the ends of y's interval; tip is what a pointer that rests on it shows."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    tip: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Line:
    """Points of one look. mark: the number of its marker; joined: whether a line joins them; roof: no markers."""

    label: str
    look: str
    points: Sequence[Point]
    mark: int = 0
    joined: bool = True
    roof: bool = False


def bars(rows: Sequence[Bar], note: str) -> str:
    """Ratios on a logarithmic scale from a line at 1, to the right where they are above. note: what the notes are."""
    drawn = [row for row in rows if row.ratio is not None]
    low, high = min(1.0, *(row.low for row in drawn)) / 1.08, max(1.0, *(row.high for row in drawn)) * 1.08
    left, right, top = 92, 246, STEP
    bottom = top + STEP * len(rows) + 4

    def place(value: float) -> float:
        return left + (right - left) * math.log(value / low) / math.log(high / low)

    out = [_text(296, 11, "ratio", "soft end"), _text(WIDTH, 11, note, "soft end")]
    for tick in _ticks(low, high, 5):
        x = place(tick)
        out += [_line(x, top, x, bottom, "grid"), _text(x, bottom + 12, _number(tick), "soft mid")]
    out.append(_line(place(1.0), top, place(1.0), bottom, "one"))
    for i, row in enumerate(rows):
        y = top + STEP * i + 11
        if row.ratio is None:
            out.append(_text(0, y, row.label, "head"))
            continue
        x, one = place(row.ratio), place(1.0)
        out += [
            f"<g><title>{escape(row.tip)}</title>",
            f'<rect class="{row.look}" x="{min(x, one):.1f}" y="{y - 9}" width="{abs(x - one):.1f}" height="9" '
            'stroke="none" fill-opacity="0.8"/>',
            _line(place(row.low), y - 4.5, place(row.high), y - 4.5, "whisker"),
            _line(place(row.low), y - 7.5, place(row.low), y - 1.5, "whisker"),
            _line(place(row.high), y - 7.5, place(row.high), y - 1.5, "whisker"),
            "</g>",
            _text(88, y, row.label, "end"),
            _text(296, y, _number(row.ratio), "end losing" if row.low <= 1 else "end"),
            _text(WIDTH, y, row.note, "soft end"),
        ]
    return _svg(bottom + 18, out)


def plot(lines: Sequence[Line], x_label: str, y_label: str, height: int = 230) -> str:
    """Lines and points on two logarithmic axes, with a legend below."""
    points = [point for line in lines for point in line.points]
    xs = [point.x for point in points]
    ys = [value for point in points for value in (point.y, point.low, point.high) if value]
    (x0, x1), (y0, y1) = _range(xs), _range(ys)
    left, right, top, bottom = 44, WIDTH - 8, 20, height

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = math.log(x / x0) / math.log(x1 / x0), math.log(y / y0) / math.log(y1 / y0)
        return left + (right - left) * across, bottom - (bottom - top) * up

    out = [_text(0, 11, y_label, "soft")]
    for tick in _ticks(x0, x1, 7):
        x, _ = place(tick, y0)
        out += [_line(x, top, x, bottom, "grid"), _text(x, bottom + 13, _number(tick), "soft mid")]
    for tick in _ticks(y0, y1, 7):
        _, y = place(x0, tick)
        out += [_line(left, y, right, y, "grid"), _text(left - 4, y + 4, _number(tick), "soft end")]
    out.append(_text(right, bottom + 27, x_label, "soft end"))
    for line in lines:
        places = [place(point.x, point.y) for point in line.points]
        if line.joined and len(places) > 1:
            trace = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            look = "roof" if line.roof else f"path {line.look}"
            out.append(f'<polyline class="{look}" style="fill:none" points="{trace}"/>')
        if line.roof:
            x, y = places[-1]
            out.append(_text(right, y - 4, line.label, "soft end"))
            continue
        for point, (x, y) in zip(line.points, places, strict=True):
            whisker = ""
            if point.low and point.high:
                whisker = _line(x, place(point.x, point.low)[1], x, place(point.x, point.high)[1], line.look)
            out.append(f"<g><title>{escape(point.tip)}</title>{whisker}{_mark(x, y, line, point.hollow)}</g>")
    return _svg(*_legend(lines, bottom + 34, out))


def _legend(lines: Sequence[Line], y: float, out: list[str]) -> tuple[float, list[str]]:
    named = [line for line in lines if not line.roof]
    for i, line in enumerate(named):
        x, row = 6 + 118 * (i % 3), y + STEP * (i // 3) + 10
        out += [_mark(x, row - 4, line, False), _text(x + 9, row, line.label, "")]
    return y + STEP * math.ceil(len(named) / 3) + 4, out


def _mark(x: float, y: float, line: Line, hollow: bool) -> str:
    """A circle, square, diamond, triangle, triangle on its head, or a flat bar."""
    r, look = 3.2, line.look + (" hollow" if hollow else "")
    if line.mark % _MARKS == 0:
        return f'<circle class="{look}" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    corners = (
        ((-r, -r), (r, -r), (r, r), (-r, r)),
        ((0, -4.4), (4.4, 0), (0, 4.4), (-4.4, 0)),
        ((0, -4), (4, 3), (-4, 3)),
        ((0, 4), (4, -3), (-4, -3)),
        ((-4.4, -1.4), (4.4, -1.4), (4.4, 1.4), (-4.4, 1.4)),
    )[line.mark % _MARKS - 1]
    return f'<polygon class="{look}" points="' + " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners) + '"/>'


def _svg(height: float, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-labelledby="{{id}}">'
    return "\n".join([head, '<title id="{id}">{title}</title>', *parts, "</svg>"])


def _text(x: float, y: float, text: str, look: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"' + (f' class="{look}"' if look else "") + f">{escape(text)}</text>"


def _line(x0: float, y0: float, x1: float, y1: float, look: str) -> str:
    return f'<line class="{look}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.06, 1.12)
    return low / margin, high * margin


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers in a logarithmic range, `most` or fewer: 1, 2, 5 and so on, or powers of ten, or fewer."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    choices = [[digit * 10.0**p for p in range(first, last + 1) for digit in (1, 2, 5)]]
    choices += [[digit * 10.0**p for p in range(first, last + 1) for digit in (1, 3)]]
    choices += [[10.0**p for p in range(first, last + 1, step)] for step in (1, 2, 3, 4)]
    for choice in choices:
        ticks = [tick for tick in choice if low <= tick <= high]
        if len(ticks) <= most:
            return ticks
    return ticks


def _number(value: float) -> str:
    """At most three digits, without a power of ten between 0.001 and 100 000."""
    if value == 0 or not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"
