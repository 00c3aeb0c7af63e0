"""The reference as a good PyTorch user would improve it: it stands for what is possible without any compiled code.

The cache is preallocated, both guidance passes run in one batch, flips are indices, and the layer can run under
torch.compile.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tarflow_fast import ReferenceTarFlow


def layer_step(h, weights, keys, values, i, scale, H):
    """One transformer layer for one token: h (R, 1, C), keys and values (R, H, T, E), scale (R, 1, 1, 1)."""
    R, _, C = h.shape
    ln1_w, ln1_b, qkv_w, qkv_b, proj_w, proj_b, ln2_w, ln2_b, fc1_w, fc1_b, fc2_w, fc2_b = weights
    qkv = F.linear(F.layer_norm(h, (C,), ln1_w, ln1_b), qkv_w, qkv_b).view(R, 3, H, 1, C // H)
    query, keys[:, :, i : i + 1], values[:, :, i : i + 1] = qkv[:, 0] * scale, qkv[:, 1], qkv[:, 2]
    out = F.scaled_dot_product_attention(query, keys[:, :, : i + 1], values[:, :, : i + 1], scale=1.0)
    h = h + F.linear(out.reshape(R, 1, C), proj_w, proj_b)
    return h + F.linear(F.gelu(F.linear(F.layer_norm(h, (C,), ln2_w, ln2_b), fc1_w, fc1_b)), fc2_w, fc2_b)


class ImprovedSampler:
    """`reverse` of a reference model, improved; it keeps the guidance arguments."""

    def __init__(self, model: ReferenceTarFlow, compiled: bool = False) -> None:
        self.model = model
        # One graph serves all layers and blocks, because weights are arguments; it is dynamic: the position changes.
        self.layer = torch.compile(layer_step, dynamic=True) if compiled else layer_step

    @torch.no_grad()
    def reverse(self, x, y=None, guidance=0.0, attn_temp=1.0):
        model = self.model
        B, T, _ = x.shape
        C, L = model.blocks[0].pos_embed.size(1), len(model.blocks[0].attn_blocks)
        H = C // 64
        R = 2 * B if guidance > 0 else B
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        scale = torch.full((R, 1, 1, 1), 64**-0.5, dtype=dtype, device=x.device)
        if guidance > 0:
            scale[B:] /= attn_temp
        cache = torch.empty(2, L, R, H, T, C // H, dtype=dtype, device=x.device)
        tokens = x * model.var.sqrt()
        for block in reversed(model.blocks):
            order = range(T - 1, -1, -1) if block.flip else range(T)
            weights = [tuple(p for p in layer.parameters()) for layer in block.attn_blocks]
            classes = block.class_embedding(y)
            if guidance > 0 and block.class_embed is not None:
                classes = torch.cat([classes.expand(B, 1, C), block.class_embedding(None).expand(B, 1, C)])
            z, tokens = tokens, tokens.clone()
            for i in range(T - 1):
                token = tokens[:, order[i], None]
                token = torch.cat([token, token]) if guidance > 0 else token
                h = block.proj_in(token) + block.pos_embed[order[i]] + classes
                for number in range(L):
                    h = self.layer(h, weights[number], cache[0, number], cache[1, number], i, scale, H)
                a, b = block.split(h[:, 0])
                if guidance > 0:
                    (a, a_u), (b, b_u) = a.chunk(2), b.chunk(2)
                    a, b = a + guidance * (a - a_u), b + guidance * (b - b_u)
                tokens[:, order[i + 1]] = z[:, order[i + 1]] * torch.exp(a) + b
        return model.unpatchify(tokens)
