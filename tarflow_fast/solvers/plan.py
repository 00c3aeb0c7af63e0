"""The plan of solver 'auto': for which blocks, batches and precisions windows were measured to be faster, and where."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tarflow_fast import native
from tarflow_fast.files import write_atomic
from tarflow_fast.ops.registry import warn_once

__all__ = ["DRAFTS", "PLAN", "SEQUENTIAL", "Choice", "SolverPlan", "Way", "machine"]

PLAN = "solver_plan.json"  # beside the weights
DRAFTS = {"bf16": ("fp32",), "int8": ("fp32", "bf16")}  # the precisions that each is cheaper than


class Way(NamedTuple):
    """How a block is solved.

    window: tokens in a pass; 0 for one token after another. draft: the precision in which the block is solved one token
    after another first, for the first values of windows; None: they are guessed.
    """

    window: int
    draft: str | None = None


SEQUENTIAL = Way(0)


def machine() -> dict[str, Any]:
    """What times depend on: processor, instruction set and threads in use."""
    cpu = " ".join(native.cpuinfo(name) for name in ("model name", "cpu family", "model")).strip()
    return {"cpu": cpu, "isa": native.isa(), "threads": native.threads()}


class Choice(NamedTuple):
    """The fastest way found for each block, at one precision, guidance and batch size.

    ways: of block 0, 1, ...
    """

    precision: str
    guidance: float
    B: int
    ways: tuple[Way, ...]


@dataclass(frozen=True)
class SolverPlan:
    """What `TokenFlow.calibrate` found.

    machine: as `machine` tells.  tolerance: windows were measured with it.
    """

    machine: dict[str, Any]
    tolerance: float
    choices: tuple[Choice, ...]

    def way_for(self, block: int, B: int, precision: str, guidance: float, tolerance: float) -> Way:
        """How to solve one block of a call.

        Windows are taken only where they were faster at the measured batch sizes on both sides of B, with a tolerance
        no wider than the call's and a guidance no weaker, since fewer passes are needed at a wider tolerance and a
        weaker guidance. The way with the smaller window of the two is taken.
        """
        if tolerance < self.tolerance or not self.is_here():
            return SEQUENTIAL
        fitting = [
            each for each in self.choices
            if each.precision == precision and each.guidance >= guidance and (each.guidance > 0) == (guidance > 0)
        ]  # fmt: skip
        below = max((each for each in fitting if each.B <= B), key=lambda each: (each.B, -each.guidance), default=None)
        above = min((each for each in fitting if each.B >= B), key=lambda each: (each.B, each.guidance), default=None)
        if below is None or above is None:
            return SEQUENTIAL
        return min(below.ways[block], above.ways[block], key=lambda way: way.window)

    def is_here(self) -> bool:
        """Whether it was measured on this machine; says once where it was not."""
        here = machine()
        if here == self.machine:
            return True
        warn_once(
            f"solver 'auto' is sequential here, because the flow's {PLAN} was measured on {_told(self.machine)}, and "
            f"this is {_told(here)}: run tarflow-fast calibrate"
        )
        return False

    def save(self, folder: str | Path) -> Path:
        """Writes it into a flow's folder, whole or not at all. Returns the file's path."""
        path = Path(folder) / PLAN
        text = json.dumps({**asdict(self), "choices": [each._asdict() for each in self.choices]}, indent=1) + "\n"
        write_atomic(path, lambda temporary: temporary.write_text(text))
        return path

    @classmethod
    def load(cls, folder: str | Path, blocks: int) -> SolverPlan | None:
        """That of a flow's folder with so many blocks; None where there is none.

        Raises:
            ValueError: the file is not one that `save` writes, or of another flow.
        """
        path = Path(folder) / PLAN
        if not path.is_file():
            return None
        try:
            facts = json.loads(path.read_text())
            choices = tuple(_choice(row) for row in facts["choices"])
            plan = cls(dict(facts["machine"]), float(facts["tolerance"]), choices)
            sound = all(len(each.ways) == blocks and each.B > 0 for each in choices) and all(
                way.window >= 0 and way.draft in (None, *DRAFTS) for each in choices for way in each.ways
            )
            sound = sound and 0 < plan.tolerance < math.inf
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"from_pretrained: {path} is not a plan of solver 'auto': {error!r}") from error
        if not sound:
            raise ValueError(f"from_pretrained: {path} must be a plan for {blocks} blocks: calibrate the flow again")
        return plan


def _choice(row: dict[str, Any]) -> Choice:
    ways = tuple(Way(int(window), draft) for window, draft in row["ways"])
    return Choice(str(row["precision"]), float(row["guidance"]), int(row["B"]), ways)


def _told(facts: dict[str, Any]) -> str:
    return f"{facts.get('cpu')} ({facts.get('isa')}, {facts.get('threads')} threads)"
