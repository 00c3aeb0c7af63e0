"""Timing side by side. Times taken apart cannot be compared on a shared machine, so every round runs every variant."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Interleaved:
    """Rounds that run several variants in turn. Each round starts from another one, so that none has a fixed neighbour.

    twice: every variant runs twice in a round. The first run finds the caches as another variant left them; its time
    goes to `cold`. The second run counts: it finds the caches as a call in a loop would.
    """

    def __init__(self, variants: dict[str, Callable[[], object]], twice: bool = False) -> None:
        self.variants, self.twice = variants, twice
        self.seconds: dict[str, list[float]] = {name: [] for name in variants}
        self.cold: dict[str, list[float]] = {name: [] for name in variants}
        self.round = 0

    def warm_up(self, name: str) -> None:
        if self.twice:
            self.cold[name].append(timed(self.variants[name]))

    def run_round(self, without: str | None = None) -> None:
        names = [name for name in self.variants if name != without]
        start = self.round % max(len(names), 1)
        for name in names[start:] + names[:start]:
            self.warm_up(name)
            self.seconds[name].append(timed(self.variants[name]))
        self.round += 1

    def summary(self, name: str) -> dict[str, float]:
        """Median, 20 % and 80 % quantile in seconds."""
        values = sorted(self.seconds[name])
        if len(values) < 2:
            return {"median": values[0], "p20": values[0], "p80": values[0], "rounds": 1}
        cuts = statistics.quantiles(values, n=5, method="inclusive")
        return {"median": statistics.median(values), "p20": cuts[0], "p80": cuts[3], "rounds": len(values)}

    def ratio(self, name: str, baseline: str, cold: bool = False) -> float:
        """The median over rounds of baseline / name. Both times are from one round, so slow seconds hit both."""
        seconds = self.cold if cold else self.seconds
        return statistics.median(b / n for b, n in zip(seconds[baseline], seconds[name], strict=True))
