"""Scores of single images under a flow: likelihood, two-sided typicality, and likelihood against input complexity."""

from __future__ import annotations

import io
import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from tarflow_fast.data import ImageSet
from tarflow_fast.ood.area import Area, area_under_roc

SCORES = ("likelihood", "typicality", "complexity")
_BATCH = 256


def typicality(bits: Tensor, reference_mean: float) -> Tensor:
    """|bits - reference_mean|: (n,) float64. Images of the flow's own kind lie near the mean, not far to either side.

    bits: (n,) bits per dimension.  reference_mean: the mean of them over images of the flow's own kind.
    The test of Nalisnick et al. (arXiv 1906.02994, section 3) for sets of one image.
    Raises ValueError when a number is not finite.
    """
    _check_finite("typicality", "bits", bits)
    if not math.isfinite(reference_mean):
        raise ValueError(f"typicality: reference_mean must be finite, got {reference_mean}")
    return (bits.double() - reference_mean).abs()


def compressed_bits(images: ImageSet) -> Tensor:
    """Bits per dimension that a general lossless compressor needs for each image: (n,) float64.

    It is the smaller of two: the pixel data of Pillow's PNG with optimize=True, and zlib at level 9 over the bytes
    alone. The PNG's headers, which say what the flow is told as well, do not count.
    Raises ValueError unless the images have 1 or 3 channels.
    """
    if images.shape[0] not in (1, 3):
        raise ValueError(f"compressed_bits: images must have 1 or 3 channels, got {images.shape[0]} ({images.source})")
    sizes = []
    for start in range(0, len(images), _BATCH):
        x, _ = images.fetch(torch.arange(start, min(start + _BATCH, len(images))))
        sizes += [_compressed_bytes(image) for image in x]
    return torch.tensor(sizes, dtype=torch.float64) * 8 / math.prod(images.shape)


def complexity(bits: Tensor, compressed: Tensor) -> Tensor:
    """bits - compressed: (n,) float64, the score S of Serra et al. (arXiv 1909.11480, section 3).

    bits: (n,) bits per dimension under the flow.  compressed: (n,) under a compressor, as `compressed_bits` has it.
    A simple image is cheap to the flow whatever it shows; the compressor tells how simple it is.
    Raises ValueError when a number is not finite, or for another number of images.
    """
    _check_finite("complexity", "bits", bits)
    _check_finite("complexity", "compressed", compressed)
    if bits.shape != compressed.shape:
        raise ValueError(f"complexity: compressed must be of {len(bits)} images as bits is, got {len(compressed)}")
    return bits.double() - compressed.double()


@dataclass(frozen=True)
class Comparison:
    """own, other: the scores of both sets, name -> (n,) float64.  areas: name -> the area under the ROC.

    reference_mean: bits per dimension, which typicality is measured from.
    """

    own: dict[str, Tensor]
    other: dict[str, Tensor]
    areas: dict[str, Area]
    reference_mean: float


def compare(
    own_bits: Tensor, other_bits: Tensor, own: ImageSet, other: ImageSet, reference_bits: Tensor | None = None
) -> Comparison:
    """All `SCORES` of two sets of images, and how well each score tells the sets apart.

    own_bits, other_bits: (n,), (m,) bits per dimension under the flow of the images of `own` and `other`; they serve as
    the score "likelihood".  reference_bits: those of images of the flow's own kind, whose mean typicality is measured
    from; None: own_bits.
    Raises ValueError when bits are not finite, are of another number of images, or the sets differ in grey levels.
    """
    check_levels("compare", own, other)
    reference_bits = own_bits if reference_bits is None else reference_bits
    _check_finite("compare", "reference_bits", reference_bits)
    for name, bits, images in (("own", own_bits, own), ("other", other_bits, other)):
        _check_finite("compare", f"{name}_bits", bits)
        if len(bits) != len(images):
            raise ValueError(f"compare: {name}_bits must be of {len(images)} images ({images.source}), got {len(bits)}")
    mean = reference_bits.double().mean().item()
    both = [
        {
            "likelihood": bits.double(),
            "typicality": typicality(bits, mean),
            "complexity": complexity(bits, compressed_bits(images)),
        }
        for bits, images in ((own_bits, own), (other_bits, other))
    ]
    areas = {name: area_under_roc(both[0][name], both[1][name]) for name in SCORES}
    return Comparison(both[0], both[1], areas, mean)


def check_levels(caller: str, own: ImageSet, other: ImageSet) -> None:
    """Raises ValueError unless both sets have one number of grey levels: bits of others cannot be compared."""
    if own.levels != other.levels:
        raise ValueError(
            f"{caller}: both sets must have one number of grey levels, for bits/dim to mean the same, got {own.levels} "
            f"({own.source}) and {other.levels} ({other.source})"
        )


def _compressed_bytes(image: Tensor) -> int:
    """Of an image (C, H, W) uint8."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if image.shape[0] == 1 else pixels).save(file, format="PNG", optimize=True)
    return min(_pixel_data(file.getvalue()), len(zlib.compress(pixels.tobytes(), 9)))


def _pixel_data(png: bytes) -> int:
    """The bytes in a PNG's IDAT chunks. A chunk is its length (4 bytes), type (4), content, and checksum (4)."""
    at, total = 8, 0
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        total += length if png[at + 4 : at + 8] == b"IDAT" else 0
        at += length + 12
    return total


def _check_finite(caller: str, name: str, values: Tensor) -> None:
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{caller}: {name} must have shape (n,) with n > 0, got {tuple(values.shape)}")
    bad = (~values.isfinite()).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"{caller}: {name} must be finite, got {values[bad[0]].item()} for image {int(bad[0])} and {len(bad)} such "
            f"images of {len(values)}"
        )
