"""TarFlow in plain PyTorch: the definition of correct, and the honest speed baseline. Imports nothing of ours.

A flow block maps tokens x to z by an affine step whose parameters come from a causal transformer
(arXiv 2412.06329, section 2):

    (a_i, b_i) = net(x_0 .. x_i);   z_0 = x_0;   z_{i+1} = (x_{i+1} - b_i) * exp(-a_i)
    logdet = mean over (T, D) of -a

It is as direct as the paper's own sampler, and no slower: in `forward` attention takes an explicit causal mask; in
`reverse` every token is one Python step, the key/value cache grows by `torch.cat`, and guidance makes two passes.
Runs in float32, float64, bfloat16, and under autocast; statistics, exp and log-determinants are float32 or wider.

Dimensions: B batch rows, T tokens, D token size, C channels, H heads, E head size, L layers in a block, K flow blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_SIZE = 64


class KVCache:
    """Keys and values of every layer seen so far, each (B, H, t, E), grown by concatenation."""

    def __init__(self, num_layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys[layer] is not None:
            key = torch.cat([self.keys[layer], key], dim=2)
            value = torch.cat([self.values[layer], value], dim=2)
        self.keys[layer], self.values[layer] = key, value
        return key, value


class Attention(nn.Module):
    def __init__(self, channels: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(
        self,
        h: Tensor,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        B, T, C = h.shape
        qkv = self.qkv(self.norm(h)).reshape(B, T, 3, C // self.head_size, self.head_size)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, E)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        scale = self.head_size**-0.5 / temperature
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return self.proj(out.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.main = nn.Sequential(
            nn.Linear(channels, channels * expansion), nn.GELU(), nn.Linear(channels * expansion, channels)
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.main(self.norm(h))


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, head_size: int, expansion: int) -> None:
        super().__init__()
        self.attention = Attention(channels, head_size)
        self.mlp = MLP(channels, expansion)

    def forward(self, h: Tensor, **attention: object) -> Tensor:
        h = h + self.attention(h, **attention)
        return h + self.mlp(h)


class MetaBlock(nn.Module):
    """One flow block. `flip` tells whether it sees the tokens in reverse order."""

    def __init__(
        self,
        token_size: int,
        channels: int,
        num_tokens: int,
        flip: bool,
        num_layers: int,
        nvp: bool = True,
        num_classes: int = 0,
        head_size: int = HEAD_SIZE,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        self.flip, self.nvp = flip, nvp
        self.proj_in = nn.Linear(token_size, channels)
        self.pos_embed = nn.Parameter(0.01 * torch.randn(num_tokens, channels))
        self.class_embed = nn.Parameter(0.01 * torch.randn(num_classes, 1, channels)) if num_classes else None
        self.attn_blocks = nn.ModuleList(AttentionBlock(channels, head_size, expansion) for _ in range(num_layers))
        self.proj_out = nn.Linear(channels, 2 * token_size if nvp else token_size)
        nn.init.zeros_(self.proj_out.weight)
        self.register_buffer("attn_mask", torch.ones(num_tokens, num_tokens).tril())

    def order(self, tokens: Tensor, dim: int) -> Tensor:
        """Patch order to net order and back: both are the same flip."""
        return tokens.flip(dim) if self.flip else tokens

    def class_embedding(self, y: Tensor | None) -> Tensor | float:
        """(B, 1, C) for labels, the mean over classes where there is none (y is None, or y < 0 in a row)."""
        if self.class_embed is None:
            return 0.0
        mean = self.class_embed.mean(dim=0)
        if y is None:
            return mean
        return torch.where((y < 0).view(-1, 1, 1), mean, self.class_embed[y.clamp(min=0)])

    def split(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Log-scale a and shift b, each (B, T, D), float32 or wider; a = 0 when volume preserving."""
        ab = self.proj_out(h)
        ab = ab if ab.dtype == torch.float64 else ab.float()
        return ab.chunk(2, dim=-1) if self.nvp else (torch.zeros_like(ab), ab)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> z (B, T, D), logdet (B,): the mean over T * D of -a, where token 0 counts as 0."""
        x = self.order(x, 1)
        h = self.proj_in(x) + self.order(self.pos_embed, 0) + self.class_embedding(y)
        mask = self.attn_mask.bool()
        for block in self.attn_blocks:
            h = block(h, mask=mask)
        a, b = (F.pad(t[:, :-1], (0, 0, 1, 0)) for t in self.split(h))  # the net's output at i conditions token i + 1
        z = ((x - b) * torch.exp(-a)).to(x.dtype)
        return self.order(z, 1), -a.mean(dim=(1, 2))

    def step(
        self, token: Tensor, pos: Tensor, embedding: Tensor | float, cache: KVCache, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(a_i, b_i), each (B, 1, D), from token i of net order, its embeddings, and the cache of those before it."""
        h = self.proj_in(token) + pos + embedding
        for layer, block in enumerate(self.attn_blocks):
            h = block(h, temperature=temperature, cache=cache, layer=layer)
        return self.split(h)

    def reverse(
        self,
        z: Tensor,
        y: Tensor | None = None,
        guidance: float = 0.0,
        guide_what: str = "ab",
        attn_temp: float = 1.0,
        annealed_guidance: bool = False,
    ) -> Tensor:
        """z (B, T, D) -> x (B, T, D): x_0 = z_0; x_{i+1} = z_{i+1} * exp(a_i) + b_i, one token after another."""
        x = self.order(z, 1).clone()
        T = x.size(1)
        cache, unguided_cache = KVCache(len(self.attn_blocks)), KVCache(len(self.attn_blocks))
        pos_embed = self.order(self.pos_embed, 0)
        embedding, unguided_embedding = self.class_embedding(y), self.class_embedding(None)
        for i in range(T - 1):
            token, pos = x[:, i : i + 1], pos_embed[i : i + 1]
            a, b = self.step(token, pos, embedding, cache)
            if guidance > 0:
                a_u, b_u = self.step(token, pos, unguided_embedding, unguided_cache, attn_temp)
                g = guidance * (i + 1) / (T - 1) if annealed_guidance else guidance
                if "a" in guide_what:
                    a = a + g * (a - a_u)
                if "b" in guide_what:
                    b = b + g * (b - b_u)
            x[:, i + 1] = x[:, i + 1] * torch.exp(a[:, 0]) + b[:, 0]
        return self.order(x, 1)


