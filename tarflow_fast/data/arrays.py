"""Arrays in: .npy and .npz files, tensors and torch data sets in memory. Values are bytes, or bytes divided by 255."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from tarflow_fast.data.decode import fit_image
from tarflow_fast.data.sets import ImageSet
from tarflow_fast.files import few

__all__ = ["as_images", "load_array", "read_arrays"]

Array = (torch.Tensor, np.ndarray)
LIMIT = 2**32  # bytes


def read_arrays(path: str | Path, wanted: dict[str, tuple[str, ...]], caller: str) -> dict[str, np.ndarray]:
    """The arrays of a .npy or .npz file that go by one of the wanted names; nothing is unpickled.

    wanted: what an array is called in the result -> the names it may have in a .npz; a .npy is the first of them.
    Raises FileNotFoundError, or ValueError naming a damaged file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{caller}: path must be a file, got {path}")
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {next(iter(wanted)): content}
        with content:
            names = list(content)
            found = {key: next((n for n in aliases if n in names), None) for key, aliases in wanted.items()}
            arrays = {key: content[name] for key, name in found.items() if name is not None}
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise ValueError(f"{caller}: {path} is not a whole file of numbers: {error}") from error
    first, aliases = next(iter(wanted.items()))
    if first not in arrays:
        raise ValueError(f"{caller}: {path} must hold an array {' or '.join(aliases)}, got {few(names) or 'none'}")
    return arrays


def load_array(path: str | Path) -> ImageSet:
    """Images of a .npy file, or of a .npz with x (or images, or arr_0) and, if any, labels y (or labels).

    Raises as `read_arrays`, and ValueError as `as_images`, naming the file.
    """
    wanted = {"x": ("x", "images", "arr_0"), "y": ("y", "labels")}
    arrays = read_arrays(path, wanted, "load_array")
    return _image_set(arrays["x"], arrays.get("y"), None, str(path))


def as_images(data: object, source: str = "as_images") -> ImageSet:
    """Data as an `ImageSet`, held in memory: bytes, grey or RGB.

    data: an ImageSet; images as a tensor or array; a tuple (images, labels) of them; or a torch `Dataset` or a list,
        whose items are an image or (image, label, ...). An image is a tensor, an array or a Pillow image, and is read
        once: a transform that is random gives one draw.
    Images are (N, H, W), (N, C, H, W) or (N, H, W, C), C = 1 or 3; uint8, or floats k / 255 as torchvision's ToTensor
    makes them. Labels are integers from 0. Class names are taken from `data.classes` where it has that many.
    Raises TypeError for another kind of data, ValueError naming source for values, sizes or labels that cannot be.
    """
    if isinstance(data, ImageSet):
        return data
    if isinstance(data, Array):
        return _image_set(data, None, None, source)
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(d, (torch.Tensor, np.ndarray)) for d in data):
        return _image_set(data[0], data[1], None, source)
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(data, (str, bytes, dict)):
        raise TypeError(
            f"{source}: data must be a tensor, a pair (images, labels), a torch Dataset with a length or an ImageSet, "
            f"got {type(data).__name__}"
        )
    return from_items((data[index] for index in range(len(data))), getattr(data, "classes", None), source)


def from_items(items: Iterable[object], classes: Iterable[str] | None, source: str) -> ImageSet:
    """An `ImageSet` of items that are an image, or (image, label, ...); see `as_images`."""
    images, labels, held = [], [], 0
    for number, item in enumerate(items):
        image, label = (item[0], item[1]) if isinstance(item, (tuple, list)) and len(item) > 1 else (item, None)
        image = image[0] if isinstance(image, (tuple, list)) and len(image) == 1 else image
        image = _pixels(image, f"{source}: item {number}")
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"{source}: all images must have one size, {tuple(images[0].shape)} like item 0, got "
                f"{tuple(image.shape)} in item {number}"
            )
        if (label is None) != (not labels) and number:
            raise ValueError(f"{source}: every item must have a label, or none; item {number} differs from item 0")
        held += image.numel()
        if held > LIMIT:
            raise ValueError(f"{source}: images must fit {LIMIT} bytes; a folder of image files may be larger")
        images.append(image)
        if label is not None:
            labels.append(int(label))
    if not images:
        raise ValueError(f"{source}: there must be at least one image, got none")
    return _image_set(torch.stack(images), torch.tensor(labels) if labels else None, classes, source)


def _pixels(image: object, name: str) -> torch.Tensor:
    """One image as bytes (C, H, W)."""
    if hasattr(image, "convert"):  # Pillow's
        grey = image.mode in ("1", "L", "I;16", "LA")
        return fit_image(image, (image.height, image.width), 1 if grey else 3)
    try:
        image = torch.as_tensor(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be an image (a tensor, an array or Pillow's), got {type(image).__name__}"
        ) from error
    if image.ndim not in (2, 3):
        raise ValueError(f"{name} must have shape (H, W), (C, H, W) or (H, W, C), got {tuple(image.shape)}")
    return _channels_first(_to_bytes(image[None], name), name)[0]


def _image_set(
    images: torch.Tensor | np.ndarray,
    labels: torch.Tensor | np.ndarray | None,
    classes: Iterable[str] | None,
    source: str,
) -> ImageSet:
    pixels = _channels_first(_to_bytes(_tensor(images, source), source), source)
    if labels is None:
        return ImageSet(pixels, None, (), 256, source)
    y = _tensor(labels, source)
    if y.shape != pixels.shape[:1] or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(
            f"{source}: labels must be {len(pixels)} integers, one an image, got {y.dtype} {tuple(y.shape)}"
        )
    y = y.long()
    if int(y.min()) < 0:
        raise ValueError(f"{source}: labels must be at least 0, got {int(y.min())}")
    names = tuple(map(str, classes or ()))
    names = names if len(names) > int(y.max()) else tuple(map(str, range(int(y.max()) + 1)))
    return ImageSet(pixels, y, names, 256, source)


def _tensor(values: torch.Tensor | np.ndarray, source: str) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach().cpu()
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{source}: expected an array of numbers, got {values.dtype}")
    return torch.from_numpy(np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="), copy=False)))


def _to_bytes(images: torch.Tensor, source: str) -> torch.Tensor:
    """uint8 as it is; floats that are k / 255, to a thousandth of a level, as k."""
    if images.numel() == 0:
        raise ValueError(f"{source}: there must be at least one image and one pixel, got shape {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images
    if images.is_floating_point():
        levels = images.double() * 255
        whole = levels.round()
        near = bool(((levels - whole).abs() <= 1e-3).all())  # false where there is a NaN
        if near and 0 <= whole.min() and whole.max() <= 255:
            return whole.to(torch.uint8)
    low, high = images.double().min().item(), images.double().max().item()
    raise ValueError(
        f"{source}: images must be uint8, or floats k / 255 with whole k from 0 to 255 (ToTensor without Normalize), "
        f"got {images.dtype} from {low:g} to {high:g}"
    )


def _channels_first(images: torch.Tensor, source: str) -> torch.Tensor:
    """(N, H, W), (N, C, H, W) or (N, H, W, C) -> (N, C, H, W)."""
    if images.ndim == 3:
        return images[:, None].contiguous()
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images.contiguous()
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images.permute(0, 3, 1, 2).contiguous()
    raise ValueError(
        f"{source}: images must have shape (N, H, W), (N, C, H, W) or (N, H, W, C), C = 1 or 3, got "
        f"{tuple(images.shape)}"
    )
