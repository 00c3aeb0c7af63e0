"""Round trips through a flow, from x to z and back or from z to x and back, as figures a row and a block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tarflow_fast.flow import TokenFlow
from tarflow_fast.verify.stages import Stages, finite_rows, log_scales

__all__ = ["Trip", "measure_trip"]


class Trip(NamedTuple):
    """Figures of n rows, float64 on the CPU; infinite where something is not finite.

    apart: (n, K), the largest difference between the way there and the way back, after each block of the way back.
    error: (n,), that at its end. log_dets: (n, K), the sum of forward's and inverse's. a: (n, K), the largest abs(a).
    sum_a: (n,), the sum of abs(a) over all blocks. largest: (n,), the largest number the trip started from.
    inverse_overflow, forward_overflow: (n, K), 1 where finite tokens became infinite or NaN in this block, 0 where they
    did not, NaN where they were not finite before.
    """

    apart: Tensor
    error: Tensor
    log_dets: Tensor
    a: Tensor
    sum_a: Tensor
    largest: Tensor
    inverse_overflow: Tensor
    forward_overflow: Tensor

    @classmethod
    def joined(cls, parts: list[Trip]) -> Trip:
        """The figures of all rows, of those of a part of them each."""
        return cls(*(torch.cat(values) for values in zip(*parts, strict=True)))


def measure_trip(flow: TokenFlow, forward: Stages, inverse: Stages, y: Tensor | None, from_x: bool) -> Trip:
    """The figures of one round trip; from_x: `forward` came first, and `inverse` started where it ended."""
    there, back = (forward, inverse) if from_x else (inverse, forward)
    K = len(flow.blocks)
    after = range(K) if from_x else range(1, K + 1)  # the stage a block leaves behind on the way back
    apart = torch.stack([_largest(back.tokens[k].double() - there.tokens[k].double()) for k in after], dim=1)
    scales = [
        log_scales(block, tokens, y, flow.backend) for block, tokens in zip(flow.blocks, there.tokens, strict=False)
    ]
    scales = [there.tokens[0].new_zeros(len(apart), 0) if a is None else a.abs().flatten(1) for a in scales]
    figures = Trip(
        apart=apart,
        error=apart[:, 0 if from_x else K - 1],
        log_dets=(torch.stack(forward.log_dets).double() + torch.stack(inverse.log_dets).double()).T,
        a=torch.stack([_largest(a) for a in scales], dim=1),
        sum_a=torch.stack([a.double().sum(dim=1) for a in scales]).sum(dim=0),
        largest=_largest(there.tokens[0 if from_x else K]),
        inverse_overflow=torch.stack([_overflow(*inverse.tokens[k : k + 2][::-1]) for k in range(K)], dim=1),
        forward_overflow=torch.stack([_overflow(*forward.tokens[k : k + 2]) for k in range(K)], dim=1),
    )
    return Trip(*(values.double().cpu() for values in figures))


def _largest(rows: Tensor) -> Tensor:
    """(B,) the largest absolute value of each row of (B, ...), float64; infinite for NaN, 0 for an empty row."""
    rows = rows.double().abs().flatten(1).nan_to_num(nan=torch.inf)
    return rows.amax(dim=1) if rows.size(1) else rows.new_zeros(len(rows))


def _overflow(before: Tensor, after: Tensor) -> Tensor:
    """(B,) of tokens (B, T, D) before and after a block."""
    return (~finite_rows(after)).double().where(finite_rows(before), torch.nan)
