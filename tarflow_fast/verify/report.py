"""What `verify_flow` found, as a table for people and as JSON for programs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["FlowReport", "Row"]

Row = dict[str, Any]

ROUND_TRIP, LOG_DET, BLOCKS, JACOBIAN = (
    "round trip", "log-determinant", "amplification by block", "jacobian by block"
)  # fmt: skip
_HEADERS = {  # section: {key of a row: what the table calls it}
    ROUND_TRIP: {
        "name": "error of a row", "rows": "rows", "median": "median", "p999": "99.9 %", "limit": "limit of 99.9 %",
        "largest": "largest", "over_1e-3": "over 1e-3", "over_1e-2": "over 1e-2", "ok": "ok",
    },
    LOG_DET: {
        "name": "nats", "rows": "rows", "median": "median", "largest": "largest", "limit": "limit of largest",
        "median_per_dim": "median / dim", "largest_per_dim": "largest / dim", "ok": "ok",
    },
    BLOCKS: {
        "name": "block", "largest_a": "largest abs(a)", "inverse_stretch": "stretch, inverse",
        "forward_stretch": "stretch, forward", "inverse_overflow": "inverse overflows (limit 0)",
        "forward_overflow": "forward overflows (limit 0)", "error_x": "error of x", "error_z": "error of z", "ok": "ok",
    },
    JACOBIAN: {
        "name": "block", "rows": "rows", "above_diagonal": "above the diagonal (limit 0)",
        "log_det_off": "log-det off by", "limit": "limit of that", "ok": "ok",
    },
}  # fmt: skip
_SHARES = {"over_1e-3", "over_1e-2", "inverse_overflow", "forward_overflow"}


@dataclass(frozen=True)
class FlowReport:
    """The figures of one flow.

    rows: one dict a line of the table, with "section", "name", figures (infinite where a row overflowed, None where
        there is nothing to measure), "limit" where the section has one, and "ok". The keys of a section are the same.
    facts: on what it was measured: rows, sizes, dtype, precision, and what the limits are made of.
    notes: by section, what its limits mean.
    failed: a sentence for everything past its limit.
    """

    rows: list[Row]
    facts: dict[str, Any]
    notes: dict[str, str]
    failed: list[str]

    @property
    def ok(self) -> bool:
        """Whether every figure is within its limit."""
        return all(row["ok"] for row in self.rows)

    def json(self) -> dict[str, Any]:
        """{"ok", "failed", "facts", "notes", "rows"} as JSON can hold it: numbers that are not finite are None."""
        return _finite(
            {"ok": self.ok, "failed": self.failed, "facts": self.facts, "notes": self.notes, "rows": self.rows}
        )

    def table(self) -> str:
        """A markdown table a section, where its limits come from, and the verdict."""
        facts = self.facts
        lines = [
            f"{facts['flow']} of {facts['blocks']} blocks, {facts['tokens']} tokens of {facts['token_size']} numbers, "
            f"{facts['dtype']}, inverse in {facts['precision']}, on {facts['device']}",
            f"x: {facts['rows']} rows, {facts['x']}; z: {facts['rows']} rows of noise, seed {facts['seed']}",
        ]
        for section, headers in _HEADERS.items():
            rows = [row for row in self.rows if row["section"] == section]
            if not rows:
                continue
            cells = [[_cell(key, row[key]) for key in headers] for row in rows]
            lines += ["", f"## {section}", "", _aligned([[*headers.values()], *cells])]
            lines += ["", self.notes[section]]
        verdict = "all within their limits" if self.ok else "NOT all within their limits"
        return "\n".join([*lines, "", verdict, *(f"- {sentence}" for sentence in self.failed)])


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if key in _SHARES:
        return f"{100 * value:.3g} %"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _aligned(cells: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    head, *body = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["-" * width for width in widths], *body])


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
