"""The figures of a report, drawn from runs on one class of machine."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from tarflow_fast.report.document import Figures
from tarflow_fast.report.record import Result, Run, cases
from tarflow_fast.report.svg import Bar, Line, Point, bars, plot
from tarflow_fast.report.words import number, ratio_text, seconds_text

__all__ = ["growth", "looks", "roofline", "speedups"]

COLOURS = 6


def looks(rows: Iterable[Result]) -> dict[str, tuple[str, int]]:
    """Variant -> its class of colour and the number of its marker; the same ones in every figure of a section."""
    found: dict[str, tuple[str, int]] = {}
    counts = {"ours": 0, "peer": 1, "baseline": 0}
    for row in rows:
        if row.variant in found or row.role == "context":
            continue
        index = counts[row.role]
        counts[row.role] += 1
        colour = {"baseline": "base", "peer": "peer"}.get(row.role) or f"s{index % COLOURS}"
        found[row.variant] = colour, index
    return found


def speedups(run: Run, look: dict[str, tuple[str, int]]) -> Figures | None:
    """One figure a workload: how many times faster than the baseline every variant is, with its interval and error."""
    by_workload: dict[str, list[Bar]] = {}
    for case, rows in cases(row for row in run.rows if row.role in ("ours", "peer") and row.seconds).items():
        _, _, workload, T, B = case
        title = workload.partition(", guided")[0]
        found = by_workload.setdefault(title, [])
        guided = ", guided" if "guided" in workload else ""
        found.append(Bar(f"batch {B}" + (f", {T} tokens" if T else "") + guided))
        for row in rows:
            ratio = run.ratio(row)
            if ratio is not None:
                error = "" if row.error is None else f"{row.error:.0e}"
                tip = f"{row.name}: {ratio_text(ratio)} of {ratio.rounds} rounds, error {error or 'not measured'}"
                found.append(Bar(row.variant, look[row.variant][0], ratio.median, ratio.low, ratio.high, error, tip))
    drawn = [(f"{run.suite}: {name}", bars(found, "error")) for name, found in by_workload.items() if _drawn(found)]
    return Figures(drawn) if drawn else None


def _drawn(found: Sequence[Bar]) -> bool:
    return any(bar.ratio is not None for bar in found)


def roofline(runs: Sequence[Run], look: dict[str, tuple[str, int]]) -> Figures | None:
    """FLOP/s over FLOPs a byte of every row that knows both, under the peaks measured with them.

    Points are hollow where the weights stay in a cache: there the roof of memory does not hold.
    """
    lines: dict[str, list[Point]] = {}
    streams = {row.case[1:] for run in runs for row in run.rows if row.peak == "memory"}
    for row in (row for run in runs for row in run.rows):
        if row.seconds and row.bytes and row.flops and row.variant in look:
            rate = row.flops / row.median / 1e9
            tip = f"{row.name}: {number(rate)} GFLOP/s" + (f", {row.share:.0%} of {row.peak}" if row.share else "")
            point = Point(row.flops / row.bytes, rate, tip=tip, hollow=row.case[1:] not in streams)
            lines.setdefault(row.variant, []).append(point)
    peaks = {name: max(run.machine.peaks.get(name) or 0 for run in runs) / 1e9
             for name in {name for run in runs for name in run.machine.peaks}}  # fmt: skip
    if not lines or not peaks.get("read"):
        return None
    xs = [point.x for points in lines.values() for point in points]
    roofs = []
    for name, peak in peaks.items():
        if name != "read" and peak and name != "int8":
            knee, first, last = peak / peaks["read"], min(xs) / 1.3, max(xs) * 1.3
            trace = [(first, min(peak, first * peaks["read"])), (knee, peak), (max(last, knee * 1.5), peak)]
            roofs.append(Line(f"{name}, {number(peak)}", "", [Point(x, y) for x, y in trace if x >= first], roof=True))
    drawn = [Line(name, look[name][0], points, look[name][1], False) for name, points in lines.items()]
    drawing = plot([*roofs, *drawn], "FLOPs a byte", "GFLOP/s", 300)
    return Figures([("Roofline: every row that counts bytes and FLOPs", drawing)], wide=True)


def growth(runs: Sequence[Run], look: dict[str, tuple[str, int]]) -> Figures | None:
    """Seconds over T and over B, wherever a workload was run at three values or more."""
    drawn = []
    for run in runs:
        timed = [row for row in run.rows if row.seconds and row.variant in look]
        for axis, other in (("T", "B"), ("B", "T")):
            if axis == "T" and any(row.T is None for row in timed):
                continue
            groups: dict[tuple, list[Result]] = {}
            for row in timed:
                groups.setdefault((row.subject, row.workload, getattr(row, other)), []).append(row)
            for (_, workload, fixed), rows in groups.items():
                if len({getattr(row, axis) for row in rows}) < 3:
                    continue
                title = f"{run.suite}: {workload}, time over {axis}" + (f" at {other} {fixed}" if fixed else "")
                label = "tokens T" if axis == "T" else "batch B"
                drawn.append((title, plot(_lines(rows, axis, look), label, "seconds, with every round's range")))
    return Figures(drawn) if drawn else None


def _lines(rows: Sequence[Result], axis: str, look: dict[str, tuple[str, int]]) -> list[Line]:
    rows = sorted(rows, key=lambda row: (list(look).index(row.variant), getattr(row, axis)))
    return [
        Line(variant, look[variant][0],
             [Point(getattr(row, axis), row.median, min(row.seconds), max(row.seconds), _tip(row))
              for row in of_variant], look[variant][1])
        for variant, of_variant in itertools.groupby(rows, key=lambda row: row.variant)
    ]  # fmt: skip


def _tip(row: Result) -> str:
    return f"{row.name}: {seconds_text(row.median)}"
