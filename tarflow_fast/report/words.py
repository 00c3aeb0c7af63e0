"""Numbers as a reader wants them."""

from __future__ import annotations

import math

from tarflow_fast.report.interval import Interval

__all__ = ["amount", "number", "ratio_text", "seconds_text"]

_SECONDS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))
_LETTERS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))


def number(value: float) -> str:
    """Three digits."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{min(digits, 9)}f}" if 0 < digits < 7 else f"{value:.3g}" if digits >= 7 else f"{value:.0f}"


def seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    unit, size = next((each for each in _SECONDS if seconds >= each[1]), _SECONDS[-1])
    return f"{number(seconds / size)} {unit}"


def amount(value: float | None, unit: str) -> str:
    """With G, M or k before the unit."""
    if value is None:
        return "-"
    letter, size = next((each for each in _LETTERS if value >= each[1]), _LETTERS[-1])
    return f"{number(value / size)} {letter}{unit}"


def ratio_text(ratio: Interval | None) -> str:
    """ "10.4 [9.8, 11.2]", and the number of rounds where there are too few for an interval."""
    if ratio is None:
        return "-"
    if ratio.rounds == 1:
        return f"{number(ratio.median)} (1 round)"
    few = "" if ratio.sure else f" ({ratio.rounds} rounds)"
    return f"{number(ratio.median)} [{number(ratio.low)}, {number(ratio.high)}]{few}"
