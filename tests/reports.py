"""Helpers that read a `FlowReport`, for the tests of verify_flow and of its command."""

import math


def section(report, name):
    return [row for row in report.rows if row["section"] == name]


def by_block(report, key):
    return [row[key] for row in report.rows if key in row and row["name"].startswith("block")]


def check_json(found):
    """Checks the JSON of a report: its five parts, equal keys in all rows of a section, and finite numbers or null."""
    assert [*found] == ["ok", "failed", "facts", "notes", "rows"]
    assert found["ok"] is (not found["failed"]) and all(row["ok"] for row in found["rows"]) is found["ok"]
    keys = {}
    for row in found["rows"]:
        assert keys.setdefault(row["section"], [*row]) == [*row] and row["section"] in found["notes"]
        assert isinstance(row["name"], str) and isinstance(row["ok"], bool)
        numbers = [value for key, value in row.items() if key not in ("section", "name", "ok")]
        assert all(value is None or (isinstance(value, (int, float)) and math.isfinite(value)) for value in numbers)
    assert {key for row in found["rows"] for key in row if row["section"] == "round trip"} == {
        "section", "name", "rows", "median", "p999", "limit", "largest", "over_1e-3", "over_1e-2", "ok",
    }  # fmt: skip
