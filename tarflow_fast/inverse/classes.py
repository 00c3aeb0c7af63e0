"""Class embeddings as the native engine takes them: one row for each row of a pass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tarflow_fast.block import MetaBlock

__all__ = ["class_rows", "class_table"]


def class_table(block: MetaBlock) -> Tensor | None:
    """The mean of a block's class embeddings and then these, (1 + num_classes, C) float32; None without classes.

    Raises:
        ValueError: one is NaN or infinite.
    """
    if block.class_embed is None:
        return None
    embeddings = block.class_embed.detach()[:, 0].to(torch.float32)
    mean = embeddings.mean(dim=0, keepdim=True)
    # one NaN or infinity makes its column's mean one; finite ones may overflow to it
    if not math.isfinite(mean.sum().item()) and not torch.isfinite(embeddings).all():
        raise ValueError("block_inverse: weights must be finite, got NaN or infinity in class_embed")
    return torch.cat([mean, embeddings])


def class_rows(table: Tensor, y: Tensor | None, B: int, guided: bool) -> Tensor:
    """The embeddings of B labels, the mean for a negative one or none at all; under guidance each followed by the mean.

    (B, C), or guided (2B, C).
    """
    rows = table[:1].expand(B, -1) if y is None else table[y.clamp(min=-1) + 1]
    return (torch.stack([rows, table[:1].expand(B, -1)], dim=1).flatten(0, 1) if guided else rows).contiguous()
