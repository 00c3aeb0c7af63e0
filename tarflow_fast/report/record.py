"""The one form of a measured result, on CPUs and GPUs: what bench/ writes and the report reads, as JSON.

A file holds one suite that ran on one machine:

    {"schema": 1, "suite": ..., "command": ..., "machine": {...}, "rows": [...], "dropped": [...]}

or several of them, {"schema": 1, "runs": [...], "tables": {...}}, which is what one `pytest bench/` writes. The tables
are what suites without rounds tell; the report leaves them out.
A row is a `Result`. Every figure that can be computed from the seconds of its rounds is computed from them when the
file is read; `ratio` and `share` stand in the file for other readers only.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tarflow_fast.files import write_atomic
from tarflow_fast.report.interval import Interval, paired_ratio, ratio_of_medians
from tarflow_fast.report.machine import Machine

__all__ = ["ROLES", "SCHEMA", "Dropped", "Result", "Run", "binding", "write_runs"]

SCHEMA = 1
ROLES = ("ours", "baseline", "peer", "context")


@dataclass(frozen=True)
class Result:
    """One variant on one workload. Seconds, bytes, FLOPs and rates are plain numbers in SI units.

    suite, subject: the benchmark, and what it times ("reverse", "log_prob").
    workload, T, B: the flow, with what belongs to it ("mnist, guided"); tokens; rows of the batch.
    variant, role: which implementation, and whether it is "ours", the "baseline", a "peer" that somebody else would use
        instead, or "context", which computes something else and is compared with nothing.
    baseline: the variant that the ratio divides by; paired: whether both ran in the same rounds, one after another.
    seconds: of every round, (n,); cold: of every round's first run, which finds the caches as others left them.
    error, error_bound, error_of: the error, the most that was allowed, and what it is an error of.
    peak_memory: bytes that the call adds at its peak.
    bytes, flops: what the call must move and compute, by `formula`.
    peak, peak_rate: the peak of the machine that binds ("memory", else the format of the arithmetic), in bytes or FLOP
        a second.
    """

    suite: str
    subject: str
    workload: str
    B: int
    variant: str
    role: str
    T: int | None = None
    baseline: str | None = None
    paired: bool = True
    seconds: tuple[float, ...] = ()
    cold: tuple[float, ...] = ()
    error: float | None = None
    error_bound: float | None = None
    error_of: str = ""
    peak_memory: float | None = None
    bytes: float | None = None
    flops: float | None = None
    peak: str = ""
    peak_rate: float | None = None
    formula: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("seconds", "cold"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not all(isinstance(s, (int, float)) and 0 < s < math.inf for s in getattr(self, name)):
                raise ValueError(f"Result: {name} must be positive finite numbers, got {getattr(self, name)!r:.80}")
        if self.role not in ROLES:
            raise ValueError(f"Result: role must be one of {', '.join(ROLES)}, got {self.role!r}")

    @property
    def case(self) -> tuple:
        """What is computed: the rows that agree in it are alternatives to one another."""
        return self.suite, self.subject, self.workload, self.T, self.B

    @property
    def key(self) -> tuple:
        return *self.case, self.variant

    @property
    def name(self) -> str:
        T = f", T {self.T}" if self.T else ""
        return f"{self.suite}: {self.workload}{T}, B {self.B}, {self.variant}"

    @property
    def median(self) -> float | None:
        """Seconds."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def share(self) -> float | None:
        """How much of the peak that binds the median reaches. Above 1 where a cache holds a part of what is counted."""
        amount = self.bytes if self.peak == "memory" else self.flops
        return amount / self.median / self.peak_rate if self.seconds and self.peak_rate and amount else None


@dataclass(frozen=True)
class Dropped:
    """A row that was not measured."""

    name: str
    why: str


