"""Guidance: extrapolating the conditional prediction away from an unguided one, in the log-scale a and the shift b.

    a = a_c + g_i (a_c - a_u),  b likewise;   g_i = g, or g (i + 1) / (T - 1) when annealed     (arXiv 2412.06329, 2.5)

The unguided pass takes the mean class embedding, and attention logits divided by `attn_temp`. Both passes run as 2B
rows of one: rows 0 .. B-1 conditional, rows B .. 2B-1 unguided, so that every weight is read once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tarflow_fast.dtypes import wide_dtype
from tarflow_fast.transforms.named import Transform
from tarflow_fast.validate import check_number


@dataclass(frozen=True)
class Guidance:
    """The four guidance arguments of `TarFlow.reverse`, checked; `where` names the function in messages.

    Raises:
        TypeError: an argument is not a number, string or bool.
        ValueError: weight negative or not finite, `what` not made of 'a' and 'b', attn_temp not positive and finite.
    """

    weight: float = 0.0
    what: str = "ab"
    attn_temp: float = 1.0
    annealed: bool = False
    where: str = field(default="reverse", repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in (("guidance", self.weight), ("attn_temp", self.attn_temp)):
            check_number(self.where, name, value)
        if not isinstance(self.annealed, bool):
            raise TypeError(f"{self.where}: annealed_guidance must be a bool, got {type(self.annealed).__name__}")
        if not 0 <= self.weight <= torch.finfo(torch.float32).max:
            raise ValueError(f"{self.where}: guidance must be finite and >= 0, got {self.weight}")
        if not (math.isfinite(self.attn_temp) and self.attn_temp > 0):
            raise ValueError(f"{self.where}: attn_temp must be finite and > 0, got {self.attn_temp}")
        if self.what not in ("a", "b", "ab", "ba"):
            raise ValueError(f"{self.where}: guide_what must be 'a', 'b' or 'ab', got {self.what!r}")
        for name in ("weight", "attn_temp"):  # NumPy's scalars would widen or narrow what they meet
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def active(self) -> bool:
        return self.weight > 0

    def check(self, transform: Transform) -> None:
        """Raise ValueError where this would guide a transform that has no rule for it."""
        if self.active and not transform.guided:
            raise ValueError(
                f"{self.where}: guidance must be 0 for the transform {str(transform)!r}, because no rule has been "
                f"published for guiding its parameters, got {self.weight}"
            )

    def why_idle(self, labels: bool) -> str:
        """Why it changes nothing although something was asked for, with labels or without; "" otherwise."""
        if self.active and self.attn_temp == 1 and not labels:
            return "guidance changes nothing without labels, unless attn_temp is other than 1"
        return "attn_temp changes nothing without guidance" if self.attn_temp != 1 and not self.active else ""

    def batch_classes(self, conditional: Tensor | None, unguided: Tensor | None, B: int) -> Tensor | None:
        """Class embeddings of the rows of a pass: (B, 1, C) or (1, C), and with guidance (2B, 1, C)."""
        if not self.active or conditional is None or unguided is None:
            return conditional
        return torch.cat([conditional.expand(B, 1, -1), unguided.expand(B, 1, -1)])

    def query_scale(self, B: int, like: Tensor) -> Tensor | None:
        """Per-row factor on the queries, (2B, 1, 1, 1), in float32 or wider; None where all logits keep their scale."""
        if not self.active or self.attn_temp == 1:
            return None
        scale = torch.ones(2 * B, 1, 1, 1, dtype=wide_dtype(like), device=like.device)
        scale[B:] /= self.attn_temp
        return scale

    def combine(self, parameters: Tensor, parts: tuple[str, ...], position: int, T: int) -> Tensor:
        """Parameters of both passes to guided ones.

        Args:
            parameters: (2B, W, P D): of W tokens from `position` on, rows of both passes.
            parts: the names of their P parts, 'a' and 'b' or 'b' alone.
            position: of the first token, in the order of the net.
            T: tokens of the sequence.

        Returns:
            (B, W, P D); the parameters themselves where guidance is not active.
        """
        if not self.active:
            return parameters
        guided, unguided = (half.chunk(len(parts), dim=-1) for half in parameters.chunk(2))
        g = self.strength(position, parameters.size(1), T, parameters)
        combined = [
            conditional + g * (conditional - free) if part in self.what else conditional
            for part, conditional, free in zip(parts, guided, unguided, strict=True)
        ]
        return torch.cat(combined, dim=-1)

    def strength(self, position: int, W: int, T: int, like: Tensor) -> Tensor | float:
        """g_i of W tokens from `position` on: a number where all are equal, else (W, 1)."""
        if not self.annealed:
            return self.weight
        if W == 1:
            return self.weight * (position + 1) / max(T - 1, 1)
        tokens = torch.arange(position + 1, position + W + 1, dtype=torch.float64)
        return (self.weight * tokens / max(T - 1, 1)).to(like)[:, None]
