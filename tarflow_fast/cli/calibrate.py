"""The command `calibrate`: measures where windows are faster on this machine, and stores that beside the weights."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Calibrate:
    """Measures both solvers on this machine, and stores beside the weights which of them solver 'auto' takes."""

    model: Positional[Annotated[str, arg(metavar="FLOW")]]
    """A shipped flow, or a folder (config.json, model.safetensors)."""
    n: int = 16
    """Samples to measure with."""
    batch_sizes: tuple[int, ...] = ()
    """Rows together; left out: 1, 4, 16, ... up to n."""
    precisions: tuple[Literal["fp32", "bf16", "int8"], ...] = ("fp32", "bf16")
    """Of the computation."""
    guidance: Annotated[float, arg(aliases=["--cfg"])] = 0.0
    """Of the samples; a plan without guidance is not used for samples with it."""
    tolerance: float = 1e-3
    """Of windows: how far a token may be from its equation."""
    seed: int = 0
    """Of the noise and the labels."""
    dry_run: bool = False
    """Prints the table and stores nothing."""

    def run(self) -> int:
        from tarflow_fast.flows import open_flow

        folder = _folder_of(self.model)
        flow, _ = open_flow(folder)
        found = flow.calibrate(
            self.n, batch_sizes=self.batch_sizes or None, precisions=self.precisions, guidance=self.guidance,
            tolerance=self.tolerance, seed=self.seed, progress=sys.stderr.isatty(),
        )  # fmt: skip
        print(found)
        faster = sum(way.window > 0 for choice in found.plan.choices for way in choice.ways)
        settings = sum(len(choice.ways) for choice in found.plan.choices)
        print(f"windows are faster in {faster} of {settings} settings; 'auto' is sequential in the others")
        if not self.dry_run:
            print(found.plan.save(folder))
        return 0


def _folder_of(name: str) -> Path:
    from pathlib import Path

    from tarflow_fast.checkpoint import read_config
    from tarflow_fast.flows import SHIPPED

    path = Path(SHIPPED.get(name, name)).expanduser()
    if path.is_file():
        raise ValueError(
            f"calibrate: FLOW must be a folder, beside whose weights the plan is stored, got the file {path}"
        )
    if not path.is_dir():
        raise FileNotFoundError(
            f"calibrate: FLOW must be a shipped flow ({', '.join(SHIPPED)}) or a folder, got {name!r}"
        )
    return read_config(path)[0]
