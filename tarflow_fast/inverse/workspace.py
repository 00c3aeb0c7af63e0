"""The state of one inverse call: caches and workspaces. It belongs to the call, never to a module, so that an
interrupted or concurrent call leaves nothing behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tarflow_fast.inverse.plan import PRECISIONS
from tarflow_fast.validate import check_positive_int

if TYPE_CHECKING:
    from tarflow_fast.block import MetaBlock
    from tarflow_fast.inverse.engine import Engine
    from tarflow_fast.inverse.frozen import FrozenBlocks
    from tarflow_fast.inverse.graph import GraphWorkspace
    from tarflow_fast.ops.block_inverse import InversePath


class InverseCall:
    """What the K blocks of one inverse call, or of the parts of a sample, share: choices, and memory made at first use.

    Args:
        backend: of the op `block_inverse`.
        precision: 'fp32', 'bf16', 'int8' (native CPU engine only), or None: that of the parameters, or of autocast.
        differentiable: keep an autograd graph.
        memory_limit: bytes the engine may take, of the host or the GPU; None: most of what the machine has left. A
            larger batch is inverted in parts.
        blocks: those of the model, by which messages number a block.
        frozen: of a frozen model: what is known of its blocks, and their packed weights.
        where: the function called, for messages.
    """

    def __init__(
        self,
        backend: str = "auto",
        precision: str | None = None,
        differentiable: bool = False,
        memory_limit: int | None = None,
        blocks: Sequence[nn.Module] = (),
        frozen: FrozenBlocks | None = None,
        where: str = "reverse",
    ) -> None:
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"{where}: precision must be None or one of {', '.join(PRECISIONS)}, got {precision!r}")
        if memory_limit is not None:
            memory_limit = check_positive_int(where, "memory_limit", memory_limit)
        self.backend, self.precision, self.differentiable = backend, precision, differentiable
        self.memory_limit, self.blocks, self.frozen, self.where = memory_limit, blocks, frozen, where
        self.paths: dict[int, InversePath] | None = None  # of `blocks` still to come, by id; None: not looked at yet
        self.told = False  # whether it was said that a block is left to PyTorch
        self._kv_cache: KVCache | None = None
        self._engine: Engine | None = None
        self.graph: GraphWorkspace | None = None

    def begin(self) -> None:
        """Another pass over the blocks begins, perhaps with another number of rows. Engine and graph stay."""
        self.paths = self._kv_cache = None

    def __enter__(self) -> InverseCall:
        return self

    def __exit__(self, *raised: object) -> None:
        """The call is over. Not left to __del__: Python drops a Ctrl-C that comes inside one."""
        if self._engine is not None:
            self._engine.close()
        self.graph = self._kv_cache = None

    def name_of(self, block: nn.Module) -> str:
        """What a message calls the block."""
        return next((f"block {number}" for number, each in enumerate(self.blocks) if each is block), "a block")

    def kv_cache(self, block: MetaBlock, z: Tensor) -> KVCache:
        """The cache of the PyTorch path."""
        if self._kv_cache is None:
            self._kv_cache = KVCache(len(block.attn_blocks), z.size(1), growing=self.differentiable)
        return self._kv_cache

    def engine(self, precision: str) -> Engine:
        """The native engine of this call."""
        if self._engine is None or self._engine.precision != precision:
            from tarflow_fast.inverse.engine import Engine

            self._engine = Engine(precision, self.memory_limit, frozen=self.frozen)
        return self._engine


class KVCache:
    """Preallocated keys and values, (L, R, H, T, E) each, written in place; one cache serves all flow blocks of a call.

    Allocated at the first append, when dtype (autocast!) and device are known. With `growing=True` nothing is written
    in place, so that autograd may look back: the differentiable inverse.
    """

    def __init__(self, num_layers: int, num_tokens: int, growing: bool = False) -> None:
        self.num_layers, self.num_tokens, self.growing = num_layers, num_tokens, growing
        self.storage: Tensor | None = None
        self.restart()

    def restart(self) -> None:
        """Forget the tokens seen, keep the memory: the next flow block begins."""
        self.length = [0] * self.num_layers
        self.grown: list[tuple[Tensor, Tensor] | None] = [None] * self.num_layers

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add W tokens, (R, H, W, E) each; returns all keys and values so far, (R, H, t + W, E)."""
        if self.growing:
            if self.grown[layer] is not None:
                key, value = (
                    torch.cat([old, new], dim=2) for old, new in zip(self.grown[layer], (key, value), strict=True)
                )
            self.grown[layer] = (key, value)
            return key, value
        R, H, W, E = key.shape
        if self.storage is None:
            self.storage = key.new_empty(2, self.num_layers, R, H, self.num_tokens, E)
        start, end = self.length[layer], self.length[layer] + W
        self.length[layer] = end
        keys, values = self.storage[:, layer]
        keys[:, :, start:end] = key
        values[:, :, start:end] = value
        return keys[:, :, :end], values[:, :, :end]
