"""How integer images become the real numbers that a flow models."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

__all__ = ["Dequantizer", "UniformDequantizer", "dequantize", "to_unit"]


def to_unit(images: torch.Tensor, levels: int) -> torch.Tensor:
    """Bytes to floats: 2 * images / (levels - 1) - 1, so 0 -> -1 and levels - 1 -> 1; float32."""
    return images.to(torch.float32) * (2.0 / (levels - 1)) - 1.0


def dequantize(images: torch.Tensor, noise: torch.Tensor, levels: int) -> torch.Tensor:
    """Bytes and what is added to them: 2 * (images + noise) / levels - 1 with noise in [0, 1), in [-1, 1); float32.

    A density p of the result bounds the bits of the bytes: bits/dim <= -log2 p / dims + log2(levels / 2)
    for uniform noise (Theis et al., arXiv 1511.01844, section 3.1; TarFlow trains its likelihood models this way). For
    noise of a density q, log2 q / dims is added.
    """
    return (images.to(torch.float32) + noise) * (2.0 / levels) - 1.0


class Dequantizer(Protocol):
    """What draws the noise u of integer images, from a density q(u | images) on [0, 1)^(C H W).

        log P(images) >= E[log p(images + u) - log q(u | images)]      (Flow++, arXiv 1902.00275, section 3.1)

    It draws nothing by itself: it is a map of uniform numbers, so that whoever calls it decides on their seed.
    """

    def __call__(self, images: torch.Tensor, noise: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """images: (B, C, H, W) integers in [0, levels).  noise: the same shape, uniform in [0, 1).

        Returns u, shaped as the images, in [0, 1); and log q(u | images) (B,), nats, summed over all dimensions.
        """
        ...


class UniformDequantizer(nn.Module):
    """u is the uniform noise itself, and log q is 0. It has no parameters."""

    def forward(self, images: torch.Tensor, noise: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Dequantizer`."""
        return noise, noise.new_zeros(len(noise))
