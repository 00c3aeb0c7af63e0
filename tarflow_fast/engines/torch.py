"""The engine of last resort and of gradients: the net's own modules, on any device, one pass after another.

The key/value cache is written in place, unless autograd looks back; guidance is 2B rows of one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tarflow_fast.dtypes import wide_dtype
from tarflow_fast.engines.call import Call
from tarflow_fast.net import KVCache
from tarflow_fast.transforms import Bijection, Guidance

__all__ = ["TorchEngine", "TorchPasses"]


class _State:
    """The cache of a call: one serves all its blocks of equal size."""

    cache: KVCache | None = None

    def close(self) -> None:
        self.cache = None

    def cache_for(self, layers: int, T: int, rows: int, growing: bool) -> KVCache:
        cache = self.cache
        fits = cache is not None and (cache.num_layers, cache.num_tokens, cache.growing) == (layers, T, growing)
        if not fits or (cache.storage is not None and cache.storage.size(2) != rows):
            cache = self.cache = KVCache(layers, T, growing)
        cache.restart()
        return cache


class TorchPasses:
    """Passes over one block, for one batch."""

    solve = None  # the solvers find the tokens

    def __init__(self, bijection: Bijection, z: Tensor, y: Tensor | None, guidance: Guidance, cache: KVCache) -> None:
        net, _, order = bijection
        self.bijection, self.guidance, self._cache = bijection, guidance, cache
        B = z.size(0)
        self._classes = guidance.batch_classes(net.class_embedding(y), net.class_embedding(None), B)
        self._query_scale = guidance.query_scale(B, z)
        self._pos_embed, self._wide = order.take(net.pos_embed, 0), wide_dtype(z)

    def run(self, tokens: Tensor, position: int) -> Tensor:
        """The net on W tokens a row, which follow those it saw before; a later pass may overwrite these.

        tokens: (B, W, D) of net order.  position: of the first of them.  Returns (B, W, P D), guided, float32 or wider.
        """
        net, transform, _ = self.bijection
        W = tokens.size(1)
        self._cache.rewind(position)
        rows = torch.cat([tokens, tokens]) if self.guidance.active else tokens
        h = net.embed(rows, self._pos_embed[position : position + W], self._classes)
        for number, layer in enumerate(net.attn_blocks):
            h = layer.step(h, self._cache, number, self._query_scale)
        parameters = net.proj_out(h).to(self._wide)
        return self.guidance.combine(parameters, transform.parts, position, net.num_tokens)


class TorchEngine:
    """PyTorch itself: it takes every net and has no reason not to run."""

    name = "torch"

    def missing(self) -> str:
        return ""

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str:
        return ""

    def open(
        self, bijection: Bijection, z: Tensor, y: Tensor | None, guidance: Guidance, call: Call, weights: None = None
    ) -> TorchPasses:
        layers, T = len(bijection.net.attn_blocks), bijection.net.num_tokens
        rows = z.size(0) * (2 if guidance.active else 1)
        cache = call.state(self.name, _State).cache_for(layers, T, rows, call.differentiable)
        return TorchPasses(bijection, z, y, guidance, cache)
