"""Results that are not finite: never hidden; counted, named, and raised or returned as the caller chose."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from tarflow_fast.transforms import Bijection
from tarflow_fast.validate import quiet_stream

__all__ = ["NonFinite", "NonFiniteError", "bad_rows", "first_overflow"]

POLICIES = ("warn", "raise", "ignore")


class NonFiniteError(ArithmeticError):
    """A result overflowed: the message counts the rows and names the first, where it is known with block and token."""


class NonFinite:
    """What is not finite in the result of one request, looked at part by part:

        if found.in_part(part):
            found.at("row 3, ...")
        found.warn()

    Args:
        where: the function called.
        policy: 'warn' (once, by `warn`), 'raise' NonFiniteError (at the first such part), or 'ignore'.
        rows: of the whole request.

    Raises:
        ValueError: another policy.
    """

    def __init__(self, where: str, policy: str, rows: int) -> None:
        if policy not in POLICIES:
            raise ValueError(f"{where}: nonfinite must be one of {', '.join(POLICIES)}, got {policy!r}")
        self.where, self.policy, self.rows = where, policy, rows
        self.seen, self.count, self.place = 0, 0, ""

    def in_part(self, part: Tensor) -> bool:
        """Whether the next rows, `part` (B, ...), are not all finite; those that are not are counted."""
        self.seen += len(part)
        if self.policy == "ignore" or not quiet_stream(part):
            return False
        if math.isfinite(part.detach().sum().item()):  # one pass over numbers that are all finite, instead of five
            return False
        bad = int(bad_rows(part).sum())
        self.count += bad
        return bad > 0

    def at(self, place: str) -> None:
        """Where the first of the part is; the first of all is told."""
        self.place = self.place or place
        if self.policy == "raise":
            raise NonFiniteError(self._message())

    def warn(self) -> None:
        """Warn, if anything was found; called by the function the user called."""
        if self.count:
            change = "nonfinite='raise' or 'ignore' changes this warning"
            warnings.warn(f"{self._message()} ({change})", RuntimeWarning, stacklevel=3)

    def _message(self) -> str:
        rows = f"{self.rows} rows" if self.seen == self.rows else f"the first {self.seen} of {self.rows} rows"
        return f"{self.where}: {self.count} of {rows} are not finite, {self.place}"


def bad_rows(part: Tensor) -> Tensor:
    """(B,) bool: which rows of (B, ...) hold NaN or infinity."""
    return ~torch.isfinite(part).flatten(1).all(dim=1)


def first_overflow(
    stages: Sequence[Tensor], bijections: Sequence[Bijection], begin: int = 0, guided: bool = False
) -> str:
    """Where an inverse overflowed first.

    stages: the noise, then the tokens (B, T, D) after each block was inverted, the last block first.
    begin: the number of row 0 in the request.  guided: whether the inverse was.
    """
    number, bad = next((k, b) for k, s in enumerate(stages) if (b := ~torch.isfinite(s).all(dim=2)).any())
    row = int(bad.any(dim=1).nonzero()[0])
    tokens = bad[row].nonzero()[:, 0].tolist()
    if number == 0:
        return f"in the noise given, row {begin + row}, token {tokens[0]}"
    solved_at = bijections[-number].order.inverse  # the first in the order in which the block solved them
    token = min(tokens, key=solved_at.__getitem__)
    place = f"first in block {len(bijections) - number}, row {begin + row}, token {token}; the flow overflows there"
    return place + (", lower guidance helps" if guided else "")
