"""Data: sets of images, pictures of tensors, dequantisation."""

from __future__ import annotations

from tarflow_fast.data.dequantize import dequantize, to_unit
from tarflow_fast.data.sets import (
    ImageFiles,
    ImageSet,
    generator,
    image_size,
    load_dataset,
    load_digits,
    load_folder,
    read_image,
    sample_order,
)

__all__ = [
    "ImageFiles",
    "ImageSet",
    "dequantize",
    "generator",
    "image_size",
    "load_dataset",
    "load_digits",
    "load_folder",
    "read_image",
    "sample_order",
    "to_unit",
]
