"""The inverse of one flow block, one token after another, in PyTorch:

    x_0 = z_0;   x_{i+1} = z_{i+1} * exp(a_i) + b_i,   (a_i, b_i) = net(x_0 .. x_i)            (arXiv 2412.06329, 2.1)

The cache is written in place, guidance is 2B rows of one pass, a flip is an index, and the last token needs no pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tarflow_fast.dtypes import wide_dtype
from tarflow_fast.inverse.guidance import Guidance
from tarflow_fast.inverse.workspace import KVCache

if TYPE_CHECKING:
    from tarflow_fast.block import MetaBlock


def invert_sequential(
    block: MetaBlock,
    z: Tensor,
    y: Tensor | None,
    guidance: Guidance,
    kv_cache: KVCache,
    on_token: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """z (B, T, D) -> x (B, T, D) in z's dtype, and the inverse's log_det (B,), the sum of a, float32 or wider.

    With a growing cache no tensor is written in place, and the result can be differentiated.
    """
    B, T, _ = z.shape
    order = range(T - 1, -1, -1) if block.flip else range(T)
    classes = guidance.batch_classes(block.class_embedding(y), block.class_embedding(None), B)
    query_scale = guidance.query_scale(B, z)
    wide = wide_dtype(z)
    log_det = torch.zeros(B, dtype=wide, device=z.device)
    kv_cache.restart()

    x_next = z[:, order[0]]
    found = [x_next]
    for i in range(T - 1):
        rows = torch.cat([x_next, x_next]) if guidance.active else x_next
        h = block.embed(rows[:, None], block.pos_embed[order[i]], classes)
        for number, layer in enumerate(block.attn_blocks):
            h = layer.step(h, kv_cache, number, query_scale)
        ab = block.proj_out(h)[:, 0].to(wide)
        a, b = ab.chunk(2, dim=-1) if block.nvp else (torch.zeros_like(ab), ab)
        a, b = guidance.combine(a, b, i, T)
        x_next = (z[:, order[i + 1]] * torch.exp(a) + b).to(z.dtype)
        found.append(x_next)
        log_det = log_det + a.sum(dim=-1)
        if on_token is not None:
            on_token()
    return torch.stack(found[::-1] if block.flip else found, dim=1), log_det
