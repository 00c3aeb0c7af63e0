"""Which solver a call asks for, and what a solver tells of its work."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tarflow_fast.solvers.plan import DRAFTS, SEQUENTIAL, SolverPlan, Way
from tarflow_fast.validate import check_number, check_positive_int

__all__ = ["SOLVERS", "TOLERANCE", "WINDOW", "BlockReport", "Report", "Solving"]

SOLVERS = ("auto", "sequential", "windows")
TOLERANCE = 1e-3  # an eighth of the step between two levels of an 8-bit image in [-1, 1]
WINDOW = 16


class BlockReport(NamedTuple):
    """What it took to invert one block for some rows.

    passes: of the net. single: how many of them took one token. work: tokens of all rows in all passes. accepted:
    (passes, B) tokens of each row that each pass made final; a row that is done takes no part in later passes, where
    the engine allows that. fallbacks: (B,) how often a window was solved one token after another. residual: (B,) the
    largest over tokens and D of |transform^-1(z_{i+1}; net(x_0 .. x_i)) - x_{i+1}|, as the passes themselves computed
    it; NaN for a row that overflowed.
    """

    passes: int
    single: int
    work: int
    accepted: Tensor
    fallbacks: Tensor
    residual: Tensor

    @classmethod
    def sequential(cls, B: int, T: int) -> BlockReport:
        """One token after another: each is exact."""
        steps = torch.ones(T - 1, B, dtype=torch.int64)
        return cls(T - 1, T - 1, B * (T - 1), steps, torch.zeros(B, dtype=torch.int64), torch.zeros(B))


@dataclass
class Report:
    """What the solvers of one call did.

    parts: (number of the block, its BlockReport), in the order in which they were solved. A batch that was solved in
    parts has several for each block, the first rows first.
    """

    parts: list[tuple[int, BlockReport]] = field(default_factory=list)

    def of(self, block: int) -> list[BlockReport]:
        """The reports of one block, one for every part of the batch."""
        return [report for number, report in self.parts if number == block]

    @property
    def blocks(self) -> list[int]:
        """The numbers of the blocks, ascending."""
        return sorted({number for number, _ in self.parts})

    @property
    def passes(self) -> dict[int, int]:
        """Passes of the net, by block."""
        return {number: sum(report.passes for report in self.of(number)) for number in self.blocks}

    @property
    def fallbacks(self) -> dict[int, int]:
        """Windows of all rows that were solved one token after another, by block."""
        return {number: sum(int(report.fallbacks.sum()) for report in self.of(number)) for number in self.blocks}

    @property
    def residual(self) -> Tensor:
        """(B, K), the largest residual of each row in each block."""
        return torch.stack([torch.cat([r.residual.cpu() for r in self.of(k)]) for k in self.blocks], dim=1)


class Solving:
    """The solver arguments of `TokenFlow.inverse`, checked, and the report of what was done with them.

    Args:
        solver: 'auto', 'sequential' or 'windows'.
        tolerance: of 'windows', finite and >= 0; None for TOLERANCE.
        window: of 'windows', tokens; None for WINDOW.
        draft: of 'windows', the precision of first values; None for guesses.
        where: the function called, for messages.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range; a differentiable inverse by windows.
    """

    def __init__(
        self,
        where: str,
        solver: str = "auto",
        tolerance: float | None = None,
        window: int | None = None,
        differentiable: bool = False,
        draft: str | None = None,
    ) -> None:
        if solver not in SOLVERS:
            raise ValueError(f"{where}: solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
        if tolerance is not None:
            check_number(where, "tolerance", tolerance)
            if not 0 <= tolerance < math.inf:
                raise ValueError(f"{where}: tolerance must be finite and >= 0, got {tolerance}")
        if window is not None:
            check_positive_int(where, "window", window)
        if draft is not None and draft not in DRAFTS:
            raise ValueError(f"{where}: draft must be None or one of {', '.join(DRAFTS)}, got {draft!r}")
        if solver == "windows" and differentiable:
            raise ValueError(f"{where}: solver 'windows' has no gradient, and differentiable=True was asked for")
        self.solver, self.differentiable = solver, differentiable
        self.plan: SolverPlan | None = None  # the model's, if it was calibrated
        self.tolerance = TOLERANCE if tolerance is None else float(tolerance)
        self.way = Way(WINDOW if window is None else int(window), draft)
        self.where = where
        self.report = Report()

    def way_for(self, block: int, B: int, precision: str, guidance: float) -> Way:
        """How to solve one block of the call, which computes in `precision`.

        Raises:
            ValueError: a draft that is no cheaper than the precision.
        """
        if self.solver == "windows":
            if self.way.draft is not None and precision not in DRAFTS[self.way.draft]:
                raise ValueError(
                    f"{self.where}: draft must be a cheaper precision than {precision}, which this call computes in, "
                    f"got {self.way.draft!r}"
                )
            return self.way
        if self.solver == "sequential" or self.plan is None or self.differentiable:
            return SEQUENTIAL
        return self.plan.way_for(block, B, precision, guidance, self.tolerance)

    def add(self, block: int, report: BlockReport) -> None:
        """What it took to invert this block, for the next rows of the call."""
        self.report.parts.append((block, report))
