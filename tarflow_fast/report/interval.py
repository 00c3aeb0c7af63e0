"""How sure a ratio of times is: bootstrap intervals of medians over the rounds of a benchmark.

A round runs every variant once, so a ratio within a round is hurt little by a machine that changes its speed. The
interval is the percentile bootstrap (Efron 1979) of the median: rounds are drawn with replacement, 2000 times, and the
2.5 and 97.5 % quantiles of the medians are its ends. The draws depend on the sample alone: equal samples have equal
intervals in every report, and swapping two samples inverts every number of `ratio_of_medians` exactly.

Of fewer than 6 rounds even the whole range covers the median with less than 95 %: with 1 - 2^(1 - n), to be exact. Then
the interval is that range, and `Interval.sure` is False.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["FEWEST", "Interval", "paired_ratio", "ratio_of_medians"]

DRAWS = 2000
FEWEST = 6  # the least n with 1 - 2^(1 - n) >= 95 %
_TAIL = 0.025


@dataclass(frozen=True)
class Interval:
    """A ratio, the ends of its interval, and the number of rounds behind it."""

    median: float
    low: float
    high: float
    rounds: int

    @property
    def sure(self) -> bool:
        """Whether the rounds suffice for an interval of 95 %."""
        return self.rounds >= FEWEST

    @property
    def side(self) -> int:
        """1 where the whole interval is above 1, -1 where it is below, and 0 where it touches 1 or is not sure."""
        return 0 if not self.sure else int(self.low > 1) - int(self.high < 1)


def paired_ratio(baseline: Sequence[float], variant: Sequence[float]) -> Interval:
    """The median over rounds of baseline / variant: how many times faster the variant is. Both in seconds, (n,).

    Raises ValueError where the samples are empty, of different lengths, or hold what is not a positive finite number.
    """
    theirs, ours = _sample("paired_ratio", "baseline", baseline), _sample("paired_ratio", "variant", variant)
    if len(theirs) != len(ours):
        raise ValueError(f"paired_ratio: both must have the same rounds, got {len(theirs)} and {len(ours)}")
    ratios = theirs / ours
    if len(ratios) < FEWEST:
        return Interval(float(np.median(ratios)), float(ratios.min()), float(ratios.max()), len(ratios))
    return Interval(float(np.median(ratios)), *_ends(_medians(ratios)), len(ratios))


def ratio_of_medians(before: Sequence[float], after: Sequence[float]) -> Interval:
    """median(before) / median(after) of samples taken apart, (n,) and (m,): above 1, the later is the smaller.

    Rounds of different runs do not belong together, so each sample is drawn from by itself.

    Raises ValueError as `paired_ratio` does, apart from the lengths.
    """
    first, second = _sample("ratio_of_medians", "before", before), _sample("ratio_of_medians", "after", after)
    median, fewest = float(np.median(first) / np.median(second)), min(len(first), len(second))
    if fewest < FEWEST:
        return Interval(median, float(first.min() / second.max()), float(first.max() / second.min()), fewest)
    return Interval(median, *_ends(_medians(first) / _medians(second)), fewest)


def _sample(function: str, argument: str, values: Sequence[float]) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample) or not all(math.isfinite(value) and value > 0 for value in sample):
        raise ValueError(f"{function}: {argument} must be positive finite seconds, at least one, got {values!r:.80}")
    return sample


def _medians(sample: np.ndarray) -> np.ndarray:
    drawn = np.random.default_rng(zlib.crc32(sample.tobytes())).integers(len(sample), size=(DRAWS, len(sample)))
    return np.median(sample[drawn], axis=1)


def _ends(medians: np.ndarray) -> tuple[float, float]:
    # The ends are drawn medians, not points between two of them: the inverse of such a point is not one.
    low = np.quantile(medians, _TAIL, method="lower")
    return float(low), float(np.quantile(medians, 1 - _TAIL, method="higher"))
