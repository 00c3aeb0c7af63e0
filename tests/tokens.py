"""Small flows over tokens with drawn weights, and the same in plain PyTorch, for comparison."""

import torch
from flows import draw_parameters
from torch import nn

from tarflow_fast import TokenFlow
from tarflow_fast.reference import MetaBlock

SIZES = dict(num_tokens=5, token_size=3, channels=64, num_blocks=2, layers_per_block=1)


def random_tokens_flow(seed=0, dtype=torch.float32, scale=0.05, **config):
    """A TokenFlow with every parameter drawn. scale is the size of its log-scales and shifts."""
    return draw_parameters(TokenFlow(**SIZES | config), seed, scale).to(dtype).eval()


def draw_rows(B, T, D, seed=1, dtype=torch.float32):
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Block(MetaBlock):
    """The reference's block, whose inverse also gives its log-determinant."""

    def step(self, *args, **kwargs):
        a, b = super().step(*args, **kwargs)
        self.scales.append(a)
        return a, b

    def inverse(self, z, y=None):
        self.scales = []
        x = self.reverse(z, y)
        return x, sum(a.sum(dim=(1, 2)) for a in self.scales)


class PlainTokens(nn.Module):
    """The reference's blocks as a flow over tokens. Every second block flips them. Log-determinants are sums in nats.

    Args:
        state: weights with the names of TokenFlow, or with the names of flows whose MLPs have a Dropout.
        num_tokens, token_size, channels, num_blocks, layers_per_block: the same as in TokenFlow.
    """

    def __init__(self, state, num_tokens, token_size, channels, num_blocks, layers_per_block, **_):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(token_size, channels, num_tokens, k % 2 == 1, layers_per_block) for k in range(num_blocks)
        )
        self.register_buffer("var", torch.ones(num_tokens, token_size))
        state = {key.replace("mlp.main.3", "mlp.main.2"): value for key, value in state.items()}
        missing, foreign = self.load_state_dict(state, strict=False)
        assert not foreign and all(key == "var" or key.endswith("attn_mask") for key in missing)

    def forward(self, x):
        total = 0.0
        for block in self.blocks:
            x, log_det = block(x)
            total = total + log_det * x[0].numel()
        return x, total

    @torch.no_grad()
    def inverse(self, z):
        total = 0.0
        for block in reversed(self.blocks):
            z, log_det = block.inverse(z)
            total = total + log_det
        return z, total

    def log_prior(self, z):
        var = self.var.to(z)
        return -0.5 * (z.square() / var + torch.log(2 * torch.pi * var)).sum(dim=(1, 2))

    @torch.no_grad()
    def log_prob(self, x):
        z, log_det = self(x)
        return self.log_prior(z) + log_det
