"""The precision in which statistics, exp and log-determinants are computed."""

from __future__ import annotations

import torch

__all__ = ["wide_dtype"]


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """float32 for a tensor of float32 or 16 bits, float64 for one of float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
