"""Two runs of the same benches, before and after a change: which rows moved, as far as the noise lets one say.

Medians of two runs on a shared machine differ by more than the rounds of either show. Between two runs of one
engine, minutes apart, the intervals of 60 rows of 108 excluded 1. So a row is called faster or slower only where

1. the interval of median(before) / median(after) excludes 1,
2. the interval of the movement against its baseline, which ran in the same rounds, excludes 1 on the same side, and
3. both movements are larger than those of the controls, which are the peers: nothing of ours runs in them. What counts
   is the 95 % quantile of their movements against the baseline. Where memory binds a row, both must be larger than
   the movement of the memory's speed, too.

With these rules, no row of ours of those runs is called so. A movement larger than any control's can still be the
machine's: to claim a change, run both sides twice.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tarflow_fast.report.document import Block, Heading, Table, Text
from tarflow_fast.report.interval import Interval, ratio_of_medians
from tarflow_fast.report.page import machine_blocks
from tarflow_fast.report.read import Results
from tarflow_fast.report.record import Result, Run
from tarflow_fast.report.words import number, ratio_text, seconds_text

__all__ = ["Movement", "compare", "compare_blocks"]

UNSEEN = "no difference seen"


@dataclass(frozen=True)
class Movement:
    """A row of both runs. raw: median(before) / median(after); own: the same of the ratios to the baseline, or None."""

    before: Result
    after: Result
    raw: Interval
    own: Interval | None
    verdict: str

    @property
    def control(self) -> bool:
        return self.before.role != "ours"


def compare(before: Results, after: Results) -> list[Movement]:
    """The rows that both hold, in their order; `verdict` is "faster", "slower", "no difference seen" or "control".

    Raises ValueError where the classes of machine differ or no row is in both.
    """
    first, second = before.one_class, after.one_class
    names = first[0].machine.name, second[0].machine.name
    if names[0] != names[1]:
        raise ValueError(
            f"report: before and after must come from one class of machine, got {names[0]!r} and {names[1]!r}: "
            "times of different machines say nothing about a change"
        )
    later = {row.key: (run, row) for run in second for row in run.rows if row.seconds}
    pairs = [(run, row, *later[row.key]) for run in first for row in run.rows if row.seconds and row.key in later]
    if not pairs:
        raise ValueError("report: before and after must have rows in common, got none")
    movements = [
        (one, two, ratio_of_medians(one.seconds, two.seconds), _own(a, one, b, two)) for a, one, b, two in pairs
    ]
    control = _control([own for one, _, _, own in movements if one.role == "peer" and own])
    return [
        Movement(one, two, raw, own, "control" if one.role != "ours" else _verdict(one, two, raw, own, control))
        for one, two, raw, own in movements
    ]


def _own(a: Run, one: Result, b: Run, two: Result) -> Interval | None:
    """How the ratio to the baseline moved, where the baseline ran in the same rounds both times."""
    bases = a.row(one.case, one.baseline), b.row(two.case, two.baseline)
    for row, base in zip((one, two), bases, strict=True):
        if base is None or not (row.paired and base.paired) or len(base.seconds) != len(row.seconds):
            return None
    ratios = [[theirs / ours for theirs, ours in zip(base.seconds, row.seconds, strict=True)]
              for row, base in zip((one, two), bases, strict=True)]  # fmt: skip
    return ratio_of_medians(ratios[1], ratios[0])  # a ratio that grew means that the row became faster


def _control(movements: Sequence[Interval]) -> float:
    """|log| of a movement that few controls exceed."""
    sizes = sorted(abs(math.log(each.median)) for each in movements)
    return sizes[min(len(sizes) - 1, math.ceil(0.95 * len(sizes)) - 1)] if sizes else 0.0


def _verdict(one: Result, two: Result, raw: Interval, own: Interval | None, control: float) -> str:
    seen = [each for each in (raw, own) if each is not None]
    limit = control
    if one.peak == two.peak == "memory" and one.peak_rate and two.peak_rate:
        limit = max(limit, abs(math.log(one.peak_rate / two.peak_rate)))
    sides = {each.side for each in seen}
    if len(sides) > 1 or 0 in sides or min(abs(math.log(each.median)) for each in seen) <= limit:
        return UNSEEN
    return "faster" if sides == {1} else "slower"


def median_movement(movements: Sequence[Movement]) -> float:
    """The median over rows of median(before) / median(after); 1 of none."""
    return statistics.median([each.raw.median for each in movements] or [1.0])


def compare_blocks(before: Results, after: Results) -> list[Block]:
    movements = compare(before, after)
    ours = [each for each in movements if not each.control]
    controls = [each for each in movements if each.control]
    names = {key for results in (before, after) for run in results.one_class for key in (row.key for row in run.rows)}
    counted = ", ".join(f"{sum(each.verdict == name for each in ours)} {name}" for name in ("faster", "slower", UNSEEN))
    said = (
        f"{len(ours)} rows of ours: {counted}. The median row of ours is {number(median_movement(ours))} times as fast"
    )
    if controls:
        said += (
            f"; the median baseline or peer, in which nothing of ours runs, {number(median_movement(controls))} times"
        )
    limit = math.exp(_control([each.own for each in movements if each.before.role == "peer" and each.own]))
    blocks: list[Block] = [
        Heading("tarflow_fast: before and after", 1),
        Text(said + "."),
        Text(
            "A ratio above 1 means that the row became faster. A row is called faster or slower only where both "
            "intervals exclude 1 on the same side and both movements exceed those of the peers "
            f"(here {number(limit)} times) and, where memory binds, the movement of its speed. Otherwise no difference "
            "was seen, which does not mean that there is none. Two runs of one engine on a shared machine can still "
            "differ by more: run both sides again before you claim a change."
        ),
    ]
    for verdict in ("slower", "faster"):
        found = [each for each in ours if each.verdict == verdict]
        if found:
            blocks += [Heading(verdict.capitalize()), _table(f"Rows that became {verdict}", found)]
    blocks += [Heading("All rows in both"), _table("All rows in both", movements)]
    alone = len(names) - len(movements)
    if alone:
        blocks.append(Text(f"{alone} rows are left out: they have no times, or only one of the two results has them."))
    for title, results in (("Before", before), ("After", after)):
        blocks += [Heading(title), *machine_blocks(results.one_class)]
    return blocks


def _table(title: str, movements: Sequence[Movement]) -> Table:
    columns = (
        "row",
        "before",
        "after",
        "before / after",
        "against its baseline",
        "error before",
        "error after",
        "verdict",
    )
    return Table(title, columns, [
        (each.before.name, seconds_text(each.before.median), seconds_text(each.after.median), ratio_text(each.raw),
         ratio_text(each.own), *("-" if row.error is None else f"{row.error:.1e}" for row in (each.before, each.after)),
         each.verdict)
        for each in movements
    ])  # fmt: skip
