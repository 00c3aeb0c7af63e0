"""Means and covariances of features, gathered batch by batch, and files of them."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from tarflow_fast.data.arrays import read_arrays
from tarflow_fast.files import few, load_tensors, write_atomic

_NAMES = {"mu": ("mu", "mean"), "sigma": ("sigma", "cov", "covariance"), "count": ("count", "n")}
_SUMS = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")  # in torchmetrics' FID
_TENSORS = (".pt", ".pth", ".safetensors")


class Statistics:
    """The mean and covariance of rows that come in batches, in float64: memory is F^2 numbers, however many rows.

    Sums of squares are kept about the running mean, and a batch is merged into them (Chan, Golub and LeVeque, The
    American Statistician 37, 1983), so that a mean far from 0 costs no digits.

    count: rows so far; None for statistics of a file that does not tell.
    """

    def __init__(self) -> None:
        self.count: int | None = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None  # sum of (x - mean)(x - mean)^T, or sigma itself where count is None

    @classmethod
    def of(cls, mu: Tensor | np.ndarray, sigma: Tensor | np.ndarray, count: int | None = None) -> Statistics:
        """Statistics that are known: mean (F,), covariance (F, F), and of how many rows."""
        found = cls()
        found.count = count
        found._mean, sigma = (torch.as_tensor(each).detach().to("cpu", torch.float64) for each in (mu, sigma))
        if found._mean.ndim != 1 or len(found._mean) == 0 or sigma.shape != (len(found._mean),) * 2:
            raise ValueError(
                "Statistics: mu must have shape (F,) and sigma (F, F), F >= 1, got "
                f"{tuple(found._mean.shape)} and {tuple(sigma.shape)}"
            )
        if count is not None and count < 2:
            raise ValueError(f"Statistics: count must be at least 2, got {count}")
        for name, value in (("mu", found._mean), ("sigma", sigma)):
            if not value.isfinite().all():
                raise ValueError(f"Statistics: {name} must be finite")
        found._squares = sigma if count is None else sigma * (count - 1)
        return found

    def update(self, features: Tensor) -> None:
        """Adds the rows of features (B, F), any real dtype and device. Raises ValueError, and adds none, where they are
        of another shape or not finite."""
        expected = "(B, F)" if self._mean is None else f"(B, {len(self._mean)})"
        if self.count is None:
            raise ValueError("Statistics: rows cannot be added to those of a file that does not tell their number")
        if not isinstance(features, Tensor):
            raise TypeError(f"Statistics: features must be a torch.Tensor, got {type(features).__name__}")
        size = features.shape[1:] if self._mean is None else self._mean.shape
        if features.ndim != 2 or features.shape[1:] != size or features.is_complex():
            raise ValueError(f"Statistics: features must have shape {expected}, got {tuple(features.shape)}")
        if not features.isfinite().all():
            bad = (~features.isfinite().all(dim=1)).sum()
            raise ValueError(f"Statistics: features must be finite, got {int(bad)} rows that are not")
        rows = features.detach().to("cpu", torch.float64)
        if len(rows) == 0:
            return
        if self._mean is None:
            self._mean, self._squares = rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1], rows.shape[1])
        total = self.count + len(rows)
        mean = rows.mean(dim=0)
        centred, shift = rows - mean, mean - self._mean
        self._squares += centred.T @ centred + (self.count * len(rows) / total) * torch.outer(shift, shift)
        self._mean = self._mean + shift * (len(rows) / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """(F,) float64. Raises ValueError before the first row."""
        if self._mean is None:
            raise ValueError("Statistics: a mean needs at least 1 row, got 0")
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """(F, F) float64, the sum of squares over count - 1. Raises ValueError before the second row."""
        if self.count is None:
            return self._squares
        if self.count < 2:
            raise ValueError(f"Statistics: a covariance needs at least 2 rows, got {self.count}")
        return self._squares / (self.count - 1)


def holds_statistics(path: str | Path) -> bool:
    """Whether a path is a file of statistics by its name and the names in it, and not one of images."""
    path = Path(path)
    if path.suffix in _TENSORS:
        return True
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as content:
            return any(name in content for name in _NAMES["mu"])
    except (ValueError, OSError, EOFError, BadZipFile):
        return False  # whoever reads it says what is wrong with it


def load_statistics(path: str | Path) -> Statistics:
    """The statistics in a file; nothing is unpickled.

    A .npz, .pt, .pth or .safetensors file with mu (F,) and sigma (F, F) (or mean and cov) and, if any, their count; or
    the state of torchmetrics' FrechetInceptionDistance, which the original's prepare_fid_stats.py saves: the sums over
    the real images of their features, of the products of these, and of ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, one without these names, or values that cannot be a mean and a covariance.
        RuntimeError: see `load_tensors`.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".npz", *_TENSORS):
        raise ValueError(f"load_statistics: path must end in .npz, .pt, .pth or .safetensors, got {path}")
    if path.suffix == ".npz":
        arrays = read_arrays(path, _NAMES, "load_statistics")
        found = {name: _real(path, name, value) for name, value in arrays.items()}
    else:
        tensors = load_tensors(path)
        found = {key: tensors[name] for key, names in _NAMES.items() for name in names if name in tensors}
        if all(name in tensors for name in _SUMS):
            found = _from_sums(path, *(tensors[name] for name in _SUMS))
    if "mu" not in found or "sigma" not in found:
        got = few([*(found if path.suffix == ".npz" else tensors)])
        raise ValueError(f"load_statistics: {path} must hold mu and sigma, or {_SUMS[0]} and its kin, got {got}")
    count = found.get("count")
    try:
        return Statistics.of(found["mu"], found["sigma"], None if count is None else int(count))
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"load_statistics: {path} holds no mean and covariance: {error}") from error


def _real(path: Path, name: str, value: np.ndarray) -> np.ndarray:
    if value.dtype.kind not in "fiu":
        raise ValueError(f"load_statistics: {name} in {path} must hold real numbers, got {value.dtype}")
    return value.astype(np.float64)


def _from_sums(path: Path, total: Tensor, products: Tensor, count: Tensor) -> dict[str, Tensor]:
    """Mean and covariance of sums over rows x of x, of x x^T, and of 1."""
    n = int(count)
    if n < 2:
        raise ValueError(f"load_statistics: {path} must hold statistics of at least 2 images, got {n}")
    mean = total.double() / n
    return {"mu": mean, "sigma": (products.double() - n * torch.outer(mean, mean)) / (n - 1), "count": count}


def save_statistics(path: str | Path, statistics: Statistics) -> None:
    """Writes mu, sigma (float64) and, where known, count to a .npz file, whole or not at all."""
    path = Path(path).expanduser()
    if path.suffix != ".npz":
        raise ValueError(f"save_statistics: path must end in .npz, got {path}")
    arrays = {"mu": statistics.mean.numpy(), "sigma": statistics.covariance.numpy()}
    if statistics.count is not None:
        arrays["count"] = np.int64(statistics.count)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, numpy would append .npz to it
            np.savez(file, **arrays)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, write)
