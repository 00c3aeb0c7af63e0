"""The state of one inverse call: the key/value cache. It belongs to the call, never to a module, so that an interrupted
or concurrent call leaves nothing behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tarflow_fast.inverse.graph import GraphWorkspace


class KVCache:
    """Preallocated keys and values, (L, R, H, T, E) each, written in place; one cache serves all flow blocks of a call.

    Allocated at the first append, when dtype (autocast!) and device are known. With `growing=True` nothing is written
    in place, so that autograd may look back: the differentiable inverse.
    """

    def __init__(self, num_layers: int, num_tokens: int, growing: bool = False) -> None:
        self.num_layers, self.num_tokens, self.growing = num_layers, num_tokens, growing
        self.storage: Tensor | None = None
        self.graph: GraphWorkspace | None = None  # what the GPU path keeps between the blocks of a call
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
