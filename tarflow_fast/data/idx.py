"""IDX files, the format of MNIST and its kin: a header of sizes, then bytes."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from tarflow_fast.data.sets import ImageSet

__all__ = ["find_idx", "is_idx", "load_idx", "load_idx_folder", "read_idx"]

IMAGES = "images-idx3-ubyte"
LABELS = "labels-idx1-ubyte"


def read_idx(path: str | Path, ndim: int) -> torch.Tensor:
    """The array of unsigned bytes in an IDX file, gzipped or not.

    The file holds 0, 0, 8 (unsigned bytes), ndim, then ndim sizes as big-endian 32-bit numbers, then the bytes.
    Returns uint8 of those sizes. Raises FileNotFoundError, or ValueError naming the file, expected and got: a damaged
    gzip stream, another magic number, fewer or more bytes than the sizes say, no item.
    """
    path = Path(path)
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"read_idx: {path} must be a whole gzip file, got a damaged one ({error})") from error
    magic, got = bytes((0, 0, 8, ndim)), content[:4]
    if got != magic:
        raise ValueError(
            f"read_idx: {path} must begin with {magic.hex(' ')} (unsigned bytes, {ndim} sizes), got "
            f"{got.hex(' ') or 'an empty file'}"
        )
    start = 4 + 4 * ndim
    if len(content) < start:
        raise ValueError(f"read_idx: {path} must have a header of {start} bytes, got {len(content)} bytes in all")
    sizes = struct.unpack(f">{ndim}I", content[4:start])
    if len(content) - start != math.prod(sizes):
        raise ValueError(
            f"read_idx: {path} must hold {math.prod(sizes)} bytes after its header ({' x '.join(map(str, sizes))}), "
            f"got {len(content) - start}"
        )
    if 0 in sizes:
        raise ValueError(f"read_idx: {path} must hold at least one item, got sizes {' x '.join(map(str, sizes))}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy())


def load_idx(images: str | Path, labels: str | Path | None = None, classes: tuple[str, ...] | None = None) -> ImageSet:
    """Grey images of one IDX file and, where given, their labels of another.

    classes: names of the labels; else 0, 1, ... up to the largest label.
    Raises as `read_idx`, and ValueError where the files differ in length or a label has no class.
    """
    pixels = read_idx(images, 3)[:, None]
    if labels is None:
        return ImageSet(pixels, None, (), 256, str(images))
    y = read_idx(labels, 1).long()
    if len(y) != len(pixels):
        raise ValueError(f"load_idx: {labels} must hold a label for each of {len(pixels)} images, got {len(y)}")
    largest = int(y.max())
    classes = classes or tuple(map(str, range(largest + 1)))
    if largest >= len(classes):
        raise ValueError(f"load_idx: the labels in {labels} must be below {len(classes)}, got {largest}")
    return ImageSet(pixels, y, classes, 256, str(images))


def is_idx(path: str | Path) -> bool:
    """Whether a name is that of IDX images: it ends in `idx3-ubyte` or `.idx`, gzipped or not."""
    name = Path(path).name.removesuffix(".gz")
    return name.endswith((".idx", "idx3-ubyte"))


def labels_beside(images: str | Path) -> Path | None:
    """The file of labels that belongs to `...images-idx3-ubyte`, if it is there, gzipped or not."""
    images = Path(images)
    name = images.name.removesuffix(".gz")
    if not name.endswith(IMAGES):
        return None
    return find_idx(images.parent, name.removesuffix(IMAGES) + LABELS)


def find_idx(folder: str | Path, name: str) -> Path | None:
    """folder/name or folder/name.gz, whichever is there; None if neither is."""
    return next((path for path in (Path(folder, name), Path(folder, f"{name}.gz")) if path.is_file()), None)


def load_idx_folder(folder: str | Path, classes: tuple[str, ...] | None = None) -> ImageSet:
    """MNIST's four files: `train-images-idx3-ubyte` and its labels; the t10k pair, if there, is the held-out part.

    Raises as `load_idx`, FileNotFoundError where there are no training images.
    """
    folder = Path(folder)
    train = find_idx(folder, f"train-{IMAGES}")
    if train is None:
        raise FileNotFoundError(f"load_idx_folder: there is no file train-{IMAGES}, gzipped or not, in {folder}")
    whole = load_idx(train, labels_beside(train), classes)
    test = find_idx(folder, f"t10k-{IMAGES}")
    if test is None:
        return whole
    held_out = load_idx(test, labels_beside(test) if whole.classes else None, whole.classes or None)
    if held_out.shape != whole.shape or (held_out.labels is None) != (whole.labels is None):
        raise ValueError(f"load_idx_folder: {test} must match {train}: {_words(whole)}, got {_words(held_out)}")
    return ImageSet(whole.images, whole.labels, whole.classes, 256, str(folder), held_out)


def _words(images: ImageSet) -> str:
    labelled = "without labels" if images.labels is None else "with labels"
    return f"images of {images.shape[1]} x {images.shape[2]} {labelled}"
