"""Measures a case: every variant is judged, then timed in rounds that run all of them in turn, and becomes a `Result`.

A variant whose error is larger than allowed raises `WrongResult` before anything is timed. A baseline or peer that
takes more than twice its bare operations, which run in the same rounds, raises `WeakBaseline`. In both cases no figure
of the case is kept: a speed that was measured against the wrong thing is worth nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from budget import Budget
from interleave import Interleaved, timed
from memory import added_memory
from peaks import flop_rates, read_rate

from tarflow_fast.report import FEWEST, Result, binding, paired_ratio

SHORT = 1.0  # seconds: what is shorter runs twice in a round, and its second run counts


class WrongResult(AssertionError):
    """A result is further off than its rule allows."""


class WeakBaseline(AssertionError):
    """A baseline or peer takes much longer than the work that it has to do."""


@dataclass(frozen=True)
class Variant:
    """run: what is timed. role, baseline: see `Result`. judge: the result of `run` -> (error, the most allowed).

    bytes, flops: what the call must move and compute; format: whose arithmetic peak counts; streams: whether the bytes
    come from memory and not from a cache. floor: the name of the variant that runs the bare operations of this one.
    """

    run: Callable[[], object]
    role: str = "ours"
    baseline: str | None = None
    judge: Callable[[object], tuple[float, float]] | None = None
    bytes: float | None = None
    flops: float | None = None
    format: str = "fp32"
    streams: bool = False
    floor: str | None = None


@dataclass
class Case:
    """Variants of one computation. seconds: the most for rounds, beyond the fewest that an interval needs.

    dropped: variants that were left out, and why. limit: see peers/bare.py.
    """

    suite: str
    subject: str
    workload: str
    B: int
    variants: dict[str, Variant]
    baseline: str
    T: int | None = None
    error_of: str = ""
    formula: str = ""
    note: str = ""
    seconds: float = 16.0
    limit: float = 2.0
    dropped: dict[str, str] = field(default_factory=dict)


def measure(case: Case, budget: Budget) -> dict[str, Result]:
    """Variant -> its result. Skips the test where the budget does not suffice."""
    uncounted = [name for name, variant in case.variants.items() if not variant.flops]
    if uncounted or not case.formula:
        raise ValueError(f"measure: {case.suite} must give a formula, and FLOPs of every variant, so that each row has "
                         f"a share of a peak; got formula {case.formula!r}, and none of {uncounted}")  # fmt: skip
    judged = judge(case)
    once, memory = {}, {}
    for name, variant in case.variants.items():  # the first run warmed up and compiled; this one counts
        memory[name] = added_memory(lambda name=name, run=variant.run: once.update({name: timed(run)}))
    twice = once.get(case.baseline, sum(once.values())) < SHORT
    one_round = sum(once.values()) * (2 if twice else 1)
    fewest = FEWEST if one_round < 25 else 3 if one_round < 75 else 1
    rounds = budget.rounds(one_round, fewest, max(fewest, min(30, int(case.seconds / one_round))))
    measured = Interleaved({name: variant.run for name, variant in case.variants.items()}, twice)
    threads, reads = torch.get_num_threads(), []
    for _ in range(rounds):
        if any(variant.streams for variant in case.variants.values()):  # else the read would only empty the cache
            reads.append(read_rate(threads))
        measured.run_round()
    check_baselines(case, measured.seconds)
    return results(case, measured, judged, memory, statistics.median(reads) if reads else None, flop_rates(threads))


def judge(case: Case) -> dict[str, tuple[float | None, float | None]]:
    """Variant -> (error, allowed). Ours come first, so that a wrong kernel fails before a peer is compiled."""
    found = {}
    for name, variant in sorted(case.variants.items(), key=lambda each: each[1].role != "ours"):
        result = variant.run()
        error, allowed = variant.judge(result) if variant.judge else (None, None)
        if error is not None and not error <= allowed:  # an error that is no number is not allowed either
            raise WrongResult(f"{case.suite}, {case.workload}, B {case.B}: {name} is off by {error:.3g}, "
                              f"allowed are {allowed:.3g}; nothing was timed")  # fmt: skip
        found[name] = error, allowed
    return found


def check_baselines(case: Case, seconds: dict[str, list[float]]) -> None:
    for name, variant in case.variants.items():
        if variant.floor is not None:
            ratio = paired_ratio(seconds[name], seconds[variant.floor])
            if ratio.low > case.limit:
                raise WeakBaseline(
                    f"{case.suite}, {case.workload}, B {case.B}: {name} takes {ratio.median:.2f} times as long as its "
                    f"{variant.floor}, allowed are {case.limit:g}: it is no fair {variant.role}, and no ratio is told"
                )


def results(case, measured, judged, memory, read, peaks) -> dict[str, Result]:
    found = {}
    for name, variant in case.variants.items():
        peak, rate = binding(
            variant.bytes, variant.flops, read if variant.streams else None, peaks[variant.format], variant.format
        )
        error, allowed = judged[name]
        found[name] = Result(
            case.suite, case.subject, case.workload, case.B, name, variant.role, case.T,
            None if variant.role == "context" else variant.baseline or case.baseline,
            seconds=[round(s, 9) for s in measured.seconds[name]], cold=[round(s, 9) for s in measured.cold[name]],
            error=error, error_bound=allowed, error_of=case.error_of if error is not None else "",
            peak_memory=memory[name], bytes=variant.bytes, flops=variant.flops, peak=peak, peak_rate=rate,
            formula=case.formula if peak else "", note=case.note,
        )  # fmt: skip
    return found


class Replay:
    """A clock for pytest-benchmark that shows the seconds of rounds that were timed in turn with other variants."""

    __name__ = "seconds_of_interleaved_rounds"

    def __init__(self) -> None:
        self.load(())

    def load(self, seconds) -> None:
        self.left, self.now, self.running = list(seconds), 0.0, False

    def __call__(self) -> float:
        if self.running:
            self.now += self.left.pop(0)
        self.running = not self.running
        return self.now


REPLAY = Replay()


def extra(result: Result, ratio) -> dict[str, object]:
    """What pytest-benchmark's own record of a variant says beside its seconds."""
    names = ("error", "error_bound", "error_of", "peak_memory", "bytes", "flops", "peak", "peak_rate", "share",
             "formula", "baseline", "note")  # fmt: skip
    told = {name: getattr(result, name) for name in names if getattr(result, name) not in (None, "")}
    return told if ratio is None else told | {"ratio": ratio.median, "ratio_low": ratio.low, "ratio_high": ratio.high}


def named(cases, full_cases=(), of=lambda *case: "-".join(map(str, case)), variants=()):
    """pytest's parameters (case, variant) of the names <workload>-B<b>-<variant>; full_cases run with --full only."""
    return [
        pytest.param(case, variant, id=f"{of(*case)}-{variant.replace(' ', '-')}", marks=marks)
        for chosen, marks in ((cases, ()), (full_cases, pytest.mark.full))
        for case in chosen
        for variant in variants
    ]
