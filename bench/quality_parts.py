"""What bench/quality.py measures: distances to training images, the best linear denoiser, an independent classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

COMPONENTS = 80  # that the classifier keeps of an image


def nearest(x: Tensor, known: Tensor, rows: int = 500) -> tuple[Tensor, Tensor]:
    """The nearest of `known` to each of x: root mean square of the pixels' differences (N,), index (N,).

    x: (N, C, H, W) and known: (M, C, H, W), float32, in the same units.  rows: of x together; memory is rows * M * 4.
    The index is found by |k|^2 - 2 x.k, and the distance then computed from the difference itself.
    """
    known_flat = known.flatten(1)
    squares = known_flat.square().sum(1)
    index = torch.cat([(squares - 2 * part @ known_flat.T).argmin(1) for part in x.flatten(1).split(rows)])
    return (x - known[index]).flatten(1).square().mean(1).sqrt(), index


def linear_filter(known: Tensor) -> Callable[[Tensor, float], Tensor]:
    """The best linear denoiser of images like these: mu + S (S + sigma^2 I)^-1 (x - mu), mean mu, covariance S.

    known: (M, C, H, W).  The filter takes (x (N, C, H, W), sigma), the standard deviation of the noise in x.
    """
    flat = known.flatten(1)
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    values = values.clamp(min=0)

    def clean(x: Tensor, sigma: float) -> Tensor:
        weights = (x.flatten(1) - mean) @ vectors * (values / (values + sigma**2))
        return (mean + weights @ vectors.T).view_as(x)

    return clean


def mean_square(a: Tensor, b: Tensor) -> float:
    """Mean squared difference over images and pixels."""
    return (a - b).double().square().mean().item()


def learn_to_read(images: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """A classifier that knows real images only: scikit-learn's SVM on principal components.

    images: (N, C, H, W) uint8.  labels: (N,).  The result reads (N, C, H, W) uint8 as (N,) labels.
    Raises ModuleNotFoundError without scikit-learn.
    """
    try:
        from sklearn.decomposition import PCA
        from sklearn.pipeline import make_pipeline
        from sklearn.svm import SVC
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'learn_to_read: scikit-learn has the classifier and is not installed: pip install "tarflow-fast[demo]"'
        ) from error

    def features(x: Tensor) -> object:
        return (x.flatten(1).float() / 255).numpy()

    seen = features(images)
    reduce = PCA(min(COMPONENTS, *seen.shape), random_state=0)
    reader = make_pipeline(reduce, SVC(C=10, gamma="scale", cache_size=1000)).fit(seen, labels.numpy())
    return lambda x: torch.from_numpy(reader.predict(features(x)))


@dataclass(frozen=True)
class Reading:
    """How images of known classes were read: wanted and read, (N,) labels each."""

    wanted: Tensor
    read: Tensor

    def share(self, label: int | None = None) -> float:
        """Of all, or of the class asked for, the share that was read as what it should be."""
        of = self.wanted == self.read
        return (of if label is None else of[self.wanted == label]).double().mean().item()

    def mistaken_for(self, label: int) -> tuple[int, float] | None:
        """The other class that images of this one were read as most often, and the share of them; None if none was."""
        read = self.read[self.wanted == label]
        counts = read[read != label].bincount()
        return (int(counts.argmax()), counts.max().item() / len(read)) if counts.numel() else None
