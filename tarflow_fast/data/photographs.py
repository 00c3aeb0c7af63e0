"""Crops of the photographs that scikit-image and scikit-learn carry: natural images, without a download.

From scikit-image: astronaut (NASA, public domain), coffee, rocket and chelsea (CC0). From scikit-learn: china and
flower (CC BY 2.0; their documentation names the photographers).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tarflow_fast.data.sets import ImageSet, image_size

SKIMAGE = ("astronaut", "chelsea", "coffee", "rocket")
SKLEARN = ("china", "flower")
HELD_OUT = ("chelsea", "flower")  # whole pictures: overlapping crops of one picture on both sides would be a leak


def load_photographs(
    img_size: int | tuple[int, int] = 32, in_channels: int = 3, names: Sequence[str] | None = None
) -> ImageSet:
    """Crops of the photographs at half size, a crop every half crop; chelsea and flower are the held-out part.

    img_size: size of a crop, at most 150 x 225 (chelsea).  in_channels: 1 (grey) or 3 (RGB).  names: these pictures
    alone, nothing held out.  Without names the set has no classes; with names each picture is one.
    Raises ModuleNotFoundError without scikit-image or scikit-learn, ValueError for an unknown name or a crop larger
    than a picture.
    """
    size = image_size(img_size, "load_photographs")
    if in_channels not in (1, 3):
        raise ValueError(f"load_photographs: in_channels must be 1 (grey) or 3 (RGB), got {in_channels}")
    if names is not None:
        parts = [_crops(name, size, in_channels) for name in names]
        labels = torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
        return ImageSet(torch.cat(parts), labels, tuple(names), 256, "photographs")
    known = torch.cat([_crops(name, size, in_channels) for name in SKIMAGE + SKLEARN if name not in HELD_OUT])
    held_out = torch.cat([_crops(name, size, in_channels) for name in HELD_OUT])
    return ImageSet(known, None, (), 256, "photographs", ImageSet(held_out, None, (), 256, "photographs, held out"))


def _crops(name: str, size: tuple[int, int], in_channels: int) -> torch.Tensor:
    """(crops, C, H, W) uint8 of one picture, from top to bottom and left to right."""
    from PIL import Image

    from tarflow_fast.data.decode import fit_image

    image = Image.fromarray(_picture(name))
    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    height, width = size
    if height > image.height or width > image.width:
        raise ValueError(
            f"load_photographs: img_size must be at most {image.height} x {image.width}, half of {name}, got "
            f"{height} x {width}"
        )
    pixels = fit_image(image, (image.height, image.width), in_channels)
    crops = pixels.unfold(1, height, max(1, height // 2)).unfold(2, width, max(1, width // 2))
    return crops.permute(1, 2, 0, 3, 4).reshape(-1, in_channels, height, width).contiguous()


def _picture(name: str) -> object:
    """(H, W, 3) uint8, as its package has it."""
    if name not in SKIMAGE + SKLEARN:
        raise ValueError(f"load_photographs: names must be among {', '.join(SKIMAGE + SKLEARN)}, got {name!r}")
    try:
        if name in SKLEARN:
            from sklearn.datasets import load_sample_image

            return load_sample_image(f"{name}.jpg")
        import skimage.data

        return getattr(skimage.data, name)()
    except ModuleNotFoundError as error:
        package = "scikit-learn" if name in SKLEARN else "scikit-image"
        raise ModuleNotFoundError(
            f'load_photographs: {package} holds {name} and is not installed: pip install "tarflow-fast[photographs]"'
        ) from error
