"""How a flow block is inverted: `invert_block` chooses the engine, each call owns its workspace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from tarflow_fast.inverse.graph import choose_graph, invert_graph, prepare_graph
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The inverse of `block` at z (B, T, D): x (B, T, D) and log_det (B,), the sum of a over tokens and D.

    A kv_cache given is reused (a model inverts K blocks with one); otherwise the call allocates its own.

    Raises:
        RuntimeError: backend "triton" was asked for by name and cannot run.
    """
    if kv_cache is None:
        kv_cache = KVCache(len(block.attn_blocks), z.size(1))
    if not kv_cache.growing and choose_graph(block, z, backend):
        kv_cache.graph = workspace = prepare_graph(block, z, guidance, kv_cache.graph, backend)
        if workspace is not None:
            return invert_graph(block, z, y, guidance, workspace, on_token)
    return invert_sequential(block, z, y, guidance, kv_cache, on_token)
