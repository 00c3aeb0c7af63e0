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
    AffineCase(24, 2, 1),
    AffineCase(12, 5, 1, flip=True),
    AffineCase(2, 3, 15),
    AffineCase(2, 4, 16, scale=False),
    AffineCase(1, 3, 17, flip=True),
    AffineCase(2, 9, 31, scale=False, flip=True),
    AffineCase(1, 1023, 5, flip=True),  # several work items a row
    AffineCase(2, 2, 4100, flip=True),  # one token longer than a work item
    AffineCase(4, 64, 12),  # 16x16 images, patch 2
]


def affine_inputs(case, dtypes=(torch.float32, torch.float32), device="cpu"):
    """(x, ab, dz, dlog_det); log-scales about as large as a trained flow's, some tokens far out.

    Log-scales end at 2, with many near it. Were they normal, one number exp(4) times the others would be judged alone.
    """
    B, T, D = case.B, case.T, case.D
    x = torch.randn(B, T, D, dtype=torch.float64)
    x[:, ::3] *= 30
    ab = torch.randn(B, T, 2 * D if case.scale else D, dtype=torch.float64)
    if case.scale:
        ab[..., :D].uniform_(-2, 2)
    dz, dlog_det = torch.randn(B, T, D, dtype=torch.float64), torch.randn(B, dtype=torch.float64)
    sums = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    kinds = (dtypes[0], dtypes[1], dtypes[0], sums)
    return tuple(tensor.to(kind).to(device) for tensor, kind in zip((x, ab, dz, dlog_det), kinds, strict=True))


class AttentionCase(NamedTuple):
    B: int
    T: int
    H: int
    E: int
    temperature: float = 1.0

    def __str__(self):
        return f"{self.B}x{self.T}x{self.H}x{self.E}" + (f"-at{self.temperature}" if self.temperature != 1 else "")


ATTENTION_CASES = [
    AttentionCase(0, 5, 2, 16),
    AttentionCase(8, 2, 3, 16, 0.8),
    AttentionCase(2, 17, 1, 32),
    AttentionCase(1, 64, 1, 64, 1.5),  # whole tiles
    AttentionCase(1, 70, 1, 128),
    AttentionCase(1, 130, 1, 64),  # two tiles of the largest size, ragged
]


def attention_inputs(case, dtype=torch.float32, device="cpu"):
    """(qkv, dout): qkv (B, T, 3, H, E) with logits of a few units, dout (B, T, H, E)."""
    B, T, H, E, _ = case
    qkv = torch.randn(B, T, 3, H, E, dtype=torch.float64)
    return qkv.to(dtype).to(device), torch.randn(B, T, H, E, dtype=torch.float64).to(dtype).to(device)


class RowsCase(NamedTuple):
    """Rows of N numbers, `shape` of them: for layer_norm, bias_gelu, bias_residual."""

    shape: tuple[int, ...]
    N: int

    def __str__(self):
        return "x".join(map(str, (*self.shape, self.N)))


ROWS_CASES = [
    RowsCase((0,), 5),
    RowsCase((2, 0), 64),
    RowsCase((), 3),
    RowsCase((3,), 1),
    RowsCase((2, 5), 17),
    RowsCase((2, 3), 64),
    RowsCase((1, 7), 600),  # more than one tile across
    RowsCase((600,), 40),  # several chunks of rows in the sums over them
]
ROWS_DTYPES = [  # of (rows, parameters, residual stream or result)
    (torch.float64, torch.float64, torch.float64),
    (torch.float32, torch.float32, torch.float32),
    (torch.float16, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
]


def rows_inputs(case, dtypes, device="cpu"):
    """(x, weight, bias, residual, dout): rows far from 0 now and then, as a residual stream is."""
    rows, parameters, stream = dtypes
    x, residual, dout = (torch.randn(*case.shape, case.N, dtype=torch.float64) for _ in range(3))
    x[..., ::7] *= 5
    weight, bias = 1 + 0.3 * torch.randn(case.N, dtype=torch.float64), torch.randn(case.N, dtype=torch.float64)
    kinds = (rows, parameters, parameters, stream, stream)
    return tuple(t.to(kind).to(device) for t, kind in zip((x, weight, bias, residual, dout), kinds, strict=True))
