"""The report: a section for each class of machine, from its speedups to the commands that repeat them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tarflow_fast.report.document import Block, Code, Heading, Table, Text
from tarflow_fast.report.figures import growth, looks, roofline, speedups
from tarflow_fast.report.interval import FEWEST, Interval
from tarflow_fast.report.read import Results
from tarflow_fast.report.record import Result, Run, cases
from tarflow_fast.report.words import amount, number, ratio_text, seconds_text

__all__ = ["losing", "machine_blocks", "report_blocks", "rows_table"]

TITLE = "tarflow_fast: how fast, how exact, and where it loses"
HOW = (
    "A ratio is the median over rounds of the baseline's time by the variant's, both of one round: above 1 the variant "
    "is faster. In brackets is its 95 % interval by bootstrap over the rounds. Of fewer than "
    f"{FEWEST} rounds the brackets hold the whole range, and their number is said. The interval covers the noise "
    "within a run only: another run on a shared machine may differ by more."
)


def report_blocks(results: Results) -> list[Block]:
    blocks: list[Block] = [Heading(TITLE, 1), Text(HOW)]
    if len(results.runs) > 1:
        blocks.append(Text(f"{len(results.runs)} classes of machine follow. Nothing is averaged over them."))
    for name, runs in results.runs.items():
        blocks += [Heading(name), *_section(runs)]
    if results.unread:
        blocks.append(Heading("Files left out"))
        blocks.append(Table("Files of the folders without rounds", ("file", "why"), results.unread))
    return blocks


def _section(runs: Sequence[Run]) -> Iterator[Block]:
    look = looks(row for run in runs for row in run.rows)
    lost = losing(runs)
    rows = [row for run in runs for row in run.rows if row.role == "ours" and row.seconds]
    cases_lost = {row.key for _, row, *_ in lost}
    yield Text(
        f"{len(rows)} rows of ours were timed. Not clearly faster than the baseline and every peer: {len(cases_lost)}; "
        "see the losing cases."
    )
    yield Heading("Speedup by workload", 3)
    for run in runs:
        figures = speedups(run, look)
        if figures:
            yield figures
    yield Heading("Losing cases", 3)
    yield _losing_table(lost)
    figures = roofline(runs, look)
    if figures:
        yield Heading("How close to the machine's peaks", 3)
        yield Text(
            "The roofs are the peaks that were measured on this machine: the speed of memory, and the arithmetic of "
            "each format. A point is hollow where the weights stay in a cache: the sloping roof of memory does not "
            "bound it. A point above a roof ran while the machine was faster than when its peak was measured, or a "
            "cache served a part of its bytes. Rows that count no bytes are in the tables only."
        )
        yield figures
    figures = growth(runs, look)
    if figures:
        yield Heading("Time over T and B", 3)
        yield figures
    memory = [row for run in runs for row in run.rows if row.peak_memory is not None]
    if memory:
        yield Heading("Memory", 3)
        yield _memory_table(memory)
    yield Heading("All rows", 3)
    for run in runs:
        if any(row.seconds for row in run.rows):
            yield rows_table(run)
    dropped = [(each.name, each.why) for run in runs for each in run.dropped]
    if dropped:
        yield Heading("Rows that were dropped", 3)
        yield Table("Not measured", ("row", "why"), sorted(set(dropped)))
    yield Heading("Machine, versions, commands", 3)
    yield from machine_blocks(runs)


def losing(runs: Sequence[Run]) -> list[tuple[Run, Result, Result, Interval]]:
    """Every row of ours that is not clearly faster than a baseline or a peer of its case, and which one that is.

    Its baseline counts, and so does every peer; of a case with several baselines (one a precision), only its own does.
    """
    found = []
    for run in runs:
        for rows in cases(run.rows).values():
            for row in rows:
                rivals = [other for other in rows if other.role == "peer" or other.variant == row.baseline]
                for other in rivals if row.role == "ours" else ():
                    ratio = run.ratio(row, other)
                    if ratio is not None and ratio.low <= 1:
                        found.append((run, row, other, ratio))
    return sorted(found, key=lambda each: each[3].median)


def _losing_table(lost: list[tuple[Run, Result, Result, Interval]]) -> Block:
    if not lost:
        return Text("None: every row of ours is faster than its baseline and its peers, with the whole interval.")
    return Table(
        "Ours against a baseline or peer: a ratio below 1, or an interval that touches 1",
        ("row", "against", "ratio", "ours", "theirs", "error", "verdict"),
        [
            (row.name, other.variant, ratio_text(ratio), seconds_text(row.median), seconds_text(other.median),
             _error(row), "slower" if ratio.high < 1 else "no difference seen")
            for _, row, other, ratio in lost
        ],
    )  # fmt: skip


def _memory_table(rows: Sequence[Result]) -> Table:
    return Table(
        "Memory that a call adds at its peak",
        ("row", "added", "of the baseline"),
        [(row.name, amount(row.peak_memory, "B"), _of_baseline(row, rows)) for row in rows],
    )


def _of_baseline(row: Result, rows: Sequence[Result]) -> str:
    base = next((other for other in rows if other.key == (*row.case, row.baseline)), None)
    return number(row.peak_memory / base.peak_memory) if base is not None and base.peak_memory else "-"


def rows_table(run: Run) -> Table:
    """Every row that has times, with its interval, error, amounts and share of the peak that binds it."""
    rows, columns = [], ("row", "T", "time", "rounds", "baseline", "ratio", "error", "allowed", "bytes", "FLOPs",
                         "GB/s", "GFLOP/s", "peak that binds", "share")  # fmt: skip
    for row in run.rows:
        if not row.seconds:
            continue
        rows.append((
            f"{row.workload}, B {row.B}, {row.variant}", str(row.T or "-"), seconds_text(row.median),
            str(len(row.seconds)), row.baseline or "-", ratio_text(run.ratio(row)), _error(row),
            "-" if row.error_bound is None else f"{row.error_bound:.1e}", amount(row.bytes, "B"), amount(row.flops, ""),
            number(row.bytes / row.median / 1e9) if row.bytes else "-",
            number(row.flops / row.median / 1e9) if row.flops else "-",
            f"{row.peak}, {_rate(row)}" if row.peak_rate else "-", "-" if row.share is None else f"{row.share:.0%}",
        ))  # fmt: skip
    said = " ".join(sorted({f"Errors are of {row.error_of}." for row in run.rows if row.error_of}))
    said += " ".join(sorted({f" Bytes and FLOPs: {row.formula}." for row in run.rows if row.formula}))
    notes = " ".join(sorted({f" {row.note}." for row in run.rows if row.note}))
    return Table(f"{run.suite}. {said}{notes}".strip(), columns, rows)


def _rate(row: Result) -> str:
    return f"{row.peak_rate / 1e9:.0f} {'GB/s' if row.peak == 'memory' else 'GFLOP/s'}"


def _error(row: Result) -> str:
    return "-" if row.error is None else f"{row.error:.1e}"


def machine_blocks(runs: Sequence[Run]) -> Iterator[Block]:
    """What is the same in all runs once, and what differs, by file."""
    facts = [run.machine.facts() for run in runs]
    names = list(dict.fromkeys(name for each in facts for name in each))
    same = [name for name in names if len({each.get(name) for each in facts}) == 1]
    if same:
        yield Table("The same in all files", ("what", "value"), [(name, facts[0][name]) for name in same])
    other = [name for name in names if name not in same]
    if other:
        yield Table(
            "By file",
            ("file", *other),
            [(run.source or run.suite, *(each.get(name, "-") for name in other))
             for run, each in zip(runs, facts, strict=True)],
        )  # fmt: skip
    yield Code(list(dict.fromkeys(run.command for run in runs)))
