"""Does this installation compute what it should, on this machine? Does a user's flow invert itself (`verify_flow`)?"""

from collections.abc import Callable

from tarflow_fast.verify.flow import verify_flow
from tarflow_fast.verify.layer import verify_layer
from tarflow_fast.verify.model import verify_model
from tarflow_fast.verify.ops import verify_ops
from tarflow_fast.verify.report import FlowReport
from tarflow_fast.verify.rule import Row, error_and_bound

__all__ = ["SUITES", "FlowReport", "Row", "error_and_bound", "run", "verify_flow", "verify_ops"]

# What `run` runs, in order: each takes a device and gives rows.
SUITES: list[Callable[[str], list[Row]]] = [verify_ops, verify_layer, verify_model]


def run(device: str = "cpu") -> tuple[list[Row], bool]:
    """All rows, and whether every one is ok."""
    rows = [row for suite in SUITES for row in suite(device)]
    return rows, all(row["ok"] for row in rows)
