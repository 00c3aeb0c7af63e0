"""Shapes and inputs, shared by tests and benches: ragged, degenerate, and one of a real model's size."""

from typing import NamedTuple

import torch


class AffineCase(NamedTuple):
    B: int
    T: int
    D: int
    scale: bool = True  # ab holds a and b; else b alone
    flip: bool = False

    def __str__(self):
        return f"{self.B}x{self.T}x{self.D}" + ("" if self.scale else "-shift") + ("-flip" if self.flip else "")


AFFINE_CASES = [
    AffineCase(0, 5, 3),
    AffineCase(2, 1, 3),
    AffineCase(2, 1, 7, scale=False, flip=True),
    AffineCase(1, 2, 1),
    AffineCase(3, 5, 1, flip=True),
    AffineCase(2, 3, 15),
    AffineCase(2, 4, 16, scale=False),
    AffineCase(1, 3, 17, flip=True),
    AffineCase(2, 9, 31, scale=False, flip=True),
    AffineCase(1, 1023, 5, flip=True),  # several work items a row
    AffineCase(2, 3, 5000, flip=True),  # one token longer than a work item
    AffineCase(4, 64, 12),  # 16x16 images, patch 2
]


def affine_inputs(case, dtypes=(torch.float32, torch.float32), device="cpu"):
    """(x, ab, dz, dlog_det); log-scales about as large as a trained flow's, some tokens far out."""
    B, T, D = case.B, case.T, case.D
    x = torch.randn(B, T, D, dtype=torch.float64)
    x[:, ::3] *= 30
    ab = torch.randn(B, T, 2 * D if case.scale else D, dtype=torch.float64)
    dz, dlog_det = torch.randn(B, T, D, dtype=torch.float64), torch.randn(B, dtype=torch.float64)
    sums = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    kinds = (dtypes[0], dtypes[1], dtypes[0], sums)
    return tuple(tensor.to(kind).to(device) for tensor, kind in zip((x, ab, dz, dlog_det), kinds, strict=True))
