"""The inverse as one CUDA graph of PyTorch's kernels: it stands for the fastest sampling that needs no kernel of ours.

The cache is static and is read whole behind a mask, both guidance passes run in one batch, and a step is one graph,
optionally under torch.compile.
"""

import torch
from torch.nn import functional as F


class GraphSampler:
    """One block's inverse with a static cache. Every step makes the same launches, so that a CUDA graph can hold it.

    This is as far as a good PyTorch user gets. Attention reads the whole cache behind a mask, since shapes must not
    change.
    """

    def __init__(self, block, B, guided, dtype, timer, compiled=False):
        self.block, self.B, self.guided, self.dtype, self.timer = block, B, guided, dtype, timer
        (T, C), D, device = block.pos_embed.shape, block.proj_in.in_features, block.pos_embed.device
        R, H = B * (1 + guided), C // 64
        self.x, self.z = torch.zeros(B, T, D, device=device), torch.zeros(B, T, D, device=device)
        self.i = torch.zeros(1, dtype=torch.long, device=device)
        self.cache = torch.zeros(len(block.attn_blocks), 2, R, H, T, 64, dtype=dtype, device=device)
        self.scale = torch.full((R, 1, 1, 1), 64**-0.5, device=device)
        self.places = torch.arange(T, device=device)
        self.order = self.places.flip(0) if block.flip else self.places
        self.weights = {name: p.detach().to(dtype if p.ndim == 2 else p.dtype) for name, p in block.named_parameters()}
        self.g = 0.0
        self.step = torch.compile(self._step, dynamic=False) if compiled else self._step
        self.replay = None

    @torch.no_grad()
    def _step(self):
        w, dtype = self.weights, self.dtype
        place, following = self.order.index_select(0, self.i), self.order.index_select(0, self.i + 1)

        def linear(x, name):
            return F.linear(x.to(dtype), w[name + ".weight"], w[name + ".bias"].to(dtype))

        tokens = self.x.index_select(1, place)
        tokens = torch.cat([tokens, tokens]) if self.guided else tokens
        h = linear(tokens, "proj_in").float() + self.block.pos_embed.index_select(0, place)
        if self.block.class_embed is not None:
            h = h + self.block.class_embed.mean(0)
        R, _, C = h.shape
        mask = (self.places <= self.i)[None, None, None]
        for number in range(len(self.block.attn_blocks)):
            at = f"attn_blocks.{number}"

            def norm(h, name):
                return F.layer_norm(h, (C,), w[name + ".weight"], w[name + ".bias"])

            qkv = linear(norm(h, f"{at}.attention.norm"), f"{at}.attention.qkv").view(R, 1, 3, C // 64, 64)
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            keys, values = self.cache[number]
            keys.index_copy_(2, self.i, key)
            values.index_copy_(2, self.i, value)
            query = (query.float() * self.scale).to(dtype)
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=1.0)
            h = h + linear(out.reshape(R, 1, C), f"{at}.attention.proj")
            h = h + linear(F.gelu(linear(norm(h, f"{at}.mlp.norm"), f"{at}.mlp.main.0")), f"{at}.mlp.main.2")
        a, b = linear(h, "proj_out").float().chunk(2, dim=-1)
        if self.guided:
            (a, a_u), (b, b_u) = a.chunk(2), b.chunk(2)
            a, b = a + self.g * (a - a_u), b + self.g * (b - b_u)
        self.x.index_copy_(1, following, self.z.index_select(1, following) * torch.exp(a) + b)
        self.i += 1

    def invert(self, z, guidance=0.0, attn_temp=1.0):
        """x of noise z (B, T, D), without labels."""
        if self.replay is None:
            # The weight of guidance is a constant of the graph.
            self.g = guidance
            self.scale[self.B :] = 64**-0.5 / attn_temp
            self.i.zero_()
            for _ in range(2):
                self.step()
            self.i.zero_()
            self.replay = self.timer.graph(self.step)
        self.x.copy_(z)
        self.z.copy_(z)
        self.i.zero_()
        for _ in range(z.size(1) - 1):
            self.replay()
        return self.x
