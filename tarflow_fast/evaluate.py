"""How well a flow knows a set of images: bits per dimension, beside the plainest model there is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tarflow_fast.data import ImageFiles, ImageSet, generator

if TYPE_CHECKING:
    from tarflow_fast.model import TarFlow

_INDEX_BYTES = 1 << 24


@dataclass(frozen=True)
class Bits:
    """bits: (N,) float64, bits per dimension of each image.  mean and its standard error over the images."""

    bits: torch.Tensor

    @property
    def mean(self) -> float:
        return self.bits.mean().item()

    @property
    def standard_error(self) -> float:
        return (self.bits.std() / math.sqrt(len(self.bits))).item() if len(self.bits) > 1 else math.nan


def evaluate(
    model: TarFlow,
    images: ImageSet,
    *,
    conditional: bool = True,
    n_draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Bits:
    """`model.bits_per_dim` over a whole set, an upper bound on the bits an exact code would need.

    conditional: tell the flow the labels, where both have classes.  n_draws: dequantisation draws an image.
    The result is a function of (model, images, n_draws, seed, batch_size).
    Raises ValueError for an empty set, or labels where the flow has another number of classes.
    """
    from tqdm import tqdm

    if len(images) == 0:
        raise ValueError(f"evaluate: images must hold at least one image, got an empty set ({images.source})")
    if batch_size < 1:
        raise ValueError(f"evaluate: batch_size must be at least 1, got {batch_size}")
    labelled = conditional and images.labels is not None and model.num_classes > 0
    if labelled and len(images.classes) != model.num_classes:
        raise ValueError(
            f"evaluate: images must have the flow's {model.num_classes} classes, got {len(images.classes)} "
            f"({images.source}); conditional=False leaves labels out"
        )
    device = model.var.device
    parts = []
    with tqdm(total=len(images), unit="image", desc="bits/dim", disable=not progress) as bar:
        for start in range(0, len(images), batch_size):
            x, y = images.fetch(torch.arange(start, min(start + batch_size, len(images))))
            parts.append(
                model.bits_per_dim(
                    x.to(device), y.to(device) if labelled else None, levels=images.levels, n_draws=n_draws,
                    seed=generator(seed, "evaluate", start).initial_seed(), batch_size=batch_size,
                ).cpu()
            )  # fmt: skip
            bar.update(len(x))
            bar.set_postfix_str(f"{torch.cat(parts).mean().item():.4f}")
    return Bits(torch.cat(parts))


def histogram_bits(known: ImageSet, images: ImageSet) -> float:
    """Bits per dimension of `images` under one histogram a pixel, counted on `known` (each level counted once more).

    The honest floor for any flow: it knows where ink is likely and nothing else. Both sets must be held in memory.
    """
    if isinstance(known.images, ImageFiles) or isinstance(images.images, ImageFiles):
        raise ValueError("histogram_bits: both sets must be held in memory, got one that is decoded batch by batch")
    counts = 1 + _counts(known.images, known.levels).double()
    cost = -(counts / counts.sum(1, keepdim=True)).log2()
    return ((_counts(images.images, known.levels) * cost).sum() / images.images.numel()).item()


def _counts(images: torch.Tensor, levels: int) -> torch.Tensor:
    """How often each pixel, flattened, has each level: (pixels, levels) int64, of (N, C, H, W) uint8.

    Some images at a time: indices take 8 bytes a pixel.
    """
    pixels = math.prod(images.shape[1:])
    counts = torch.zeros(pixels, levels, dtype=torch.int64)
    for part in images.flatten(1).split(max(1, _INDEX_BYTES // (8 * pixels))):
        counts.scatter_add_(1, part.T.long(), torch.ones((), dtype=torch.int64).expand(pixels, len(part)))
    return counts
