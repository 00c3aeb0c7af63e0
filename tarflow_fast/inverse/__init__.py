"""How a flow block is inverted: `invert_block` chooses the engine, each call owns its workspace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from tarflow_fast.inverse.frozen import FrozenBlocks
from tarflow_fast.inverse.guidance import Guidance
from tarflow_fast.inverse.workspace import InverseCall, KVCache

if TYPE_CHECKING:
    from tarflow_fast.block import MetaBlock

__all__ = ["FrozenBlocks", "Guidance", "InverseCall", "KVCache", "invert_block"]


def invert_block(
    block: MetaBlock,
    z: Tensor,
    y: Tensor | None,
    guidance: Guidance,
    call: InverseCall | None = None,
    on_token: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The inverse of `block` at z (B, T, D): x (B, T, D) and log_det (B,), the sum of a over tokens and D.

    An InverseCall given is reused (a model inverts K blocks with one); otherwise the call owns one of its own. Which
    backend runs is decided by the op's table, tarflow_fast/ops/block_inverse.py.
    """
    from tarflow_fast.ops.block_inverse import block_inverse  # that module imports this package

    if call is not None:
        return block_inverse(block, z, y, guidance, call, on_token)
    with InverseCall() as own:
        return block_inverse(block, z, y, guidance, own, on_token)
