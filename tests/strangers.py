"""Stand-ins for the flows of other packages: the original TarFlow on images, and a flow over tokens made of its blocks.

They are written as plainly as possible, from the formulas and from notes on how the original behaves, and they know
nothing of tarflow_fast. They run one Python step per token, their caches grow by `torch.cat`, and their mask is a
buffer. They also keep the original's peculiarities. Statistics are computed in float32, so that `.double()` raises. A
block writes into its input. A label below 0 means the last class in `reverse`, and no label in `forward`.
"""

import torch
from torch import nn
from torch.nn import functional as F


class PermutationIdentity(nn.Module):
    def forward(self, x, dim=1, inverse=False):
        return x


class PermutationFlip(nn.Module):
    def forward(self, x, dim=1, inverse=False):
        return x.flip(dim)


class PermutationRoll:
    """A permutation that is no module, is not its own inverse, and is none of the orders that the original knows."""

    def __init__(self, step):
        self.step = step

    def __call__(self, x, dim=1, inverse=False):
        return x.roll(-self.step if inverse else self.step, dim)


class Attention(nn.Module):
    def __init__(self, channels, head_channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.num_heads, self.head_channels = channels // head_channels, head_channels

    def forward(self, h, mask=None, temperature=1.0, cache=None):
        B, T, C = h.shape
        normed = self.norm(h.float()).to(h.dtype)
        q, k, v = self.qkv(normed).reshape(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            if self in cache:
                k, v = torch.cat([cache[self][0], k], dim=2), torch.cat([cache[self][1], v], dim=2)
            cache[self] = k, v
        scores = q @ k.transpose(-2, -1) / self.head_channels**0.5 / temperature
        if mask is not None:
            scores = scores.masked_fill(mask == 0, float("-inf"))
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, channels, expansion, dropout=None):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        layers = [nn.Linear(channels, expansion * channels), nn.GELU(), nn.Linear(expansion * channels, channels)]
        self.main = nn.Sequential(*layers)
        if dropout is not None:
            self.main.insert(2, nn.Dropout(dropout))

    def forward(self, h):
        return self.main(self.norm(h.float()).to(h.dtype))


class AttentionBlock(nn.Module):
    def __init__(self, channels, head_channels, expansion=4, dropout=None):
        super().__init__()
        self.attention = Attention(channels, head_channels)
        self.mlp = MLP(channels, expansion, dropout)

    def forward(self, h, mask=None, temperature=1.0, cache=None):
        h = h + self.attention(h, mask, temperature, cache)
        return h + self.mlp(h)


class MetaBlock(nn.Module):
    def __init__(
        self,
        token_size,
        channels,
        num_tokens,
        permutation,
        num_layers=1,
        head_channels=64,
        expansion=4,
        nvp=True,
        num_classes=0,
        dropout=None,
    ):
        super().__init__()
        self.proj_in = nn.Linear(token_size, channels)
        self.pos_embed = nn.Parameter(0.01 * torch.randn(num_tokens, channels))
        self.class_embed = nn.Parameter(0.01 * torch.randn(num_classes, 1, channels)) if num_classes else None
        self.attn_blocks = nn.ModuleList(
            AttentionBlock(channels, head_channels, expansion, dropout) for _ in range(num_layers)
        )
        self.nvp = nvp
        self.proj_out = nn.Linear(channels, 2 * token_size if nvp else token_size)
        nn.init.zeros_(self.proj_out.weight)
        self.permutation = permutation
        self.register_buffer("attn_mask", torch.ones(num_tokens, num_tokens).tril())

    def split(self, h):
        h = self.proj_out(h)
        return h.chunk(2, dim=-1) if self.nvp else (torch.zeros_like(h), h)

    def forward(self, x, y=None):
        """z, and the mean of -a over tokens and their elements."""
        x = self.permutation(x)
        h = self.proj_in(x) + self.permutation(self.pos_embed, dim=0)
        if self.class_embed is not None:
            mean = self.class_embed.mean(dim=0)
            h = h + (mean if y is None else torch.where((y < 0).view(-1, 1, 1), mean, self.class_embed[y]))
        for layer in self.attn_blocks:
            h = layer(h, self.attn_mask)
        a, b = (F.pad(each[:, :-1], (0, 0, 1, 0)) for each in self.split(h))
        z = (x - b) * torch.exp(-a.float()).to(a.dtype)
        return self.permutation(z, inverse=True), -a.mean(dim=[1, 2])

    def step(self, x, pos_embed, i, y, cache, temperature=1.0):
        """(a, b), (B, D) each, for token i + 1."""
        h = self.proj_in(x[:, i : i + 1]) + pos_embed[i : i + 1]
        if self.class_embed is not None:
            h = h + (self.class_embed.mean(dim=0) if y is None else self.class_embed[y])
        for layer in self.attn_blocks:
            h = layer(h, temperature=temperature, cache=cache)
        return (each[:, 0] for each in self.split(h))

    def reverse(self, z, y=None, guidance=0, guide_what="ab", attn_temp=1.0, annealed_guidance=False):
        x, pos_embed, T = self.permutation(z), self.permutation(self.pos_embed, dim=0), z.size(1)
        cache, free_cache = {}, {}
        for i in range(T - 1):
            a, b = self.step(x, pos_embed, i, y, cache)
            if guidance > 0:
                free_a, free_b = self.step(x, pos_embed, i, None, free_cache, attn_temp)
                g = (i + 1) / (T - 1) * guidance if annealed_guidance else guidance
                a = a + g * (a - free_a) if "a" in guide_what else a
                b = b + g * (b - free_b) if "b" in guide_what else b
            x[:, i + 1] = x[:, i + 1] * torch.exp(a.float()).to(a.dtype) + b
        return self.permutation(x, inverse=True)


class Model(nn.Module):
    """The original's flow over images."""

    def __init__(
        self, in_channels, img_size, patch_size, channels, num_blocks, layers_per_block, nvp=True, num_classes=0
    ):
        super().__init__()
        self.img_size, self.patch_size = img_size, patch_size
        T, D = (img_size // patch_size) ** 2, in_channels * patch_size**2
        self.blocks = nn.ModuleList(
            MetaBlock(
                D,
                channels,
                T,
                PermutationFlip() if k % 2 else PermutationIdentity(),
                layers_per_block,
                nvp=nvp,
                num_classes=num_classes,
            )
            for k in range(num_blocks)
        )
        self.register_buffer("var", torch.ones(T, D))

    def patchify(self, x):
        return F.unfold(x, self.patch_size, stride=self.patch_size).transpose(1, 2)

    def unpatchify(self, x):
        return F.fold(x.transpose(1, 2), self.img_size, self.patch_size, stride=self.patch_size)

    def forward(self, x, y=None):
        x, outputs, logdets = self.patchify(x), [], torch.zeros((), device=x.device)
        for block in self.blocks:
            x, logdet = block(x, y)
            logdets = logdets + logdet
            outputs.append(x)
        return x, outputs, logdets

    def get_loss(self, z, logdets):
        return 0.5 * z.pow(2).mean() - logdets.mean()

    def reverse(
        self,
        x,
        y=None,
        guidance=0,
        guide_what="ab",
        attn_temp=1.0,
        annealed_guidance=False,
        return_sequence=False,
    ):
        sequence = [self.unpatchify(x)]
        x = x * self.var.sqrt()
        for block in reversed(self.blocks):
            x = block.reverse(x, y, guidance, guide_what, attn_temp, annealed_guidance)
            sequence.append(self.unpatchify(x))
        return sequence if return_sequence else sequence[-1]


class TokenBlock(MetaBlock):
    """A block that sums log-determinants, returns them in both directions, and has a reverse with gradients."""

    def forward(self, x, y=None):
        z, logdet = super().forward(x, y)
        return z, logdet * x.size(1) * x.size(2)

    def reverse(self, z, y=None):
        z, pos_embed, cache = self.permutation(z), self.permutation(self.pos_embed, dim=0), {}
        x, logdet = z[:, :1], torch.zeros(z.size(0))
        for i in range(z.size(1) - 1):
            a, b = self.step(x, pos_embed, i, y, cache)
            x = torch.cat([x, (z[:, i + 1] * torch.exp(a.float()).to(a.dtype) + b)[:, None]], dim=1)
            logdet = logdet + a.sum(dim=-1)
        return self.permutation(x, inverse=True), logdet


class TarFlow(nn.Module):
    """A flow over tokens. `mask` (B, T) says which tokens of a result are kept."""

    def __init__(self, num_tokens, token_size, channels, num_blocks, layers_per_block, permutations=None, **options):
        super().__init__()
        options = {"head_channels": 64, "dropout": 0.0} | options
        permutations = permutations or [
            PermutationFlip() if k % 2 else PermutationIdentity() for k in range(num_blocks)
        ]
        self.blocks = nn.ModuleList(
            TokenBlock(token_size, channels, num_tokens, each, layers_per_block, **options) for each in permutations
        )

    def forward(self, x, mask=None):
        logdets = torch.zeros(x.size(0))
        for block in self.blocks:
            x, logdet = block(x)
            logdets = logdets + logdet
        return x, logdets

    def reverse(self, z, mask=None, scale=1.0):
        logdets = torch.zeros(z.size(0))
        for block in reversed(self.blocks):
            z, logdet = block.reverse(z)
            logdets = logdets + logdet
        return (z if mask is None else z * mask[:, :, None]) * scale, logdets


def drawn(model, seed=0, scale=0.05):
    """The model with every parameter drawn, because at its start values a flow is only a shift.

    scale is the size of log-scales and shifts.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if "norm.weight" in name:
                parameter.copy_(1 + 0.2 * draw)
            elif "proj_out" in name:
                parameter.copy_(scale * draw / parameter.shape[-1] ** 0.5)
            elif parameter.ndim == 2 and "embed" not in name:
                parameter.copy_(draw / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.2 * draw)
        if "var" in model._buffers:
            model.var.copy_(torch.rand(model.var.shape, generator=generator) + 0.5)
    return model.eval()


def images(seed=0, **config):
    """A small drawn `Model`."""
    sizes = dict(in_channels=1, img_size=8, patch_size=2, channels=64, num_blocks=2, layers_per_block=2, num_classes=3)
    return drawn(Model(**sizes | config), seed)


def tokens(seed=0, **config):
    """A small drawn `TarFlow`."""
    sizes = dict(num_tokens=7, token_size=3, channels=64, num_blocks=3, layers_per_block=2)
    return drawn(TarFlow(**sizes | config), seed)
