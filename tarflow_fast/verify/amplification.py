"""How much a flow amplifies a small change of its tokens, block by block and from end to end.

An inverse may explode although every block is invertible on paper (arXiv 2006.09347): what rounding leaves behind in
one block is stretched by all blocks after it. Two figures are measured, both by finite differences:

    stretch of a block     largest |f(u + d) - f(u)| / |d|, Euclidean norms, over rows u and random directions d
    reach of the flow      largest |change at the end| / step, largest number of a row, when the tokens between any two
                           blocks are moved by `step` times their largest number, each up or down at random

Rounding moves the tokens between blocks in just this way, with the unit roundoff as the step, so that the reach says
how large an error of rounding becomes (Monte Carlo arithmetic; D. S. Parker, 1997).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tarflow_fast.engines.call import Call
from tarflow_fast.flow import TokenFlow
from tarflow_fast.solvers import invert
from tarflow_fast.transforms import Guidance
from tarflow_fast.verify.stages import Stages, finite_rows, forward_stages

__all__ = ["Amplification"]

Map = Callable[[int, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Amplification:
    """The largest figures met so far; infinite where a moved row overflowed, or 0 while `rows` is.

    rows: those measured. inverse_stretch, forward_stretch: (K,) float64, of each block. to_x: the reach of the inverse,
    in units of x; to_z: that of the forward pass, in units of z. to_log_det: how far either's log-determinant moves, in
    nats a step.

    Args:
        flow: float32 or float64, since 16-bit numbers are too coarse to take differences of.
        directions: random directions a row and block.
        generator: of the directions, on the CPU.
    """

    def __init__(self, flow: TokenFlow, directions: int, generator: torch.Generator) -> None:
        self.flow, self.directions, self.generator = flow, directions, generator
        # Half of the digits: a difference loses as much to rounding as to the curvature of the flow.
        self.step = torch.finfo(flow.var.dtype).eps ** 0.5
        K = len(flow.blocks)
        self.inverse_stretch, self.forward_stretch = torch.zeros(2, K, dtype=torch.float64)
        self.rows, self.to_x, self.to_z, self.to_log_det = 0, 0.0, 0.0, 0.0

    def measure(self, x: Tensor, y: Tensor | None) -> None:
        """Take rows x (B, T, D) with their labels into account; rows that are not finite all the way are left out."""
        flow, K = self.flow, len(self.flow.blocks)
        stages = forward_stages(flow, x, y)
        keep = torch.stack([finite_rows(tokens) for tokens in stages.tokens]).all(dim=0)
        if not keep.any():
            return
        self.rows += int(keep.sum())
        y = None if y is None else y[keep]
        stages = Stages([tokens[keep] for tokens in stages.tokens], stages.log_dets)

        def forward(k: int, tokens: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
            return flow.blocks[k](tokens, y, backend=flow.backend, mean=False)

        with Call(flow.backend, nets=flow.blocks, where="verify_flow") as call:

            def inverse(k: int, tokens: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
                return invert(flow.bijections[k], tokens, y, Guidance(), call)

            back = self._walk(inverse, stages.tokens[-1], y, range(K - 1, -1, -1), self.inverse_stretch)
        there = self._walk(forward, stages.tokens[0], y, range(K), self.forward_stretch)
        self.to_x, self.to_z = max(self.to_x, back[0]), max(self.to_z, there[0])
        self.to_log_det = max(self.to_log_det, back[1], there[1])

    def _walk(
        self, through: Map, start: Tensor, y: Tensor | None, blocks: range, stretch: Tensor
    ) -> tuple[float, float]:
        """The reach of blocks in turn from `start` (B, T, D), and that on the log-determinant; updates `stretch` (K,).

        The rows at rest go the same way as those that are moved. Were they taken from elsewhere, a fault of `through`
        would count as amplification, and the limit derived from it would hide the fault.
        """
        B, R = len(start), self.directions
        labels = None if y is None else y.repeat(R + 2)
        rest, noisy = start, start + self._moves(start)
        log_det = torch.zeros(B, dtype=torch.float64, device=start.device)
        for k in blocks:
            moves = torch.cat([self._moves(rest) for _ in range(R)])
            moved = rest.repeat(R, 1, 1) + moves
            moves = moved - rest.repeat(R, 1, 1)  # what is left of the moves after rounding
            out, stretched = through(k, torch.cat([rest, noisy, moved]), labels)
            rest, noisy, moved = out[:B], out[B : 2 * B], out[2 * B :]
            ratio = (_norm(moved - rest.repeat(R, 1, 1)) / _norm(moves)).nan_to_num(nan=torch.inf)
            # A row of zeros cannot be moved by a share of its largest number: 0 / 0 says nothing.
            stretch[k] = max(stretch[k].item(), ratio.where(_norm(moves) > 0, 0.0).amax().item())
            noisy = noisy + self._moves(rest)
            log_det += stretched[B : 2 * B].double() - stretched[:B].double()
        reached = [(noisy - rest).double().abs().amax(dim=(1, 2)), log_det.abs()]
        return tuple((far / self.step).nan_to_num(nan=torch.inf).amax().item() for far in reached)

    def _moves(self, tokens: Tensor) -> Tensor:
        """A step up or down for every number of (B, T, D), `self.step` times the largest number of its row."""
        signs = torch.randint(0, 2, tokens.shape, generator=self.generator).to(tokens) * 2 - 1
        return signs * self.step * tokens.abs().amax(dim=(1, 2), keepdim=True)


def _norm(rows: Tensor) -> Tensor:
    return rows.double().flatten(1).norm(dim=1)
