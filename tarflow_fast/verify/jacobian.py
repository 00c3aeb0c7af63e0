"""The Jacobian of each flow block by autograd in float64: its log-determinant, and whether it is triangular."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from tarflow_fast.block import MetaBlock
from tarflow_fast.flow import TokenFlow
from tarflow_fast.verify.stages import Stages, finite_rows

__all__ = ["Autograd", "against_autograd"]

_BYTES = 2**28  # of activations saved for backward at a time
_SAVED_VALUES = 24  # float64 values a token, layer and channel, about


class Autograd(NamedTuple):
    """Figures of n rows, float64 on the CPU; infinite where something is not finite.

    off: (n, K), the forward pass's log-determinant of a block less that of its Jacobian. rounding: (n, K), what float64
    may have cost the latter. above: (n, K), the largest entry that must be 0: dz_i/dx_j with token j after token i in
    the order of the block, or another element of token i itself.
    """

    off: Tensor
    rounding: Tensor
    above: Tensor


@torch.inference_mode(False)
@torch.enable_grad()
def against_autograd(flow: TokenFlow, forward: Stages, y: Tensor | None, rows: int) -> Autograd:
    """The first `rows` rows of a forward pass that are finite, each block at the tokens it was given there.

    A float64 copy of the block runs on PyTorch's own kernels. A triangular matrix would only need its diagonal, but
    that it is triangular is what has to be shown, so the log-determinant is that of the whole matrix, by LU. The
    transpose is what is decomposed: where the claim holds it has nothing below its diagonal, LU has nothing to do, and
    all rounding is that of T D logarithms, w (1 + abs(log)) each, with float64's unit roundoff w = 2^-53.
    """
    chosen = torch.stack([finite_rows(tokens) for tokens in forward.tokens]).all(dim=0).nonzero()[:rows, 0]
    figures = []
    for block, tokens, log_det in zip(flow.blocks, forward.tokens, forward.log_dets, strict=False):
        exact = copy.deepcopy(block).double().requires_grad_(False)
        for row in chosen.tolist():
            label = None if y is None else y[row : row + 1].clone()
            matrix = _jacobian(exact, tokens[row].detach().clone().double(), label)
            rounding = 2.0**-53 * (1 + matrix.diagonal().abs().log().abs()).sum()
            off = log_det[row].double() - torch.linalg.slogdet(matrix.T).logabsdet
            figures.append(torch.stack([off, rounding, (matrix.abs() * _zero(exact)).amax()]))
    found = torch.stack(figures) if figures else forward.tokens[0].new_zeros(0, 3, dtype=torch.float64)
    found = found.view(len(flow.blocks), len(chosen), 3).nan_to_num(nan=torch.inf).cpu()
    return Autograd(*found.permute(2, 1, 0).unbind(0))


def _jacobian(block: MetaBlock, x: Tensor, label: Tensor | None) -> Tensor:
    """(T D, T D): dz/dx at x (T, D), tokens in the order of the block on both sides.

    There are as many copies of x as z has numbers, and each copy is asked for the gradient of one of them.
    """
    T, D = x.shape
    token_bytes = 8 * _SAVED_VALUES * len(block.attn_blocks) * block.pos_embed.size(1)
    part, rows = max(1, _BYTES // (token_bytes * T)), []
    for numbers in torch.arange(T * D, device=x.device).split(part):
        copies = x.expand(len(numbers), T, D).clone().requires_grad_()
        labels = None if label is None else label.expand(len(numbers))
        z, _ = block(copies, labels, backend="torch", mean=False)
        (gradient,) = torch.autograd.grad(z.flatten(1).gather(1, numbers[:, None]).sum(), copies)
        rows.append(gradient)
    places = block.order.index(x.device)
    matrix = torch.cat(rows).view(T, D, T, D).index_select(0, places).index_select(2, places)
    return matrix.reshape(T * D, T * D)


def _zero(block: MetaBlock) -> Tensor:
    """(T D, T D) bool: which entries the block claims to be 0."""
    T, D, device = block.num_tokens, block.token_size, block.pos_embed.device
    later = torch.ones(T, T, dtype=torch.bool, device=device).triu(1).repeat_interleave(D, 0).repeat_interleave(D, 1)
    same = torch.eye(T, dtype=torch.bool, device=device).repeat_interleave(D, 0).repeat_interleave(D, 1)
    return later | (same & ~torch.eye(T * D, dtype=torch.bool, device=device))
