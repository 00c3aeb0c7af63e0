"""Does every backend of the op `affine` compute what it should? Each against float64 and plain PyTorch."""

from collections.abc import Callable
from typing import Any

import torch

from tarflow_fast.ops import affine, affine_ref
from tarflow_fast.ops.affine import DTYPES
from tarflow_fast.ops.registry import BACKENDS, OPS
from tarflow_fast.verify.rule import Row, Worst, error_and_bound

__all__ = ["verify_ops"]


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
    # With so many rows the largest error of plain PyTorch among their log_dets, which sets the bound, is no accident.
    # Log-scales end at 2: were they normal, one number exp(4) times the others would be judged alone.
    for B, T, D, scale, flip in ((32, 70, 12, True, False), (32, 33, 19, True, True), (2, 33, 48, False, True)):

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        ab = draw(B, T, 2 * D if scale else D)
        if scale:
            ab[..., :D].uniform_(-2, 2, generator=generator)
        inputs = [draw(B, T, D).to(dtypes[0]), ab.to(dtypes[1])]
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
