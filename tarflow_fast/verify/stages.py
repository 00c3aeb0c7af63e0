"""A flow block by block: the tokens and log-determinants between its blocks, in both directions, and its log-scales."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tarflow_fast.block import MetaBlock
from tarflow_fast.engines.fused import fused_layers
from tarflow_fast.flow import TokenFlow
from tarflow_fast.solvers import invert_all
from tarflow_fast.transforms import Guidance

__all__ = ["Stages", "finite_rows", "forward_stages", "inverse_stages", "log_scales"]


class Stages(NamedTuple):
    """What lies between the K blocks, in the order of the forward pass whichever way it was computed.

    tokens: K + 1 tensors (B, T, D), x first and z last. log_dets: K tensors (B,), nats, of the direction computed.
    """

    tokens: list[Tensor]
    log_dets: list[Tensor]


def forward_stages(flow: TokenFlow, x: Tensor, y: Tensor | None) -> Stages:
    """x (B, T, D) through all blocks, as the flow's own `forward` does it."""
    tokens, log_dets = [x], []
    for block in flow.blocks:
        z, log_det = block(tokens[-1], y, backend=flow.backend, mean=False)
        tokens.append(z)
        log_dets.append(log_det)
    return Stages(tokens, log_dets)


def inverse_stages(flow: TokenFlow, z: Tensor, y: Tensor | None, precision: str | None = None) -> Stages:
    """z (B, T, D) back through all blocks, as the flow's own `inverse` does it."""
    tokens, log_dets = [z], []
    with flow._call("verify_flow", precision, False, None) as call:
        for x, log_det in invert_all(flow.bijections, z, y, Guidance(), call):
            tokens.append(x)
            log_dets.append(log_det)
    return Stages(tokens[::-1], log_dets[::-1])


def log_scales(block: MetaBlock, tokens: Tensor, y: Tensor | None, backend: str) -> Tensor | None:
    """The log-scales a of a block at its tokens (B, T, D): (B, T - 1, D), float32 or wider, in the order of the net.

    None where the block has none. Tokens may hold infinities and NaN: a is 0 from the first such token on, since the
    net only knows the tokens before.
    """
    parts = block.transform.parts
    if "a" not in parts:
        return None
    seen = block.order.take(tokens)
    known = torch.isfinite(seen).all(dim=2, keepdim=True).cumprod(dim=1).bool()
    h = block.embed(seen.where(known, 0), block.order.take(block.pos_embed, 0), block.class_embedding(y))
    parameters = block.project(fused_layers(block.attn_blocks, h, backend))
    a = parameters.chunk(len(parts), dim=-1)[parts.index("a")].where(known, 0)
    return (a if a.dtype == torch.float64 else a.float())[:, :-1]


def finite_rows(tokens: Tensor) -> Tensor:
    """(B,) bool: which rows of (B, T, D) hold neither NaN nor infinity."""
    return torch.isfinite(tokens).flatten(1).all(dim=1)