@dataclass
class Run:
    """The results of one suite on one machine. `command` is what repeats it; `source` is the file it was read from."""

    suite: str
    machine: Machine
    command: str
    rows: list[Result]
    dropped: list[Dropped] = field(default_factory=list)
    source: str = ""

    def __post_init__(self) -> None:
        self._by_key = {row.key: row for row in self.rows}
        if len(self._by_key) < len(self.rows):
            twice = collections.Counter(row.name for row in self.rows).most_common(1)[0][0]
            raise ValueError(f"Run: rows must differ in suite, subject, workload, T, B or variant, got two of {twice}")

    def row(self, case: tuple, variant: str | None) -> Result | None:
        return self._by_key.get((*case, variant))

    def ratio(self, row: Result, against: Result | None = None) -> Interval | None:
        """How many times faster `row` is than `against`, or than its baseline; None where one of them has no times."""
        other = self.row(row.case, row.baseline) if against is None else against
        if other is None or not row.seconds or not other.seconds:
            return None
        if row.paired and other.paired and len(row.seconds) == len(other.seconds):
            return paired_ratio(other.seconds, row.seconds)
        return ratio_of_medians(other.seconds, row.seconds)

    def json(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            ratio = self.ratio(row)
            told = {name: value for name, value in dataclasses.asdict(row).items() if value not in (None, "", ())}
            rows.append(told | {"ratio": dataclasses.asdict(ratio) if ratio else None, "share": row.share})
        return {
            "schema": SCHEMA, "suite": self.suite, "command": self.command, "machine": self.machine.json(),
            "rows": rows, "dropped": [dataclasses.asdict(each) for each in self.dropped],
        }  # fmt: skip

    def write(self, path: str | Path) -> None:
        """Writes the file, whole or not at all."""
        _write(self.json(), path)

    @classmethod
    def from_json(cls, found: dict[str, Any], source: str) -> Run:
        """Raises ValueError for another schema, and for rows that are not `Result`s."""
        if found.get("schema") != SCHEMA:
            raise ValueError(f"report: {source} must have schema {SCHEMA}, got {found.get('schema')!r}")
        try:
            rows = [Result(**{k: v for k, v in row.items() if k not in ("ratio", "share")}) for row in found["rows"]]
            dropped = [Dropped(**each) for each in found["dropped"]]
            return cls(found["suite"], Machine(**found["machine"]), found["command"], rows, dropped, source)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"report: {source} is not a file of results: {error}") from error


def write_runs(runs: Iterable[Run], path: str | Path, tables: dict[str, list[dict[str, Any]]] | None = None) -> None:
    """Writes the runs of several suites to one file, whole or not at all. tables: rows that are for people alone."""
    _write({"schema": SCHEMA, "runs": [run.json() for run in runs], "tables": tables or {}}, path)


def _write(whole: dict[str, Any], path: str | Path) -> None:
    text = json.dumps(whole, indent=1, allow_nan=False) + "\n"
    # A list of numbers stands on one line, since rounds by the dozen make a file that nobody can read.
    text = re.sub(r"\[\s+([-+.\deE,\s]+?)\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)
    write_atomic(path, lambda temporary: temporary.write_text(text))


def binding(
    bytes: float | None, flops: float | None, bandwidth: float | None, arithmetic: float | None, format: str
) -> tuple[str, float | None]:
    """The peak that sets the least time, max(bytes / bandwidth, flops / arithmetic), and its rate.

    bandwidth: bytes a second; None where what is moved stays in a cache. arithmetic: FLOP a second of `format`.
    """
    memory = bytes / bandwidth if bytes and bandwidth else 0.0
    product = flops / arithmetic if flops and arithmetic else 0.0
    if not memory and not product:
        return "", None
    return ("memory", bandwidth) if memory > product else (format, arithmetic)


def cases(rows: Iterable[Result]) -> dict[tuple, list[Result]]:
    """The rows by case, in their order."""
    found: dict[tuple, list[Result]] = {}
    for row in rows:
        found.setdefault(row.case, []).append(row)
    return found
