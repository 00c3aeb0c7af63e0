"""Measures, on this machine, where the solver by windows is faster than one token after another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tarflow_fast.solvers import Solving, invert, invert_all
from tarflow_fast.solvers.plan import DRAFTS, SEQUENTIAL, Choice, SolverPlan, Way, machine
from tarflow_fast.transforms import Bijection, Guidance

if TYPE_CHECKING:
    from tarflow_fast.engines.call import Call

__all__ = ["WINDOWS", "Calibration", "calibrate"]

WINDOWS = (4, 8, 16, 32, 64)
DRAFTED = (8, 16, 32)  # the windows that are tried with drafts
GAIN = 0.9  # windows are chosen where they take less than this share of the time; less is within the noise
HOPELESS = 1.3  # a window that took so many times as long is not timed again
SECONDS = 0.5  # spent on one block in one setting, or three rounds where these take longer


@dataclass(frozen=True)
class Calibration:
    """What was measured, and the plan made of it.

    rows: one for each precision, B, block and way (window, draft): passes, ms (the median over rounds), ratio
    (sequential over this one), chosen.
    """

    plan: SolverPlan
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        lines = [f"{'precision':9}  {'B':>4}  block  {'solver':20}  {'passes':>6}  {'ms':>9}  {'ratio':>5}"]
        for row in self.rows:
            draft = f" from {row['draft']}" if row["draft"] else ""
            solver = f"windows {row['window']}{draft}" if row["window"] else "sequential"
            lines.append(
                f"{row['precision']:9}  {row['B']:4}  {row['block']:5}  {solver:20}  {row['passes']:6}  "
                f"{row['ms']:9.2f}  {row['ratio']:5.2f}{'  chosen' if row['chosen'] else ''}"
            )
        return "\n".join(lines)


def calibrate(
    bijections: Sequence[Bijection],
    z: Tensor,
    y: Tensor | None,
    guidance: Guidance,
    batch_sizes: Sequence[int],
    precisions: Sequence[str],
    tolerance: float,
    open_call: Callable[[str, Solving], Call],
    on_setting: Callable[[], object] | None = None,
) -> Calibration:
    """Times the inverse of each block, one token after another and by each window of WINDOWS, and of DRAFTED
    from drafts in cheaper precisions, in turn.

    Args:
        bijections: of the flow's blocks.
        z: (n, T, D) scaled noise.  y: (n,) labels or None.
        batch_sizes: B, each at most n.
        open_call: (precision, solving) -> the call to work in.
        on_setting: called after each block at each batch size and precision.
    """
    rows, choices, K = [], [], len(bijections)
    for precision in precisions:
        with open_call(precision, Solving("calibrate", "sequential")) as call:
            stages = [z, *(tokens for tokens, _ in invert_all(bijections, z, y, guidance, call))]
        for B in batch_sizes:
            ways = [SEQUENTIAL] * K
            for block, bijection in enumerate(bijections):
                tokens, labels = stages[K - 1 - block][:B], None if y is None else y[:B]
                found = _measure(bijection, tokens, labels, guidance, precision, tolerance, open_call)
                ways[block] = _fastest(found)
                for way, (passes, seconds) in found.items():
                    ms = statistics.median(seconds) * 1e3
                    rows.append({
                        "precision": precision, "B": B, "block": block, **way._asdict(), "passes": passes, "ms": ms,
                        "ratio": statistics.median(found[SEQUENTIAL][1]) * 1e3 / ms, "chosen": way == ways[block],
                    })  # fmt: skip
                if on_setting is not None:
                    on_setting()
            choices.append(Choice(precision, guidance.weight, B, tuple(ways)))
    return Calibration(SolverPlan(machine(), tolerance, tuple(choices)), rows)


def _fastest(found: dict[Way, tuple[int, list[float]]]) -> Way:
    """The way with the least median, where it gains enough."""
    median = {way: statistics.median(seconds) for way, (_, seconds) in found.items()}
    best = min(median, key=median.__getitem__)
    return best if median[best] < GAIN * median[SEQUENTIAL] else SEQUENTIAL


def _measure(
    bijection: Bijection,
    z: Tensor,
    y: Tensor | None,
    guidance: Guidance,
    precision: str,
    tolerance: float,
    open_call: Callable[[str, Solving], Call],
) -> dict[Way, tuple[int, list[float]]]:
    """{way: (passes in `precision`, seconds of each round)}."""
    last = z.size(1) - 1
    found: dict[Way, tuple[int, list[float]]] = {}

    def run(way: Way) -> float:
        solver = "windows" if way.window else "sequential"
        solving = Solving("calibrate", solver, tolerance, way.window or None, draft=way.draft)
        with open_call(precision, solving) as call:
            start = time.perf_counter()
            invert(bijection, z, y, guidance, call)
            seconds = time.perf_counter() - start
        passes = sum(report.passes for _, report in solving.report.parts)
        found.setdefault(way, (passes, []))[1].append(seconds)
        return seconds

    run(SEQUENTIAL)  # memory is touched for the first time
    found.clear()
    sequential = run(SEQUENTIAL)
    candidates = [Way(window) for window in WINDOWS if window < last] + [Way(last)] * (0 < last <= WINDOWS[-1])
    cheaper = [draft for draft, dearer in DRAFTS.items() if precision in dearer]
    candidates += [Way(window, draft) for draft in cheaper for window in DRAFTED if window < last]
    kept = [way for way in candidates if run(way) < HOPELESS * sequential]
    rounds = max(3, min(20, int(SECONDS / (sequential * (1 + len(kept)))))) if kept else 0
    for number in range(rounds):
        order = [SEQUENTIAL, *kept]
        start = number % len(order)  # so that none has a fixed neighbour
        for way in order[start:] + order[:start]:
            run(way)
    return found
