"""How a flow block is inverted: `invert_block` chooses the engine, each call owns its workspace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from tarflow_fast.inverse.guidance import Guidance
from tarflow_fast.inverse.sequential import invert_sequential
from tarflow_fast.inverse.workspace import KVCache

if TYPE_CHECKING:
    from tarflow_fast.block import MetaBlock

__all__ = ["Guidance", "KVCache", "invert_block"]


def invert_block(
    block: MetaBlock,
    z: Tensor,
    y: Tensor | None,
    guidance: Guidance,
    kv_cache: KVCache | None = None,
    on_token: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The inverse of `block` at z (B, T, D): x (B, T, D) and log_det (B,), the sum of a over tokens and D.

    A kv_cache given is reused (a model inverts K blocks with one); otherwise the call allocates its own.
    """
    if kv_cache is None:
        kv_cache = KVCache(len(block.attn_blocks), z.size(1))
    return invert_sequential(block, z, y, guidance, kv_cache, on_token)
