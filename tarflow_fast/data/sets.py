"""Real images in: the digits of scikit-learn, or any folder `<class>/<file>`; held as bytes, read in a fixed order.

The order is a function of (seed, sample number) alone, never of the number of processes: sample number g of a training
run is entry g mod N of the permutation of epoch g // N. Resuming at a step, or sharing a batch, needs no state.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
MEMORY_LIMIT = 2**32  # bytes; a larger folder is decoded anew, batch by batch


class ImageFiles:
    """Files that are decoded when asked for, by a few threads: `files[indices]` is uint8 (len(indices), C, H, W)."""

    def __init__(self, paths: list[Path], size: tuple[int, int], in_channels: int, workers: int = 8) -> None:
        self.paths, self.size, self.in_channels = paths, size, in_channels
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tarflow-images")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        paths = [self.paths[i] for i in indices.tolist()]
        return torch.stack(list(self._pool.map(lambda p: read_image(p, self.size, self.in_channels), paths)))


@dataclass(frozen=True)
class ImageSet:
    """Images as bytes.

    images: (N, C, H, W) uint8, values 0..levels-1 (a tensor, or `ImageFiles` for a set larger than memory)
    labels: (N,) int64, or None for a set without classes;  classes: their names, label i is classes[i]
    """

    images: torch.Tensor | ImageFiles
    labels: torch.Tensor | None
    classes: tuple[str, ...]
    levels: int
    source: str

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The images and labels at indices: (n,) int64 on the CPU -> ((n, C, H, W) uint8, (n,) int64 or None)."""
        return self.images[indices], None if self.labels is None else self.labels[indices]

    def subset(self, indices: torch.Tensor) -> ImageSet:
        """The set of these images alone; classes keep their numbers."""
        if isinstance(self.images, ImageFiles):
            files = self.images
            images = ImageFiles([files.paths[i] for i in indices.tolist()], files.size, files.in_channels)
        else:
            images = self.images[indices]
        return replace(self, images=images, labels=None if self.labels is None else self.labels[indices])

    def split(self, holdout: float) -> tuple[ImageSet, ImageSet]:
        """(training part, held-out part): round(holdout * N) images are held out, the same ones every time."""
        if not 0 <= holdout < 1:
            raise ValueError(f"split: holdout must be in [0, 1), got {holdout}")
        order = torch.randperm(len(self), generator=generator(0, "holdout"))
        kept_out = round(holdout * len(self))
        return self.subset(order[kept_out:].sort().values), self.subset(order[:kept_out].sort().values)


def load_dataset(name: str, img_size: int | tuple[int, int], in_channels: int) -> ImageSet:
    """`digits`, or the folder called name; sizes as in `load_folder`."""
    if name == "digits":
        return load_digits(img_size, in_channels)
    return load_folder(name, img_size, in_channels)


def load_digits(img_size: int | tuple[int, int] = 8, in_channels: int = 1) -> ImageSet:
    """1797 handwritten digits, 8x8, 17 grey levels, 10 classes (scikit-learn's copy of UCI Optdigits' test set).

    Raises ModuleNotFoundError without scikit-learn, ValueError for a size other than 8x8 or more than one channel.
    """
    if image_size(img_size, "load_digits") != (8, 8) or in_channels != 1:
        raise ValueError(
            f"load_digits: digits are 8x8 with 1 channel, got img_size {img_size} and in_channels {in_channels}"
        )
    try:
        from sklearn.datasets import load_digits as load
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'load_digits: scikit-learn holds the digits and is not installed: pip install "tarflow-fast[demo]"'
        ) from error
    data = load()
    return ImageSet(
        images=torch.from_numpy(data.images).to(torch.uint8)[:, None].contiguous(),
        labels=torch.from_numpy(data.target).to(torch.int64),
        classes=tuple(str(name) for name in data.target_names),
        levels=17,
        source="digits",
    )


def load_folder(
    folder: str | Path, img_size: int | tuple[int, int], in_channels: int = 3, memory_limit: int = MEMORY_LIMIT
) -> ImageSet:
    """Images of `<folder>/<class>/<file>`, classes in the order of their names; or of `<folder>/<file>`, unlabeled.

    Each is cropped to img_size's aspect around its centre and resized with antialiasing (see `read_image`).
    img_size: int or (height, width) in pixels.  in_channels: 1 (grey) or 3 (RGB).  memory_limit: bytes; a larger set is
    not held but decoded batch by batch.  Raises FileNotFoundError, NotADirectoryError, or ValueError (no image, an
    empty class, loose files beside classes, an unreadable file: each is named).
    """
    size = image_size(img_size, "load_folder")
    if in_channels not in (1, 3):
        raise ValueError(f"load_folder: in_channels must be 1 (grey) or 3 (RGB), got {in_channels}")
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"load_folder: there is no folder {root} (and the only built-in data set is 'digits')")
    if not root.is_dir():
        raise NotADirectoryError(f"load_folder: expected a folder of images, got the file {root}")
    loose = _image_files(root)
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    groups = [(p.name, _image_files(p)) for p in folders]
    if not any(files for _, files in groups):
        if not loose:
            raise ValueError(f"load_folder: no image in {root} (looked for {', '.join(sorted(SUFFIXES))})")
        groups, labels = [], None
        paths = loose
    else:
        if loose:
            raise ValueError(f"load_folder: {root} holds class folders and loose images, for one {loose[0].name}")
        empty = [name for name, files in groups if not files]
        if empty:
            raise ValueError(f"load_folder: class folder {root / empty[0]} holds no image")
        paths = [path for _, files in groups for path in files]
        labels = torch.repeat_interleave(torch.tensor([len(files) for _, files in groups]))
    images: torch.Tensor | ImageFiles = ImageFiles(paths, size, in_channels)
    if len(paths) * in_channels * size[0] * size[1] <= memory_limit:
        images = images[torch.arange(len(paths))]
    return ImageSet(images, labels, tuple(name for name, _ in groups), 256, str(root))


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    )


def read_image(path: str | Path, size: tuple[int, int], in_channels: int) -> torch.Tensor:
    """One image file as (in_channels, height, width) uint8.

    Turned upright (EXIF), made grey or RGB (transparency is dropped), cropped to the aspect of size = (height, width)
    around its centre, resized bicubically with antialiasing. A file that already has this size keeps its exact pixels.
    Raises ValueError naming the file when it cannot be read.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("L" if in_channels == 1 else "RGB")
        image = ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise ValueError(f"read_image: cannot read {path} as an image ({type(error).__name__}: {error})") from error
    return pixels[None] if in_channels == 1 else pixels.permute(2, 0, 1).contiguous()


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
