"""The seconds that `pytest bench/` may take, setups included, and what was dropped to keep to them."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

RESERVE = 0.03  # of the budget: for the tables at the end and for calls that an alarm does not cut
SHARE = 1 / 8  # of what is left: the most that the rounds of one case take if fewer rounds suffice


class Budget:
    """Counts from `before` seconds before it is made. seconds: infinity is no budget. clock: seconds that only grow.

    A case is dropped where its fewest rounds do not fit into what is left. A case whose setup does not end in time is
    cut off by an alarm, where the system has one: between two operations of Python, so that no single call is cut.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic, before: float = 0.0) -> None:
        self.seconds, self.clock, self.start = seconds, clock, clock() - before
        self.dropped: dict[str, str] = {}

    def spent(self) -> float:
        return self.clock() - self.start

    def left(self) -> float:
        return self.seconds * (1 - RESERVE) - self.spent()

    def share(self) -> float:
        """The seconds that the rounds of the next case may take if it has a choice."""
        return max(self.left(), 0.0) * SHARE

    def rounds(self, once: float, fewest: int, most: int) -> int:
        """How many rounds of `once` seconds fit: `most` or fewer, of an eighth of what is left, and `fewest` at least.

        Skips the test where `fewest` do not fit into all that is left.
        """
        self.needs(fewest * once)
        return max(fewest, math.floor(min(most, self.share() / max(once, 1e-9))))

    def needs(self, seconds: float) -> None:
        """Skips the test where that many seconds, which cannot be made fewer, are not left."""
        if seconds > self.left():
            pytest.skip(f"it takes about {seconds:.3g} s; {self.told()} had {max(self.left(), 0):.3g} s left")

    def told(self) -> str:
        return f"the budget of {self.seconds:g} s"

    def drop(self, name: str, why: str) -> None:
        """Notes why a row has no figure. The first reason stays."""
        self.dropped.setdefault(name, why)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Cuts off what runs inside when the budget is spent, as a skipped test."""
        usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        if not usable or self.clock is not time.monotonic or math.isinf(self.seconds):
            yield
            return
        begun = self.spent()

        def late(*_: object) -> None:
            pytest.skip(f"cut off after {self.spent() - begun:.0f} s: {self.told()} was spent")

        before = signal.signal(signal.SIGALRM, late)
        try:
            signal.setitimer(signal.ITIMER_REAL, max(self.left(), 1e-3))
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def seconds(text: str) -> float:
    """A positive number of seconds, for the command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0 or math.isinf(value):
        raise pytest.UsageError(f"--budget: expected a positive number of seconds, got {text!r}; --full has no budget")
    return value
