"""Judges an inverse from outside: does every token that was returned satisfy its own equation?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from tarflow_fast.flow import TokenFlow
from tarflow_fast.reference import MetaBlock as PlainBlock

__all__ = ["residuals"]


@torch.no_grad()
def residuals(
    model: TokenFlow,
    stages: Sequence[Tensor],
    y: Tensor | None,
    guidance: float = 0.0,
    guide_what: str = "ab",
    attn_temp: float = 1.0,
    annealed_guidance: bool = False,
) -> Tensor:
    """(K, B, T): the largest |z exp(a(x)) + b(x) - x| over D, float64, in the order in which blocks are solved.

    Each block's equations are evaluated in one parallel pass of the plain reference in float64, over the values that
    were returned. Nothing of the engine or of the solver takes part. The rows of K are blocks K - 1 .. 0.

    Args:
        model: a flow of affine or shift blocks.
        stages: K + 1 tensors (B, T, D), the scaled noise first: what each block took and returned.
        y: (B,) labels or None.
        guidance, guide_what, attn_temp, annealed_guidance: as in `reverse`.

    Source: TarFlow (arXiv 2412.06329), sections 3.1 and 3.4.
    """
    found = []
    for number, (z, x) in enumerate(itertools.pairwise(stages), 1):
        block, T = model.blocks[-number], x.size(1)
        plain = PlainBlock(
            block.token_size, block.pos_embed.size(1), T, False, len(block.attn_blocks), block.nvp, block.num_classes,
            head_size=block.attn_blocks[0].attention.head_size,
        ).double()  # fmt: skip
        plain.load_state_dict({name: value.double() for name, value in block.state_dict().items()})
        places = torch.tensor(block.order.places)
        plain.pos_embed.copy_(plain.pos_embed[places])
        z, x = z.double()[:, places], x.double()[:, places]

        a, b = _parameters(plain, x, y)
        if guidance > 0:
            a_u, b_u = _parameters(plain, x, None, attn_temp)
            g = guidance * (torch.arange(T)[:, None] + 1) / (T - 1) if annealed_guidance else guidance
            a = a + g * (a - a_u) if "a" in guide_what and block.nvp else a
            b = b + g * (b - b_u) if "b" in guide_what else b
        v = torch.cat([z[:, :1], z[:, 1:] * a[:, :-1].exp() + b[:, :-1]], dim=1)
        found.append((v - x).abs().amax(dim=2))
    return torch.stack(found)


def _parameters(plain: PlainBlock, x: Tensor, y: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """a and b, (B, T, D) each: what the net says after each token of x (B, T, D)."""
    h = plain.proj_in(x) + plain.pos_embed + plain.class_embedding(y)
    for layer in plain.attn_blocks:
        h = layer(h, mask=plain.attn_mask.bool(), temperature=temperature)
    return plain.split(h)
