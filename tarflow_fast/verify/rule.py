"""The error rule: |got - truth| <= 2 |plain - truth| + 2 ulp, plain being PyTorch's answer in the same precision.

It has two forms. Kernels are held to the one by element: the middle term is the largest over the tensor, the last term
is that of each element, in the tensor's storage type. Whole flows are held to the one by tensor, since a flow carries
the rounding of one element to all that follow it: the largest error, against the largest of PyTorch and 2 ulp of the
largest value.
"""

from typing import Any, NamedTuple

import torch

__all__ = ["FACTOR", "ULPS", "Row", "Worst", "error_and_bound", "largest_error_and_bound"]

FACTOR, ULPS = 2.0, 2.0

Row = dict[str, Any]  # name, backend, dtype, worst_error, bound, ok
Truth = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def error_and_bound(
    got: torch.Tensor, truth: Truth, plain: torch.Tensor, factor: float = FACTOR, ulps: float = ULPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Error of each element and what the rule allows it, float64, shape of `got`.

    truth: float64 or, where float64 itself is judged, a pair (high, low) whose sum is the truth. Elements past the
    range of the storage type have error 0: whether `got` overflows where `plain` does is for the caller to compare.
    """
    high, low = truth if isinstance(truth, tuple) else (truth.double(), 0.0)
    measurable = plain.isfinite() & high.isfinite()

    def error_of(value: torch.Tensor) -> torch.Tensor:
        return ((value.double() - high) - low).abs().where(measurable, 0.0)

    largest = error_of(plain).max() if plain.numel() else 0.0
    return error_of(got), factor * largest + ulps * ulp(high, got.dtype)


def largest_error_and_bound(got: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor) -> tuple[float, float]:
    """The largest error of a whole tensor, and what the rule allows it; NaN where `got` has one."""
    largest = (plain.double() - truth).abs().max().item()
    step = torch.finfo(got.dtype).eps * truth.abs().max().item()
    return (got.double() - truth).abs().max().item(), FACTOR * largest + ULPS * step


def ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance of neighbouring numbers of `dtype` around each element of x (float64)."""
    limits = torch.finfo(dtype)
    exponent = torch.frexp(x.abs().nan_to_num().clamp(min=limits.tiny, max=limits.max)).exponent - 1
    return torch.ldexp(torch.full_like(x, limits.eps), exponent)


class Worst(NamedTuple):
    """The element nearest to, or furthest past, its bound."""

    error: float = 0.0
    bound: float = 0.0

    def update(self, error: torch.Tensor, bound: torch.Tensor) -> "Worst":
        if error.numel() == 0:
            return self
        ratio = (error / bound).flatten()
        at = ratio.argmax()  # a NaN counts as the largest
        if self.error != self.error or (self.bound and ratio[at] <= self.error / self.bound):  # NaN stays
            return self
        return Worst(error.flatten()[at].item(), bound.flatten()[at].item())

    def row(self, name: str, backend: str, dtype: str) -> Row:
        tested = {"name": name, "backend": backend, "dtype": dtype}
        return tested | {"worst_error": self.error, "bound": self.bound, "ok": self.error <= self.bound}
