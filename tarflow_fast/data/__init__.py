"""Data: sets of images, pictures of tensors, dequantisation."""

from __future__ import annotations

from tarflow_fast.data.arrays import as_images, load_array
from tarflow_fast.data.decode import ImageFiles, read_image
from tarflow_fast.data.dequantize import Dequantizer, UniformDequantizer, dequantize, to_unit
from tarflow_fast.data.folder import load_folder
from tarflow_fast.data.hub import load_saved
from tarflow_fast.data.idx import load_idx, load_idx_folder, read_idx
from tarflow_fast.data.load import has_own_size, load_dataset, load_digits, load_fashion_mnist
from tarflow_fast.data.photographs import load_photographs
from tarflow_fast.data.sets import ImageSet, generator, image_size, sample_order
from tarflow_fast.data.variational import VariationalDequantizer

__all__ = [
    "Dequantizer",
    "ImageFiles",
    "ImageSet",
    "UniformDequantizer",
    "VariationalDequantizer",
    "as_images",
    "dequantize",
    "generator",
    "has_own_size",
    "image_size",
    "load_array",
    "load_dataset",
    "load_digits",
    "load_fashion_mnist",
    "load_folder",
    "load_idx",
    "load_idx_folder",
    "load_photographs",
    "load_saved",
    "read_idx",
    "read_image",
    "sample_order",
    "to_unit",
]
