"""A data set that Hugging Face's `datasets` saved on disk (`save_to_disk`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tarflow_fast.data.arrays import from_items
from tarflow_fast.data.sets import ImageSet

MARKS = ("dataset_dict.json", "state.json")  # what save_to_disk writes for several splits, or for one
HELD_OUT = ("test", "validation")


def is_saved(folder: str | Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any(Path(folder, name).is_file() for name in MARKS)


def load_saved(folder: str | Path) -> ImageSet:
    """The images and labels of a folder of `datasets.save_to_disk`, with their own size, held in memory.

    Images are the column of type Image, or else the column image or img; labels the column of type ClassLabel, or else
    label. Of several splits, train is the set and test (or else validation) its held-out part.
    Raises ModuleNotFoundError without `datasets`, ValueError naming the folder: damaged, no train split, no images,
    images of several sizes.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"load_saved: {folder} needs the package datasets: pip install datasets") from error
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow's errors, JSON's, FileNotFoundError
        raise ValueError(
            f"load_saved: cannot read {folder} as a saved data set ({type(error).__name__}: {error})"
        ) from error
    if hasattr(saved, "features"):
        return _image_set(saved, str(folder))
    if "train" not in saved:
        raise ValueError(f"load_saved: {folder} must hold a split train, got {', '.join(map(str, saved)) or 'none'}")
    whole = _image_set(saved["train"], str(folder))
    test = next((name for name in HELD_OUT if name in saved), None)
    held_out = None if test is None else _image_set(saved[test], f"{folder} ({test})")
    if held_out is not None and (held_out.shape != whole.shape or held_out.classes != whole.classes):
        raise ValueError(
            f"load_saved: the split {test} of {folder} must match train: {whole.shape} and {len(whole.classes)} "
            f"classes, got {held_out.shape} and {len(held_out.classes)}"
        )
    return ImageSet(whole.images, whole.labels, whole.classes, 256, str(folder), held_out)


def _image_set(split: Any, source: str) -> ImageSet:
    image, label = _column(split, "Image", ("image", "img")), _column(split, "ClassLabel", ("label",))
    if image is None:
        raise ValueError(
            f"load_saved: {source} must have a column of images, got {', '.join(split.features) or 'none'}"
        )
    classes = None if label is None else getattr(split.features[label], "names", None)
    rows = (split[index] for index in range(len(split)))
    return from_items((row[image] if label is None else (row[image], row[label]) for row in rows), classes, source)


def _column(split: Any, kind: str, names: tuple[str, ...]) -> str | None:
    """The first column of a type, or else of one of these names."""
    typed = [name for name, feature in split.features.items() if type(feature).__name__ == kind]
    return next(iter([*typed, *(name for name in names if name in split.features)]), None)
