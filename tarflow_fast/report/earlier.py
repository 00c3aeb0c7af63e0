"""Reads the files that bench/ wrote before there was a `Result`: tables as JSON, with the seconds of their rounds.

They keep rates, not amounts, so bytes and FLOPs are worked back from the largest rate of a case, which has the most
digits. They keep no bounds of errors. A table without rounds (scaling) gives its median as the only one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tarflow_fast.report.machine import Machine
from tarflow_fast.report.record import Result, Run

__all__ = ["EARLIER", "read_earlier"]

ROLES = {"reference": "baseline", "improved": "peer", "compiled": "peer"}
ROUNDED = "bytes and FLOPs worked back from rounded rates"


def read_earlier(suite: str, found: dict[str, Any], source: str) -> Run:
    machine = _machine(found["machine"])
    return Run(suite, machine, found["command"], [*EARLIER[suite](found["rows"], machine.peaks)], source=source)


def _machine(facts: dict[str, Any]) -> Machine:
    cpu = re.fullmatch(r"(.*?)(?: \(family (\d+)\))?, (\d+) cores", facts["cpu"])
    info = {
        "versions": {"torch": facts["torch"], "python": facts["python"]},
        "cpu": {"model": cpu[1], "family": cpu[2] or "", "cores": int(cpu[3]), "threads": facts["threads"]},
        "native": {"isa": facts["isa"]},
        "gpus": [],
    }
    names = {"read": "peak_read_GB_s", "fp32": "peak_fp32_GFLOP_s", "bf16": "peak_bf16_GFLOP_s"}
    return Machine(info, commit=facts["commit"], peaks={name: facts[key] * 1e9 for name, key in names.items()})


def _inverse(rows: list[dict], peaks: dict[str, float]) -> Iterator[Result]:
    for row in rows:
        case = [r for r in rows if (r["workload"], r["B"], r["guided"]) == (row["workload"], row["B"], row["guided"])]
        same = [r for r in case if _precision(r["variant"]) == _precision(row["variant"])]
        peak = _precision(row["variant"])
        flops, rate = _amount(case, "GFLOP/s"), peaks["bf16" if peak == "bf16" else "fp32"]
        moved = _amount(same, "GB/s")
        if row["memory"] != "-" and int(row["memory"][:-1]) > int(row["FLOP"][:-1]):
            most = max(same, key=lambda r: float(r["GB/s"]))
            peak, rate = "memory", float(most["GB/s"]) * 1e9 / (int(most["memory"][:-1]) / 100)
        variant = row["variant"]
        yield Result(
            "block_inverse", "reverse", row["workload"] + (", guided" if row["guided"] else ""), row["B"], variant,
            ROLES.get(variant, "ours"), row["T"], "reference",
            seconds=row["seconds"], cold=row["cold seconds"], error=float(row["error"]), error_of="x, largest",
            bytes=moved, flops=flops, peak=peak, peak_rate=rate, formula="bench/cost.py", note=ROUNDED,
        )  # fmt: skip


def _density(rows: list[dict], peaks: dict[str, float]) -> Iterator[Result]:
    for row in rows:
        way, precision = row["variant"].split()
        yield Result(
            "density", "log_prob", row["workload"], row["B"], row["variant"], "baseline" if way == "torch" else "ours",
            row["T"], "torch fp32" if precision == "int8" else f"torch {precision}", seconds=row["seconds"],
            error=float(row["error"]), error_of="log p, nats a dimension, largest",
            flops=_amount([r for r in rows if (r["workload"], r["B"]) == (row["workload"], row["B"])], "GFLOP/s"),
            peak=precision, peak_rate=peaks["bf16" if precision == "bf16" else "fp32"],
            formula="bench/test_density.py, flops_of", note=ROUNDED,
        )  # fmt: skip


def _made(rows: list[dict], peaks: dict[str, float]) -> Iterator[Result]:
    for row in rows:
        for variant, seconds in row["seconds"].items():
            error = row["their error" if variant == "theirs" else "error"]
            counted = variant in ("ours", "frozen")
            yield Result(
                "made", "slow direction", f"{row['library']} {row['flow']}, D {row['D']}", row["B"], variant,
                {"theirs": "baseline", "pass": "context"}.get(variant, "ours"), None,
                None if variant == "pass" else "theirs", seconds=seconds,
                error=None if error == "-" or variant == "pass" else float(error), error_of="x, largest",
                flops=_amount([row], "GFLOP/s", "ours ms") if counted else None, peak="fp32" if counted else "",
                peak_rate=peaks["fp32"] if counted else None, formula="multiply-adds that the masks leave" * counted,
                note=ROUNDED,
            )  # fmt: skip


def _scaling(rows: list[dict], peaks: dict[str, float]) -> Iterator[Result]:
    seen = set()
    for row in rows:
        for variant in ("reference", "fp32", "bf16"):
            if (row["T"], row["B"], variant) not in seen:  # one point stands on both curves
                seen.add((row["T"], row["B"], variant))
                yield Result(
                    "scaling", "reverse of one block", "C 256, 4 layers", row["B"], variant,
                    "baseline" if variant == "reference" else "ours", row["T"], "reference",
                    seconds=[float(row[f"{variant} ms"]) / 1e3], note="the median alone was kept",
                )  # fmt: skip


def _memory(rows: list[dict], peaks: dict[str, float]) -> Iterator[Result]:
    for row in rows:
        for name, value in row.items():
            if name.endswith(" grown MB"):
                variant = name.removesuffix(" grown MB")
                yield Result(
                    "memory", "reverse of one block", row["workload"], row["B"], variant,
                    "baseline" if variant == "reference" else "ours", baseline="reference",
                    peak_memory=float(value) * 1e6,
                )  # fmt: skip


def _precision(variant: str) -> str:
    return next((name for name in ("bf16", "int8") if variant.startswith(name)), "fp32")


def _amount(rows: list[dict], rate: str, milliseconds: str = "ms") -> float:
    best = max(rows, key=lambda row: float(row[rate]))
    return float(best[rate]) * 1e9 * float(best[milliseconds]) / 1e3


EARLIER = {"block_inverse": _inverse, "density": _density, "made": _made, "scaling": _scaling, "memory": _memory}
