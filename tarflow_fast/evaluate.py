"""How well a flow knows data: bits/dim of images, beside the plainest model there is; their classes; nats of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from tarflow_fast.data import ImageFiles, ImageSet, dequantize, generator, to_unit
from tarflow_fast.data.arrays import read_arrays
from tarflow_fast.validate import check_positive_int

if TYPE_CHECKING:
    from tarflow_fast.data import Dequantizer
    from tarflow_fast.flow import TokenFlow
    from tarflow_fast.model import TarFlow

_INDEX_BYTES = 1 << 24


@dataclass(frozen=True)
class Bits:
    """bits: (N,) float64, bits per dimension of each image.  mean and its standard error over the images."""

    bits: torch.Tensor

    @property
    def mean(self) -> float:
        return self.bits.mean().item()

    @property
    def standard_error(self) -> float:
        return (self.bits.std() / math.sqrt(len(self.bits))).item() if len(self.bits) > 1 else math.nan


def evaluate(
    model: TarFlow,
    images: ImageSet,
    *,
    conditional: bool = True,
    n_draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    dequantizer: Dequantizer | None = None,
    importance: int = 1,
) -> Bits:
    """`model.bits_per_dim` over a whole set, an upper bound on the bits an exact code would need.

    conditional: tell the flow the labels, where both have classes.  n_draws: dequantisation draws an image.
    dequantizer, importance: as `bits_per_dim` has them.
    The result is a function of (model, images, n_draws, seed, batch_size, dequantizer, importance).
    Raises ValueError for an empty set, or labels where the flow has another number of classes.
    """
    from tqdm import tqdm

    if len(images) == 0:
        raise ValueError(f"evaluate: images must hold at least one image, got an empty set ({images.source})")
    if batch_size < 1:
        raise ValueError(f"evaluate: batch_size must be at least 1, got {batch_size}")
    labelled = conditional and images.labels is not None and model.num_classes > 0
    if labelled and len(images.classes) != model.num_classes:
        raise ValueError(
            f"evaluate: images must have the flow's {model.num_classes} classes, got {len(images.classes)} "
            f"({images.source}); conditional=False leaves labels out"
        )
    device = model.var.device
    parts = []
    with tqdm(total=len(images), unit="image", desc="bits/dim", disable=not progress) as bar:
        for start in range(0, len(images), batch_size):
            x, y = images.fetch(torch.arange(start, min(start + batch_size, len(images))))
            parts.append(
                model.bits_per_dim(
                    x.to(device), y.to(device) if labelled else None, levels=images.levels, n_draws=n_draws,
                    seed=generator(seed, "evaluate", start).initial_seed(), batch_size=batch_size,
                    dequantizer=dequantizer, importance=importance,
                ).cpu()
            )  # fmt: skip
            bar.update(len(x))
            bar.set_postfix_str(f"{torch.cat(parts).mean().item():.4f}")
    return Bits(torch.cat(parts))


@dataclass(frozen=True)
class Accuracy:
    """right: (N,) bool, whether each image got its own class.  mean and its standard error over the images."""

    right: torch.Tensor

    @property
    def mean(self) -> float:
        return self.right.double().mean().item()

    @property
    def standard_error(self) -> float:
        count = len(self.right)
        return (self.right.double().std() / math.sqrt(count)).item() if count > 1 else math.nan


def classification(
    model: TarFlow,
    images: ImageSet,
    n: int = 300,
    *,
    noise_std: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    dequantizer: Dequantizer | None = None,
) -> Accuracy:
    """Whether `model.classify` finds the classes of n images of a set, drawn by the seed (all, where there are fewer).

    noise_std: standard deviation of the Gaussian noise that the flow was trained with, which the images get as they did
        then; None: dequantisation, as in `evaluate`, by the dequantizer given. Each image costs as many passes as there
        are classes. One whose log p is not finite for some class counts as wrong.
    Raises ValueError for an empty set, one without labels, or with another number of classes than the flow.
    """
    from tqdm import tqdm

    check_positive_int("classification", "n", n)
    check_positive_int("classification", "batch_size", batch_size)
    if len(images) == 0 or images.labels is None or len(images.classes) != model.num_classes:
        raise ValueError(
            f"classification: images must be at least one, with the flow's {model.num_classes} classes, got "
            f"{len(images)} with {len(images.classes)} ({images.source})"
        )
    chosen, right = torch.randperm(len(images), generator=generator(seed, "classify"))[:n], []
    with tqdm(total=len(chosen), unit="image", desc="classes", disable=not progress) as bar:
        for number, part in enumerate(chosen.split(batch_size)):
            x, y = images.fetch(part)
            draw = generator(seed, "classify noise", number)
            if noise_std is None:
                u = torch.rand(x.shape, generator=draw)
                if dequantizer is not None:
                    with torch.no_grad():
                        u, _ = dequantizer(x.to(model.var.device), u.to(model.var.device), images.levels)
                x = dequantize(x, u.cpu(), images.levels)
            else:
                x = to_unit(x, images.levels) + noise_std * torch.randn(x.shape, generator=draw)
            scores = model.classify(x.to(model.var)).cpu()
            right.append((scores.argmax(dim=1) == y) & scores.isfinite().all(dim=1))
            bar.update(len(x))
    return Accuracy(torch.cat(right))


def histogram_bits(known: ImageSet, images: ImageSet) -> float:
    """Bits per dimension of `images` under one histogram a pixel, counted on `known` (each level counted once more).

    The honest floor for any flow: it knows where ink is likely and nothing else. Both sets must be held in memory.
    """
    if isinstance(known.images, ImageFiles) or isinstance(images.images, ImageFiles):
        raise ValueError("histogram_bits: both sets must be held in memory, got one that is decoded batch by batch")
    counts = 1 + _counts(known.images, known.levels).double()
    cost = -(counts / counts.sum(1, keepdim=True)).log2()
    return ((_counts(images.images, known.levels) * cost).sum() / images.images.numel()).item()


def _counts(images: torch.Tensor, levels: int) -> torch.Tensor:
    """How often each pixel, flattened, has each level: (pixels, levels) int64, of (N, C, H, W) uint8.

    Some images at a time: indices take 8 bytes a pixel.
    """
    pixels = math.prod(images.shape[1:])
    counts = torch.zeros(pixels, levels, dtype=torch.int64)
    for part in images.flatten(1).split(max(1, _INDEX_BYTES // (8 * pixels))):
        counts.scatter_add_(1, part.T.long(), torch.ones((), dtype=torch.int64).expand(pixels, len(part)))
    return counts


@dataclass(frozen=True)
class LogLikelihood:
    """nats: (N,) float64, log p(x) of each row, of `dims` numbers.  mean and its standard error over the rows."""

    nats: torch.Tensor
    dims: int

    @property
    def mean(self) -> float:
        return self.nats.mean().item()

    @property
    def standard_error(self) -> float:
        return (self.nats.std() / math.sqrt(len(self.nats))).item() if len(self.nats) > 1 else math.nan

    @property
    def per_dim(self) -> float:
        return self.mean / self.dims

    @property
    def bad(self) -> list[int]:
        """The rows whose log p is not finite; the mean is not either then."""
        return (~self.nats.isfinite()).nonzero().flatten().tolist()


def load_tokens(path: str | Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None]:
    """x (N, *shape) of a .npy file, or x and, where there are any, labels y (N,) of a .npz file; nothing is unpickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another or a damaged file, no array x, an array of another shape or of no numbers, no row, a number
            that is not finite.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".npz", ".npy"):
        raise ValueError(f"load_tokens: the data of a flow over tokens must be a .npz or .npy file, got {str(path)!r}")
    arrays = read_arrays(path, {"x": ("x",), "y": ("y",)}, "load_tokens")
    x, y = arrays["x"], arrays.get("y")
    if x.ndim == 0 or x.shape[1:] != tuple(shape):
        raise ValueError(f"load_tokens: x must have shape (N, {', '.join(map(str, shape))}), got {x.shape}")
    if x.dtype.kind not in "fiu":
        raise ValueError(f"load_tokens: x must hold real numbers, got {x.dtype}")
    if len(x) == 0:
        raise ValueError("load_tokens: x must hold at least one row, got 0")
    bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))
    if bad.size:
        raise ValueError(f"load_tokens: x must be finite, got {bad.size} rows that are not, the first is row {bad[0]}")
    if y is not None and (y.shape != x.shape[:1] or y.dtype.kind not in "iu"):
        raise ValueError(f"load_tokens: y must hold {len(x)} integers, one label a row, got {y.dtype} {y.shape}")
    return x, y


@torch.no_grad()
def evaluate_tokens(
    model: TokenFlow, x: np.ndarray, y: np.ndarray | None = None, *, batch_size: int = 64, progress: bool = False
) -> LogLikelihood:
    """`model.log_prob` of tokens x (N, T, D) and labels y (N,), `batch_size` rows at a time, in the model's dtype.

    Raises:
        ValueError: no row; a batch_size below 1; otherwise as `log_prob`.
    """
    from tqdm import tqdm

    check_positive_int("evaluate_tokens", "batch_size", batch_size)
    if len(x) == 0:
        raise ValueError("evaluate_tokens: x must hold at least one row, got 0")
    parts = []
    with tqdm(total=len(x), unit="row", desc="log-likelihood", disable=not progress) as bar:
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            part = torch.tensor(x[rows].astype(np.float64)).to(model.var)
            labels = None if y is None else torch.tensor(y[rows].astype(np.int64), device=part.device)
            parts.append(model.log_prob(part, labels).double().cpu())
            bar.update(len(part))
    return LogLikelihood(torch.cat(parts), model.num_tokens * model.token_size)
