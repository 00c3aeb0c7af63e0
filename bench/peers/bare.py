"""The bare operations of the inverse in PyTorch: they stand for the least time that an honest baseline can take.

The operations are those that every step must have: the products, normalisations, attention over the tokens so far, GELU
and the update. They run on weights of the right shapes without any code of a model. They compute no sample. They are
timed in the same rounds as the baseline, so a baseline that does more than the work it claims shows itself by its time.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

LIMIT = 2.0  # of the bare operations: on the machine of docs/speed.md the baseline takes 1.0 to 1.5 times as long


class BareOperations:
    """The operations of K blocks, T - 1 steps, L layers and B rows, once a guidance pass."""

    def __init__(self, B: int, T: int, D: int, C: int, K: int, L: int, passes: int) -> None:
        def weight(out: int, into: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.randn(out, into) * into**-0.5, torch.zeros(out)

        self.layers = [(weight(3 * C, C), weight(C, C), weight(4 * C, C), weight(C, 4 * C)) for _ in range(L)]
        self.ends = weight(C, D), weight(2 * D, C)
        self.norm = torch.ones(C), torch.zeros(C)
        self.token, self.pos = torch.randn(B, 1, D), torch.randn(1, 1, C)
        self.cache = torch.randn(2, B, C // 64, T, 64)
        self.steps, self.repeats = T - 1, K * passes

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        for _ in range(self.repeats):
            for i in range(self.steps):
                last = self.step(i)
        return last

    def step(self, i: int) -> torch.Tensor:
        h = F.linear(self.token, *self.ends[0]) + self.pos
        B, _, C = h.shape
        for qkv, proj, fc1, fc2 in self.layers:
            query, key, value = F.linear(F.layer_norm(h, (C,), *self.norm), *qkv).view(B, 3, C // 64, 1, 64).unbind(1)
            self.cache[0, :, :, i : i + 1], self.cache[1, :, :, i : i + 1] = key, value
            keys, values = self.cache[0, :, :, : i + 1], self.cache[1, :, :, : i + 1]
            h = h + F.linear(F.scaled_dot_product_attention(query, keys, values).reshape(B, 1, C), *proj)
            h = h + F.linear(F.gelu(F.linear(F.layer_norm(h, (C,), *self.norm), *fc1)), *fc2)
        a, b = F.linear(h, *self.ends[1]).chunk(2, dim=-1)
        return self.token * torch.exp(a) + b
