"""The inverse of an increasing function that has none in closed form: Newton's method inside a bracket."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["solve_increasing"]


@torch.no_grad()
def solve_increasing(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], u: Tensor, low: Tensor, high: Tensor, start: Tensor
) -> Tensor:
    """x with function(x) = u, element by element, to the rounding of u's dtype.

    An element takes a Newton step, unless that leaves its bracket or the step before did not halve |function(x) - u|:
    then it goes to the middle of the bracket. It is found when its residual is one rounding of u (of 1 where |u| is
    below it), its step is less than a rounding of x, or its bracket holds no other number. There is no count of steps
    at which it would stop short: the residual halves, or the bracket does.

    Args:
        function: x -> its value and its derivative, of the shape of x; increasing.
        low, high: a bracket of each element. It is widened by some roundings.
        start: first values.

    Returns:
        x; where bracket or residual is not finite, the middle of the bracket, which is then not finite either, or x as
        it stood.
    """
    eps, tiny = torch.finfo(u.dtype).eps, torch.finfo(u.dtype).tiny
    margin = 8 * eps * torch.maximum(low.abs(), high.abs()) + tiny
    low, high = low - margin, high + margin
    bracketed = low.isfinite() & high.isfinite()
    x = torch.where(bracketed, torch.minimum(torch.maximum(start, low), high), low + (high - low) / 2)
    found, previous = ~bracketed, torch.full_like(u, torch.inf)
    enough = eps * u.abs().clamp(min=1)
    while not found.all():
        value, slope = function(x)
        residual = value - u
        below = residual < 0
        low, high = torch.where(below, x, low), torch.where(below, high, x)
        step, size = residual / slope, residual.abs()
        following, middle = x - step, low + (high - low) / 2
        newton = (following > low) & (following < high) & (size <= previous / 2)
        following, previous = torch.where(newton, following, middle), size
        settled = (size <= enough) | ~size.isfinite() | (following <= low) | (following >= high)
        x = torch.where(found | settled, x, following)
        found = found | settled | (newton & (step.abs() <= eps / 2 * x.abs()))
    return x
