"""The published sampling code, one step of it, on any device: it stands for what a user of the original has today.

It is the reference's step as it is: a Python loop, a cache that grows by torch.cat, and two passes for guidance. A step
at the middle of a sequence stands for all of them, because a whole block would take minutes.
"""

import torch

from tarflow_fast import reference


def published_step(block, B, guided, position, dtype, device):
    """A callable that runs the published step at `position`, with a cache as long as it is by then."""
    C, D = block.pos_embed.size(1), block.proj_in.in_features
    H, E = C // 64, 64

    def filled():
        cache = reference.KVCache(len(block.attn_blocks))
        for layer in range(len(block.attn_blocks)):
            cache.keys[layer] = torch.randn(B, H, position, E, dtype=dtype, device=device)
            cache.values[layer] = torch.randn(B, H, position, E, dtype=dtype, device=device)
        return cache

    caches = [filled() for _ in range(1 + guided)]
    kept = [(list(cache.keys), list(cache.values)) for cache in caches]
    token, pos = torch.randn(B, 1, D, device=device), block.pos_embed[None, position : position + 1]

    @torch.no_grad()
    def run():
        for cache, (keys, values) in zip(caches, kept, strict=True):
            cache.keys, cache.values = list(keys), list(values)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                a, b = block.step(token, pos, block.class_embedding(None), cache)
        return a.exp() * token + b

    return run
