"""The trained flows that windows are measured on. With random weights these figures would mean nothing.

`wide` has weights that no cache of a small machine holds (C = 512, 2 blocks of 4 layers, T = 64). It does not ship. The
environment variable TARFLOW_WIDE names its folder; docs/flows/README.md has the command that trains it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflow_fast import TarFlow
from tarflow_fast.flows import SHIPPED, open_flow

WIDE = os.environ.get("TARFLOW_WIDE", "")
FLOWS = [*SHIPPED, *(["wide"] if WIDE else [])]
STEP = 2 / 255  # between two levels of an 8-bit image in [-1, 1]


@dataclass(frozen=True)
class Setting:
    """One trained flow, with the guidance that it is drawn with."""

    name: str
    guidance: float = 0.0

    def __str__(self) -> str:
        return f"{self.name}, guided" if self.guidance else self.name

    def open(self) -> TarFlow:
        """The flow in float32, with its weights packed once."""
        model = open_flow(WIDE if self.name == "wide" else self.name)[0].float().eval()
        return model.freeze() if hasattr(model, "freeze") else model

    def inputs(self, model: TarFlow, B: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """Noise (B, T, D) and labels (B,), of every class in turn; None for a flow without classes."""
        noise = torch.randn(B, *model.var.shape, generator=torch.Generator().manual_seed(seed))
        return noise, torch.arange(B) % model.num_classes if model.num_classes else None


def settings(model_names: list[str] = FLOWS) -> list[Setting]:
    """Every flow without guidance, and with guidance 1 where it has classes."""
    plain = [Setting(name) for name in model_names]
    return plain + [Setting(each.name, 1.0) for each in plain if each.name in SHIPPED and _classes(each.name)]


def _classes(name: str) -> int:
    return open_flow(name)[0].num_classes


def in_steps(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| in steps of an 8-bit image."""
    return (a - b).abs() / STEP
