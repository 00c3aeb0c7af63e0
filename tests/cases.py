"""Shapes and inputs that tests and benches share: ragged ones, degenerate ones, and one of a real model's size."""

from typing import NamedTuple

import torch


class AffineCase(NamedTuple):
    B: int
    T: int
    D: int
    scale: bool = True  # True: ab holds a and b. False: ab holds b alone.
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
    AffineCase(1, 1023, 5, flip=True),  # each row is several work items
    AffineCase(2, 2, 4100, flip=True),  # one token is longer than a work item
    AffineCase(4, 64, 12),  # 16x16 images, patch 2
]


def affine_inputs(case, dtypes=(torch.float32, torch.float32), device="cpu"):
    """Draws (x, ab, dz, dlog_det). Log-scales are about as large as in a trained flow, and some tokens are far out.

    Log-scales end at 2, and many are near 2. If they were normal, a single number could be exp(4) times as large as the
    others, and the error rule would judge that number alone.
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
    AttentionCase(1, 64, 1, 64, 1.5),  # the tiles divide T evenly
    AttentionCase(1, 70, 1, 128),
    AttentionCase(1, 130, 1, 64),  # two tiles of the largest size do not divide T evenly
]


def attention_inputs(case, dtype=torch.float32, device="cpu"):
    """Draws (qkv, dout): qkv is (B, T, 3, H, E), with logits of a few units, and dout is (B, T, H, E)."""
    B, T, H, E, _ = case
    qkv = torch.randn(B, T, 3, H, E, dtype=torch.float64)
    return qkv.to(dtype).to(device), torch.randn(B, T, H, E, dtype=torch.float64).to(dtype).to(device)


class RowsCase(NamedTuple):
    """A tensor of shape (*shape, N), whose rows have N numbers, for layer_norm, bias_gelu and bias_residual."""

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
    RowsCase((1, 7), 600),  # a row is longer than one tile
    RowsCase((600,), 40),  # the sums over rows are taken in several chunks
]
ROWS_DTYPES = [  # dtypes of (rows, parameters, residual stream or result)
    (torch.float64, torch.float64, torch.float64),
    (torch.float32, torch.float32, torch.float32),
    (torch.float16, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
]


def rows_inputs(case, dtypes, device="cpu"):
    """Draws (x, weight, bias, residual, dout). Every seventh column of x is larger, as in a residual stream."""
    rows, parameters, stream = dtypes
    x, residual, dout = (torch.randn(*case.shape, case.N, dtype=torch.float64) for _ in range(3))
    x[..., ::7] *= 5
    weight, bias = 1 + 0.3 * torch.randn(case.N, dtype=torch.float64), torch.randn(case.N, dtype=torch.float64)
    kinds = (rows, parameters, parameters, stream, stream)
    return tuple(t.to(kind).to(device) for t, kind in zip((x, weight, bias, residual, dout), kinds, strict=True))
