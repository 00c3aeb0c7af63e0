"""A flow, pictures, and a small network in Inception's place."""

import torch
from flows import random_flow

from tarflow_fast.data import ImageSet

MODEL = random_flow(num_classes=3)
F = 6
WEIGHTS = torch.randn(3 * 8 * 8, F, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 14


def net(images):
    """Features of bytes (B, 3, 8, 8), in Inception's place."""
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 8)
    return (images.double() / 255 - 0.5).flatten(1) @ WEIGHTS


def pictures(n=40, channels=1, seed=0, levels=256):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(levels, (n, channels, 8, 8), generator=draw, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n) % 3, ("a", "b", "c"), levels, "pictures")


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)
