"""Image files in: one file as bytes, and many files that are decoded batch by batch."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

log = logging.getLogger("tarflow_fast")


def read_image(path: str | Path, size: tuple[int, int], in_channels: int) -> torch.Tensor:
    """One image file as (in_channels, height, width) uint8, fitted as in `fit_image`.

    Raises ValueError naming the file when it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return fit_image(image, size, in_channels)
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise ValueError(f"read_image: cannot read {path} as an image ({type(error).__name__}: {error})") from error


def fit_image(image: object, size: tuple[int, int], in_channels: int) -> torch.Tensor:
    """A Pillow image as (in_channels, height, width) uint8.

    Turned upright (EXIF), made grey or RGB (transparency is dropped), cropped to the aspect of size = (height, width)
    around its centre, resized bicubically with antialiasing. An image of this size already keeps its exact pixels.
    """
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image).convert("L" if in_channels == 1 else "RGB")
    image = ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels[None] if in_channels == 1 else pixels.permute(2, 0, 1).contiguous()


class ImageFiles:
    """Files that are decoded when asked for, by a few threads.

    paths: the files.  size: (height, width).  in_channels: 1 or 3.  strict: a file that cannot be read is an error;
    otherwise the next readable file takes its place, and a warning names it the first time.
    """

    def __init__(
        self, paths: list[Path], size: tuple[int, int], in_channels: int, workers: int = 8, strict: bool = True
    ) -> None:
        self.paths, self.size, self.in_channels, self.strict = paths, size, in_channels, strict
        self.broken: set[int] = set()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tarflow-images")
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        return self.read(indices)[0]

    def read(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(images, which they are): (n,) int64 -> (n, C, H, W) uint8, and (n,) int64, indices but for broken files."""
        found = list(self._pool.map(self._readable, indices.tolist()))
        return torch.stack([image for image, _ in found]), torch.tensor([index for _, index in found])

    def readable(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All images that can be read, and which they are, in order. Raises ValueError where there is none."""
        found = list(self._pool.map(self._try, range(len(self))))
        kept = [index for index, image in enumerate(found) if image is not None]
        if not kept:
            raise ValueError(f"load_folder: none of {len(self)} images can be read, the first is {self.paths[0]}")
        return torch.stack([found[index] for index in kept]), torch.tensor(kept)

    def subset(self, indices: torch.Tensor) -> ImageFiles:
        """These files alone."""
        paths = [self.paths[i] for i in indices.tolist()]
        return ImageFiles(paths, self.size, self.in_channels, strict=self.strict)

    def _try(self, index: int) -> torch.Tensor | None:
        try:
            return read_image(self.paths[index], self.size, self.in_channels)
        except ValueError as error:
            if self.strict:
                raise
            with self._lock:
                known = index in self.broken
                self.broken.add(index)
                count = len(self.broken)
            if not known:
                log.warning("%s; it is left out (%d of %d so far)", error, count, len(self))
            return None

    def _readable(self, index: int) -> tuple[torch.Tensor, int]:
        """The image number index, or the next one that can be read, and its number."""
        for step in range(len(self)):
            chosen = (index + step) % len(self)
            image = None if chosen in self.broken else self._try(chosen)
            if image is not None:
                return image, chosen
        raise ValueError(f"load_folder: none of {len(self)} images can be read, the first is {self.paths[0]}")
