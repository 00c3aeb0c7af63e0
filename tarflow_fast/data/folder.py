"""A folder of image files, `<class>/<file>` or `<file>`."""

from __future__ import annotations

from pathlib import Path

import torch

from tarflow_fast.data.decode import ImageFiles
from tarflow_fast.data.sets import ImageSet, image_size

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
MEMORY_LIMIT = 2**32  # bytes; a larger folder is decoded anew, batch by batch


def load_folder(
    folder: str | Path,
    img_size: int | tuple[int, int],
    in_channels: int = 3,
    memory_limit: int = MEMORY_LIMIT,
    strict: bool = False,
) -> ImageSet:
    """Images of `<folder>/<class>/<file>`, classes in the order of their names; or of `<folder>/<file>`, unlabeled.

    Each is cropped to img_size's aspect around its centre and resized with antialiasing (see `read_image`).
    img_size: int or (height, width) in pixels.  in_channels: 1 (grey) or 3 (RGB).  memory_limit: bytes; a larger set is
    not held but decoded batch by batch.  strict: a file that cannot be read is an error; otherwise it is left out, and
    a warning names and counts it.
    Raises FileNotFoundError, NotADirectoryError, or ValueError (no image, no readable image, an empty class, loose
    files beside classes: each is named).
    """
    size = image_size(img_size, "load_folder")
    if in_channels not in (1, 3):
        raise ValueError(f"load_folder: in_channels must be 1 (grey) or 3 (RGB), got {in_channels}")
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"load_folder: there is no folder {root}")
    if not root.is_dir():
        raise NotADirectoryError(f"load_folder: expected a folder of images, got the file {root}")
    paths, labels, classes = _listed(root)
    images: torch.Tensor | ImageFiles = ImageFiles(paths, size, in_channels, strict=strict)
    if len(paths) * in_channels * size[0] * size[1] <= memory_limit:
        images, kept = images.readable()
        labels = None if labels is None else labels[kept]
    return ImageSet(images, labels, classes, 256, str(root))


def _listed(root: Path) -> tuple[list[Path], torch.Tensor | None, tuple[str, ...]]:
    """(files, their labels, names of the classes) of a folder."""
    loose = _image_files(root)
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    groups = [(p.name, _image_files(p)) for p in folders]
    if not any(files for _, files in groups):
        if not loose:
            raise ValueError(f"load_folder: no image in {root} (looked for {', '.join(sorted(SUFFIXES))})")
        return loose, None, ()
    if loose:
        raise ValueError(f"load_folder: {root} holds class folders and loose images, for one {loose[0].name}")
    empty = [name for name, files in groups if not files]
    if empty:
        raise ValueError(f"load_folder: class folder {root / empty[0]} holds no image")
    labels = torch.repeat_interleave(torch.tensor([len(files) for _, files in groups]))
    return [path for _, files in groups for path in files], labels, tuple(name for name, _ in groups)


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    )
