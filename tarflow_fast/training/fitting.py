"""Training a flow that exists: its shape as settings, and images that fit it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from tarflow_fast import data
from tarflow_fast.data import ImageSet, VariationalDequantizer
from tarflow_fast.flows import open_flow
from tarflow_fast.model import TarFlow
from tarflow_fast.training.config import GIVEN, TrainConfig
from tarflow_fast.transforms import find_transform

# What a model fixes.
SHAPE = ("in_channels", "patch_size", "channels", "num_blocks", "layers_per_block", "nvp", "transform")
NOT_SETTINGS = (*SHAPE, "img_size", "dataset", "data_root", "strict", "config", "out")


def fit_config(model: TarFlow, out: str | Path | None, settings: dict[str, Any]) -> TrainConfig:
    """The settings of a run that trains this model. Raises TypeError for one that is unknown or not free."""
    free = [field.name for field in fields(TrainConfig) if field.name not in NOT_SETTINGS]
    unknown = [name for name in settings if name not in free]
    if unknown:
        raise TypeError(f"fit: settings must be among {', '.join(free)}, got {unknown[0]}")
    shape = {name: model.config.get(name) for name in SHAPE}
    size = model.config["img_size"]
    given = {"device": str(model.var.device)} | ({"resume": "none"} if out is None else {}) | settings
    where = Path("runs", "fit") if out is None else Path(out)
    img_size = size if isinstance(size, int) else tuple(size)
    return TrainConfig(dataset=GIVEN, out=where, img_size=img_size, **shape, **given).resolved()


def check_dequantizer(dequantizer: object, model: TarFlow, config: TrainConfig) -> None:
    """Raises TypeError for what is no `VariationalDequantizer`, ValueError for one that this run cannot train."""
    if not isinstance(dequantizer, VariationalDequantizer):
        raise TypeError(f"fit: dequantizer must be a VariationalDequantizer, got {type(dequantizer).__name__}")
    if config.dequantize != "variational":
        raise ValueError(f"fit: dequantizer must come with dequantize='variational', got {config.dequantize!r}")
    if other := {p.dtype for p in dequantizer.parameters()} - {torch.float32}:
        raise ValueError(f"fit: dequantizer must be float32, got {other.pop()}")
    expected = (model.in_channels, *data.image_size(model.img_size))
    if dequantizer.shape != expected:
        raise ValueError(f"fit: dequantizer must be for images of shape {expected}, got {dequantizer.shape}")


def started(config: TrainConfig) -> tuple[TarFlow, TrainConfig]:
    """The flow that config.start names, and the settings with its shape.

    Raises ValueError where the settings ask for another shape, or the flow is none over images; as `open_flow`.
    """
    model, _ = open_flow(config.start)
    if not isinstance(model, TarFlow):
        raise ValueError(f"train: start must be a flow over images, got {config.start}, a flow over tokens")
    size = model.config["img_size"]
    shape = {name: model.config.get(name) for name in SHAPE} | {
        "img_size": size if isinstance(size, int) else tuple(size)
    }
    asked_for = {name: getattr(config, name) for name in shape}
    if config.transform is not None:
        asked_for["transform"] = str(find_transform("train", config.transform))
        shape["transform"] = str(model.blocks[0].transform)
    for name, ours in shape.items():
        asked = asked_for[name]
        if name != "nvp" and asked not in (None, ours):
            raise ValueError(f"train: {name} must be {ours}, as in the flow to start from, got {asked}")
    return model, replace(config, **shape)


def fit_images(model: TarFlow, images: object, held_out: object = None) -> ImageSet:
    """The images and those held out, as the model takes them. TypeError or ValueError where they do not fit."""
    if not isinstance(model, TarFlow):
        raise TypeError(f"fit: model must be a TarFlow, got {type(model).__name__}")
    if model.var.dtype != torch.float32 or any(p.dtype != torch.float32 for p in model.parameters()):
        raise ValueError(f"fit: model must be float32 (precision='bf16' trains under autocast), got {model.var.dtype}")
    whole = _fitted(model, data.as_images(images, "fit"), "images")
    kept = whole.held_out if held_out is None else data.as_images(held_out, "fit")
    return replace(whole, held_out=None if kept is None else _fitted(model, kept, "held_out"))


def _fitted(model: TarFlow, images: ImageSet, name: str) -> ImageSet:
    expected = (model.in_channels, *data.image_size(model.img_size))
    if images.shape != expected:
        raise ValueError(
            f"fit: {name} must have the model's shape (N, {', '.join(map(str, expected))}), got "
            f"(N, {', '.join(map(str, images.shape))})"
        )
    count = model.num_classes
    if not count or images.labels is None:
        return replace(images, labels=None, classes=())
    if int(images.labels.max()) >= count:
        raise ValueError(
            f"fit: labels of {name} must be below the model's num_classes = {count}, got {int(images.labels.max())}"
        )
    return images if len(images.classes) == count else replace(images, classes=tuple(map(str, range(count))))
