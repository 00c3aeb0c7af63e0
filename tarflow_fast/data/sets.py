"""Sets of images, held as bytes and read in a fixed order.

The order is a function of (seed, sample number) alone, never of the number of processes: sample number g of a training
run is entry g mod N of the permutation of epoch g // N. Resuming at a step, or sharing a batch, needs no state.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from tarflow_fast.data.decode import ImageFiles


@dataclass(frozen=True)
class ImageSet:
    """Images as bytes.

    images: (N, C, H, W) uint8, values 0..levels-1 (a tensor, or `ImageFiles` for a set larger than memory)
    labels: (N,) int64, or None for a set without classes;  classes: their names, label i is classes[i]
    held_out: the part that the set's makers keep for measuring, where there is one
    """

    images: torch.Tensor | ImageFiles
    labels: torch.Tensor | None
    classes: tuple[str, ...]
    levels: int
    source: str
    held_out: ImageSet | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        files = self.images
        return (files.in_channels, *files.size) if isinstance(files, ImageFiles) else tuple(files.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The images and labels at indices: (n,) int64 on the CPU -> ((n, C, H, W) uint8, (n,) int64 or None)."""
        if isinstance(self.images, ImageFiles):
            images, indices = self.images.read(indices)
        else:
            images = self.images[indices]
        return images, None if self.labels is None else self.labels[indices]

    def subset(self, indices: torch.Tensor) -> ImageSet:
        """The set of these images alone; classes keep their numbers."""
        images = self.images.subset(indices) if isinstance(self.images, ImageFiles) else self.images[indices]
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, images=images, labels=labels, held_out=None)

    def unlabelled(self) -> ImageSet:
        """The same images without their classes."""
        held_out = None if self.held_out is None else self.held_out.unlabelled()
        return replace(self, labels=None, classes=(), held_out=held_out)

    def split(self, holdout: float) -> tuple[ImageSet, ImageSet]:
        """(training part, held-out part): round(holdout * N) images are held out, the same ones every time.

        With holdout 0 the held-out part is the set's own, where it has one, and else empty.
        """
        if not 0 <= holdout < 1:
            raise ValueError(f"split: holdout must be in [0, 1), got {holdout}")
        if holdout == 0 and self.held_out is not None:
            return replace(self, held_out=None), self.held_out
        order = torch.randperm(len(self), generator=generator(0, "holdout"))
        kept_out = round(holdout * len(self))
        return self.subset(order[kept_out:].sort().values), self.subset(order[:kept_out].sort().values)


def image_size(img_size: int | tuple[int, int] | list[int], caller: str = "image_size") -> tuple[int, int]:
    """img_size as (height, width). Raises ValueError unless it is a positive int or two of them."""
    pair = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"{caller}: img_size must be a positive int or a pair (height, width), got {img_size}")
    return pair


def generator(seed: int, purpose: str, number: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh random generator for one purpose and one number (an epoch, a step), the same whenever it is asked for.

    Hashing keeps the streams of neighbouring seeds and numbers apart, and leaves no generator state to save.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(size: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(size, generator=generator(seed, "order", epoch))


def sample_order(start: int, count: int, size: int, seed: int) -> torch.Tensor:
    """Indices of the samples number start .. start + count - 1 of a run over a set of `size` images: (count,) int64.

    Sample g is entry g mod size of epoch g // size's permutation: every image once an epoch, no remainder dropped.
    """
    numbers = range(start, start + count)
    parts = [
        _permutation(size, seed, epoch)[max(start - epoch * size, 0) : start + count - epoch * size]
        for epoch in range(numbers.start // size, (numbers.stop - 1) // size + 1)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
