"""The area under the ROC of a score, exact and from ranks, with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Area:
    """value: in [0, 1].  standard_error: of drawing other images; NaN where a set holds a single one."""

    value: float
    standard_error: float


def area_under_roc(own: Tensor, other: Tensor) -> Area:
    """The chance that an image of the other set scores above one of the own set, a tie counting half:

        P(other > own) + P(other = own) / 2        over all pairs (Mann-Whitney's U / (n m))

    1: the score tells all apart; 0.5: it tells nothing; below 0.5: it takes the other set for the own one.
    The standard error is that of DeLong et al. (Biometrics 44, 1988), which assumes no distribution of the scores: the
    variances, over the images of either set, of the share of the other set that lies above or below an image.

    Args:
        own, other: (n,) and (m,) scores, of any dtype; none is NaN.

    Raises:
        TypeError: not tensors.  ValueError: not one-dimensional, empty, or a NaN.
    """
    for name, scores in (("own", own), ("other", other)):
        if not isinstance(scores, Tensor):
            raise TypeError(f"area_under_roc: {name} must be a tensor, got {type(scores).__name__}")
        if scores.ndim != 1 or len(scores) == 0:
            raise ValueError(f"area_under_roc: {name} must have shape (n,) with n > 0, got {tuple(scores.shape)}")
        if scores.isnan().any():
            raise ValueError(f"area_under_roc: {name} must hold no NaN, got {int(scores.isnan().sum())}")
    own, other = own.detach().cpu().double(), other.detach().cpu().double()
    below, above = _share_below(own, other), 1 - _share_below(other, own)
    if len(own) < 2 or len(other) < 2:
        return Area(below.mean().item(), math.nan)
    variance = below.var() / len(other) + above.var() / len(own)
    return Area(below.mean().item(), variance.sqrt().item())


def _share_below(scores: Tensor, of: Tensor) -> Tensor:
    """For each number in `of`: (m,), the share of `scores` below it, an equal one counting half."""
    scores = scores.sort().values
    left, right = torch.searchsorted(scores, of), torch.searchsorted(scores, of, right=True)
    return (left + right).double() / (2 * len(scores))