class ReferenceTarFlow(nn.Module):
    """The whole flow: K blocks, odd ones flipped, prior N(0, var). Same constructor and state_dict as `TarFlow`."""

    def __init__(
        self,
        in_channels: int,
        img_size: int | tuple[int, int],
        patch_size: int,
        channels: int,
        num_blocks: int,
        layers_per_block: int,
        nvp: bool = True,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.patch_size, self.image_size = patch_size, (height, width)
        num_tokens, token_size = (height // patch_size) * (width // patch_size), in_channels * patch_size**2
        self.blocks = nn.ModuleList(
            MetaBlock(token_size, channels, num_tokens, k % 2 == 1, layers_per_block, nvp, num_classes)
            for k in range(num_blocks)
        )
        self.register_buffer("var", torch.ones(num_tokens, token_size))

    def patchify(self, x: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, T, D); a token holds (channel, row, column) in that order."""
        return F.unfold(x, self.patch_size, stride=self.patch_size).transpose(1, 2)

    def unpatchify(self, z: Tensor) -> Tensor:
        return F.fold(z.transpose(1, 2), self.image_size, self.patch_size, stride=self.patch_size)

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
        tokens, outputs = self.patchify(x), []
        logdets = torch.zeros((), device=x.device)
        for block in self.blocks:
            tokens, logdet = block(tokens, y)
            logdets = logdets + logdet
            outputs.append(tokens)
        return tokens, outputs, logdets

    def get_loss(self, z: Tensor, logdets: Tensor) -> Tensor:
        return 0.5 * z.pow(2).mean() - logdets.mean()

    @torch.no_grad()
    def update_prior(self, z: Tensor) -> None:
        self.var.lerp_(z.pow(2).mean(dim=0).to(self.var.dtype), 0.1)

    @torch.no_grad()
    def reverse(
        self,
        x: Tensor,
        y: Tensor | None = None,
        guidance: float = 0.0,
        guide_what: str = "ab",
        attn_temp: float = 1.0,
        annealed_guidance: bool = False,
        return_sequence: bool = False,
    ) -> Tensor | list[Tensor]:
        """Noise (B, T, D) -> images (B, channels, height, width), or all K + 1 stages of them."""
        sequence = [self.unpatchify(x)]
        x = x * self.var.sqrt()
        for block in reversed(self.blocks):
            x = block.reverse(x, y, guidance, guide_what, attn_temp, annealed_guidance)
            sequence.append(self.unpatchify(x))
        return sequence if return_sequence else sequence[-1]
