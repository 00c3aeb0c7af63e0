"""From images, or a flow's samples, to statistics and their distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tarflow_fast.data import ImageSet, generator
from tarflow_fast.data.images import to_uint8
from tarflow_fast.fid.distance import frechet_distance
from tarflow_fast.fid.statistics import Statistics
from tarflow_fast.validate import check_positive_int

if TYPE_CHECKING:
    from tarflow_fast.model import TarFlow

Features = Callable[[Tensor], Tensor]
"""(B, 3, H, W) uint8, on the CPU -> (B, F) on any device, a row a function of its image alone."""


@dataclass(frozen=True)
class Fid:
    """distance: the FID.  statistics: of the samples.  bad: samples that were not finite, and are not part of them."""

    distance: float
    statistics: Statistics
    bad: int


def image_statistics(
    images: ImageSet, features: Features, *, batch_size: int = 64, progress: bool = False
) -> Statistics:
    """Mean and covariance of the features of all images of a set; grey ones become RGB by repetition.

    Bytes are scaled to 0..255 where the set has fewer levels: round(255 x / (levels - 1)).
    Raises ValueError for a set of fewer than 2 images, or channels other than 1 and 3; TypeError, ValueError for
    features that are no (B, F) of finite numbers.
    """
    from tqdm import tqdm

    check_positive_int("image_statistics", "batch_size", batch_size)
    if len(images) < 2:
        raise ValueError(f"image_statistics: images must hold at least 2, got {len(images)} ({images.source})")
    _check_channels("image_statistics", images.shape[0])
    found = Statistics()
    with tqdm(total=len(images), unit="image", desc="FID, images", disable=not progress) as bar:
        for start in range(0, len(images), batch_size):
            x, _ = images.fetch(torch.arange(start, min(start + batch_size, len(images))))
            if images.levels != 256:
                x = (x.double() * (255 / (images.levels - 1))).round().to(torch.uint8)
            found.update(_apply(features, x))
            bar.update(len(x))
    return found


def fid(
    model: TarFlow,
    reference: Statistics,
    features: Features,
    *,
    n: int = 50_000,
    conditional: bool = True,
    guidance: float = 0.0,
    guide_what: str = "ab",
    attn_temp: float = 1.0,
    annealed_guidance: bool = True,
    noise_std: float | None = None,
    solver: str = "auto",
    tolerance: float | None = None,
    window: int | None = None,
    draft: str | None = None,
    precision: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Fid:
    """The FID of n samples of a flow, as the evaluation of arXiv 2412.06329 has it (section 3.2).

    Samples are drawn, denoised where noise_std is given, clipped to [-1, 1] and rounded to bytes; `batch_size` of them
    lie in memory at once. A sample that is not finite is left out and counted. The result is a function of
    (model, reference, features, n, seed, batch_size) and of how samples are drawn.

    Args:
        reference: statistics of the images, by the same features.
        features: in Inception's place, see `Features`.
        conditional: draw every class in equal shares, where the flow has classes; otherwise none is named.
        guidance, guide_what, attn_temp, annealed_guidance: as in `sample`. Guidance is annealed unless told otherwise,
            because the original's evaluate_fid.py has it so.
        noise_std: standard deviation of the noise the flow was trained with, which `denoise` takes off; None: none.
        solver, tolerance, window, precision: as in `sample`.

    Raises:
        TypeError, ValueError: as `sample` and `denoise`; n below 2; fewer than 2 finite samples; features of another
            size than the reference's, which is found before a sample is drawn.

    Warns:
        RuntimeWarning: see `frechet_distance`.
    """
    from tqdm import tqdm

    check_positive_int("fid", "n", n, 2)
    check_positive_int("fid", "batch_size", batch_size)
    channels = model.in_channels
    _check_channels("fid", channels)
    height, width = (side * model.patch_size for side in model.grid)
    width_of = _apply(features, torch.zeros(1, channels, height, width, dtype=torch.uint8)).shape[1:]
    if width_of != reference.mean.shape:
        raise ValueError(
            f"fid: reference must be of features of size {tuple(width_of)}, got {tuple(reference.mean.shape)}"
        )
    found, bad, device, classes = Statistics(), 0, model.var.device, model.num_classes
    labels = torch.arange(n) * classes // n if conditional and classes else None
    with tqdm(total=n, unit="sample", desc="FID, samples", disable=not progress) as bar:
        for start in range(0, n, batch_size):
            rows = slice(start, min(start + batch_size, n))
            y = None if labels is None else labels[rows].to(device)
            x = model.sample(
                rows.stop - start, y, guidance=guidance, guide_what=guide_what, attn_temp=attn_temp,
                annealed_guidance=annealed_guidance, solver=solver, tolerance=tolerance, window=window, draft=draft,
                precision=precision, seed=generator(seed, "fid", start).initial_seed(), nonfinite="ignore",
            )  # fmt: skip
            if noise_std:
                x = model.denoise(x, y, noise_std=noise_std, nonfinite="ignore")
            whole = x.isfinite().flatten(1).all(dim=1)
            bad += int((~whole).sum())
            if whole.any():
                found.update(_apply(features, to_uint8(x[whole])))
            bar.update(len(x))
    if found.count < 2:
        raise ValueError(f"fid: needs at least 2 finite samples, got {found.count} of {n}")
    return Fid(frechet_distance(found.mean, found.covariance, reference.mean, reference.covariance), found, bad)


def _apply(features: Features, images: Tensor) -> Tensor:
    """Features (B, F) of bytes (B, 1 or 3, H, W), checked."""
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    found = features(images.contiguous())
    if not isinstance(found, Tensor):
        raise TypeError(f"fid: features must give a torch.Tensor, got {type(found).__name__}")
    if found.ndim != 2 or len(found) != len(images):
        raise ValueError(f"fid: features must give shape ({len(images)}, F), got {tuple(found.shape)}")
    return found


def _check_channels(where: str, channels: int) -> None:
    if channels not in (1, 3):
        raise ValueError(f"{where}: images must have 1 or 3 channels, got {channels}")
