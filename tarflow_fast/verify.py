"""Does this installation compute what it should, on this machine? Every op and backend that can run, against float64.

The error rule: |got - truth| <= 2 |plain - truth| + 2 ulp, plain being PyTorch's answer in the same precision. The
middle term is the largest over the tensor, the last that of each element in the tensor's storage type.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tarflow_fast.ops import affine, affine_ref
from tarflow_fast.ops.affine import DTYPES
from tarflow_fast.ops.registry import BACKENDS, OPS
from tarflow_fast.verify_layer import verify_layer
from tarflow_fast.verify_model import verify_model

__all__ = ["SUITES", "Row", "error_and_bound", "run", "verify_ops"]

FACTOR, ULPS = 2.0, 2.0

Row = dict[str, Any]  # name, backend, dtype, worst_error, bound, ok
Truth = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def run(device: str = "cpu") -> tuple[list[Row], bool]:
    """All rows, and whether every one is ok."""
    rows = [row for suite in SUITES for row in suite(device)]
    return rows, all(row["ok"] for row in rows)


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


def verify_ops(device: str) -> list[Row]:
    """One row an op, backend that can run on `device`, and pair of dtypes."""
    where, rows = torch.device(device), []
    for backend in BACKENDS[1:]:
        for dtypes in DTYPES[1:]:  # float64 is the truth here
            if not OPS["affine"].why_not(backend, where, dtypes[0]):
                rows.append(_verify_affine(backend, where, dtypes))
    return rows


def _verify_affine(backend: str, device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]) -> Row:
    worst, generator = Worst(), torch.Generator().manual_seed(0)
    for B, T, D, scale, flip in ((3, 70, 12, True, False), (2, 33, 19, True, True), (2, 33, 48, False, True)):

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        inputs = [draw(B, T, D).to(dtypes[0]), draw(B, T, 2 * D if scale else D).to(dtypes[1])]
        pull = draw(B, T, D).to(dtypes[0]), draw(B)
        truth = _affine_and_gradients(affine_ref, [t.double() for t in inputs], [t.double() for t in pull], flip)
        inputs, pull = [t.to(device) for t in inputs], [t.to(device) for t in pull]
        plain = _affine_and_gradients(affine_ref, inputs, pull, flip)
        got = _affine_and_gradients(lambda x, ab, flip: affine(x, ab, flip, backend), inputs, pull, flip)
        for triple in zip(got, truth, plain, strict=True):
            worst = worst.update(*error_and_bound(*(t.cpu() for t in triple)))
    return worst.row("affine", backend, ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _affine_and_gradients(
    form: Callable[..., Any], inputs: list[torch.Tensor], pull: list[torch.Tensor], flip: bool
) -> tuple[torch.Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    z, log_det = form(*leaves, flip)
    log_det = log_det + 0.0 * leaves[1].sum().to(log_det.dtype)  # without a scale it is a constant
    return z.detach(), log_det.detach(), *torch.autograd.grad((z, log_det), leaves, pull)


# What `run` runs, in order: each takes a device and gives rows.
SUITES: list[Callable[[str], list[Row]]] = [verify_ops, verify_layer, verify_model]
