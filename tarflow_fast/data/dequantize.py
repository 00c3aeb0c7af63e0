"""How integer images become the real numbers that a flow models."""

from __future__ import annotations

import torch

__all__ = ["dequantize", "to_unit"]


def to_unit(images: torch.Tensor, levels: int) -> torch.Tensor:
    """Bytes to floats: 2 * images / (levels - 1) - 1, so 0 -> -1 and levels - 1 -> 1; float32."""
    return images.to(torch.float32) * (2.0 / (levels - 1)) - 1.0


def dequantize(images: torch.Tensor, noise: torch.Tensor, levels: int) -> torch.Tensor:
    """Uniform dequantisation: 2 * (images + noise) / levels - 1 with noise in [0, 1), in [-1, 1); float32.

    A density p of the result bounds the bits of the bytes: bits/dim <= -log2 p / dims + log2(levels / 2)
    (Theis et al., arXiv 1511.01844, section 3.1; TarFlow trains its likelihood models this way).
    """
    return (images.to(torch.float32) + noise) * (2.0 / levels) - 1.0
