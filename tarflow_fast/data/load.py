"""From the name of a data set, as the command line has it, to images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tarflow_fast.data.arrays import load_array
from tarflow_fast.data.folder import load_folder
from tarflow_fast.data.hub import is_saved, load_saved
from tarflow_fast.data.idx import find_idx, is_idx, labels_beside, load_idx, load_idx_folder
from tarflow_fast.data.photographs import load_photographs
from tarflow_fast.data.sets import ImageSet, image_size

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts its files
DATA_ROOT = Path("data")


def load_dataset(
    name: str,
    img_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    *,
    data_root: str | Path | None = None,
    strict: bool = False,
) -> ImageSet:
    """`digits`, `fashion-mnist`, `photographs`, or what is at the path `name`.

    A path is a folder of image files (`load_folder`), of MNIST's four IDX files (`load_idx_folder`) or of Hugging
    Face's save_to_disk (`load_saved`), an IDX file of images with its labels beside it, or a .npy or .npz file.
    img_size, in_channels: what the images must be; None: as they are (a folder of files needs both).
    data_root: where fashion-mnist is looked for.  strict: an image file that cannot be read is an error.
    Raises FileNotFoundError, or ValueError naming the file, expected and got; no file is written.
    """
    path = Path(name)
    if name == "photographs":
        return load_photographs(32 if img_size is None else img_size, 3 if in_channels is None else in_channels)
    if not has_own_size(name):
        if img_size is None or in_channels is None:
            raise ValueError(f"load_dataset: images of the folder {name} need img_size and in_channels")
        if not path.exists():
            raise FileNotFoundError(
                f"load_dataset: there is no folder {name} (built in are digits, fashion-mnist and photographs)"
            )
        return load_folder(name, img_size, in_channels, strict=strict)
    if name == "digits":
        return load_digits(8 if img_size is None else img_size, 1 if in_channels is None else in_channels)
    if name == "fashion-mnist":
        images = load_fashion_mnist(data_root)
    elif is_idx(path):
        images = load_idx(path, labels_beside(path))
    elif path.suffix in (".npy", ".npz"):
        images = load_array(path)
    else:
        images = load_saved(path) if is_saved(path) else load_idx_folder(path)
    expected = (in_channels or images.shape[0], *(image_size(img_size) if img_size else images.shape[1:]))
    if images.shape != expected:
        raise ValueError(
            f"load_dataset: {name} must be {expected[1]} x {expected[2]} with {expected[0]} channels as asked for, "
            f"got {images.shape[1]} x {images.shape[2]} with {images.shape[0]}; its images are taken as they are"
        )
    return images


def has_own_size(name: str) -> bool:
    """Whether the images of a data set have one size of their own, and are not cropped or resized to another."""
    path = Path(name)
    if name in ("digits", "fashion-mnist") or is_idx(path) or path.suffix in (".npy", ".npz"):
        return True
    return path.is_dir() and (is_saved(path) or find_idx(path, "train-images-idx3-ubyte") is not None)


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


def load_fashion_mnist(data_root: str | Path | None = None) -> ImageSet:
    """Fashion-MNIST (Xiao et al., arXiv 1708.07747; MIT licence): 60,000 grey images of 28 x 28, 10 classes.

    The 10,000 test images are the held-out part. Looked for in data_root (`data` if None), then in its
    FashionMNIST/raw (where torchvision puts it), then where Debian's package dataset-fashion-mnist puts it.
    Raises FileNotFoundError that says how to get it; ValueError for damaged files.
    """
    root = DATA_ROOT if data_root is None else Path(data_root).expanduser()
    places = (root, root / "FashionMNIST" / "raw", DEBIAN)
    for place in places:
        if find_idx(place, "train-images-idx3-ubyte"):
            return replace(load_idx_folder(place, FASHION_CLASSES), source="fashion-mnist")
    raise FileNotFoundError(
        f"load_fashion_mnist: there is no train-images-idx3-ubyte, gzipped or not, in {', '.join(map(str, places))}. "
        "Get it with `apt install dataset-fashion-mnist` (Debian, Ubuntu), or with "
        f"`torchvision.datasets.FashionMNIST({str(root)!r}, download=True)`, or name its folder with --data-root"
    )
