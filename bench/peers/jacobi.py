"""The published accelerations of the inverse by Jacobi's iteration: they stand for what research offers beside ours.

They run on this project's passes, so that only the method differs.
Full-sequence Jacobi, Selective Jacobi decoding (SeJD, arXiv 2505.24791) and GS-Jacobi (arXiv 2505.12849), each with the
stopping rule, the caps and the clamp that it was published with. None of them promises that a token satisfies its own
equation: the tests are means or differences over the whole batch, iterations are capped, and GS-Jacobi clamps.

Each method is a function (passes, bijection, z, first) -> (x (B, T, D), passes of the net), `first` for the block that
is decoded first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from tarflow_fast.engines.call import Call
from tarflow_fast.engines.table import open_passes
from tarflow_fast.model import TarFlow
from tarflow_fast.solvers.sequential import Passes, solve_sequentially
from tarflow_fast.transforms import Bijection, Guidance

Method = Callable[[Passes, Bijection, Tensor, bool], tuple[Tensor, int]]


def iterate(
    passes: Passes,
    bijection: Bijection,
    z: Tensor,
    x: Tensor,
    begin: int,
    end: int,
    most: int,
    over: Callable[[Tensor], bool],
    clamp: float | None = None,
) -> int:
    """Jacobi's iteration on tokens begin + 1 .. end of x (B, T, D, of net order), in place. Returns its passes.

    most: iterations, at most.  over: whether the difference (B, n, D) between two iterates ends it.
    """
    target = slice(begin + 1, end + 1)
    for count in range(1, most + 1):
        parameters = passes.run(x[:, begin:end].contiguous(), begin)
        new, _ = bijection.transform.inverse(z[:, target], parameters)
        new = new if clamp is None else new.clamp(-clamp, clamp)
        moved = new - x[:, target]
        x[:, target] = new
        if over(moved):
            return count
    return most


def jacobi(passes: Passes, bijection: Bijection, z: Tensor, first: bool) -> tuple[Tensor, int]:
    """All tokens at once until none of the batch moves by more than 1e-3 in the mean of squares over mean squares.

    The rule is that of the published STARFlow code: mean(dx^2) / mean(x^2) < 1e-3, at most 32 iterations.
    """
    x, last = z.clone(), z.size(1) - 1
    rule = lambda moved: bool(moved.square().mean() / x.square().mean() < 1e-3)  # noqa: E731
    return x, iterate(passes, bijection, z, x, 0, last, min(32, last), rule)


def selective_jacobi(passes: Passes, bijection: Bijection, z: Tensor, first: bool) -> tuple[Tensor, int]:
    """SeJD: the block decoded first one token after another, the others by Jacobi until max |dx| < 0.5."""
    last = z.size(1) - 1
    if first:
        order = bijection.order
        return order.take(solve_sequentially(passes, bijection, order.put(z))[0]), last
    x = z.clone()
    return x, iterate(passes, bijection, z, x, 0, last, last, lambda moved: bool(moved.abs().max() < 0.5))


def gs_jacobi(passes: Passes, bijection: Bijection, z: Tensor, first: bool) -> tuple[Tensor, int]:
    """GS-Jacobi: the hard block in 8 segments, the others whole; at most 10 and 32 iterations, values within +-3.

    An iteration ends the loop when |dx| over B * C falls to 1e-8. The block decoded first is taken for the hard one.
    """
    x, last = z.clone(), z.size(1) - 1
    parts, most = (8, 10) if first else (1, 32)
    bounds = [round(last * part / parts) for part in range(parts + 1)]
    width = z.size(0) * z.size(2)
    count = 0
    for begin, end in itertools.pairwise(bounds):
        if end > begin:
            rule = lambda moved: bool(moved.norm() / width <= 1e-8)  # noqa: E731
            count += iterate(passes, bijection, z, x, begin, end, min(most, end - begin), rule, clamp=3.0)
    return x, count


METHODS: dict[str, Method] = {"Jacobi": jacobi, "SeJD": selective_jacobi, "GS-Jacobi": gs_jacobi}


@torch.no_grad()
def invert(
    model: TarFlow, noise: Tensor, y: Tensor | None, method: Method, guidance: float = 0.0
) -> tuple[Tensor, dict[int, int]]:
    """Noise (B, T, D) -> tokens (B, T, D), and the passes of the net by block."""
    tokens, counts, K = noise * model.var.sqrt(), {}, len(model.blocks)
    guide = Guidance(guidance)
    with Call(model.backend, nets=[each.net for each in model.bijections]) as call:
        for number, bijection in reversed(list(enumerate(model.bijections))):
            passes = open_passes(bijection, tokens, y, guide, call)
            x, counts[number] = method(passes, bijection, bijection.order.take(tokens), number == K - 1)
            tokens = bijection.order.put(x)
    return tokens, counts
