"""The Fréchet distance of two Gaussians."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

_NEGATIVE = 1e-4  # of the largest eigenvalue: a covariance that was kept in float32 may have eigenvalues that low


def frechet_distance(
    mu1: Tensor | np.ndarray, sigma1: Tensor | np.ndarray, mu2: Tensor | np.ndarray, sigma2: Tensor | np.ndarray
) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)): W2 of two Gaussians, squared.

    The trace of the square root is the sum of the singular values of sigma1^(1/2) sigma2^(1/2), with both roots from
    eigenvalues. Nothing is inverted, so that singular covariances are no trouble, and rounding errors stay of the order
    of float64's. (Dowson and Landau, J. Multivariate Analysis 12, 1982.)

    Args:
        mu1, mu2: (F,) means.
        sigma1, sigma2: (F, F) covariances, symmetric and positive semi-definite. All are computed with in float64.

    Returns:
        The distance, at least 0.

    Warns:
        RuntimeWarning: a covariance is singular, as of fewer than F + 1 samples. The distance is finite all the same.

    Raises:
        TypeError, ValueError: an argument is no tensor or array of these shapes, is not finite, or is no covariance.
    """
    mu1, sigma1 = _checked("1", mu1, sigma1)
    mu2, sigma2 = _checked("2", mu2, sigma2)
    if len(mu1) != len(mu2):
        raise ValueError(f"frechet_distance: mu2 must have the {len(mu1)} features of mu1, got {len(mu2)}")
    (root1, vectors1, singular1), (root2, vectors2, singular2) = _root("sigma1", sigma1), _root("sigma2", sigma2)
    if singular := [each for each in (singular1, singular2) if each]:
        warnings.warn(
            f"frechet_distance: singular are {' and '.join(singular)}: there were fewer samples than features, or "
            "features that do not vary. The distance is finite, and too few samples make it too large",
            RuntimeWarning,
            stacklevel=2,
        )
    cross = torch.linalg.svdvals(root1[:, None] * (vectors1.T @ vectors2) * root2).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(0.0, distance.item())  # the distance of a set to itself is rounding, of either sign


def _checked(number: str, mu: object, sigma: object) -> tuple[Tensor, Tensor]:
    """Mean and covariance in float64 on the CPU."""
    found = []
    for name, value, dims in ((f"mu{number}", mu, 1), (f"sigma{number}", sigma, 2)):
        if not isinstance(value, (Tensor, np.ndarray)):
            raise TypeError(f"frechet_distance: {name} must be a tensor or an array, got {type(value).__name__}")
        tensor = torch.as_tensor(value).detach().to("cpu", torch.float64)
        if tensor.ndim != dims:
            expected = "(F,)" if dims == 1 else "(F, F)"
            raise ValueError(f"frechet_distance: {name} must have shape {expected}, got {tuple(tensor.shape)}")
        if not tensor.isfinite().all():
            raise ValueError(f"frechet_distance: {name} must be finite, got {int((~tensor.isfinite()).sum())} not so")
        found.append(tensor)
    mean, covariance = found
    if len(mean) == 0 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"frechet_distance: sigma{number} must have shape (F, F) with the F >= 1 of mu{number}, "
            f"got {tuple(covariance.shape)} and F = {len(mean)}"
        )
    if not torch.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * covariance.abs().max().item()):
        raise ValueError(f"frechet_distance: sigma{number} must be symmetric")
    return mean, (covariance + covariance.T) / 2


def _root(name: str, sigma: Tensor) -> tuple[Tensor, Tensor, str]:
    """r (F,) and V (F, F) of sigma = V diag(r^2) V^T with orthonormal V; its rank in words, or "" where it is full."""
    values, vectors = torch.linalg.eigh(sigma)
    lowest, highest = values[0].item(), values[-1].item()
    if lowest < -_NEGATIVE * abs(highest):
        raise ValueError(f"frechet_distance: {name} must be positive semi-definite, got the eigenvalue {lowest:g}")
    rank = int((values > len(values) * torch.finfo(torch.float64).eps * highest).sum())
    return values.clamp(min=0).sqrt(), vectors, f"{name} (rank {rank} of {len(values)})" if rank < len(values) else ""
