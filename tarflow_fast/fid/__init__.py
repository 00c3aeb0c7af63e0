"""The Fréchet inception distance (FID): how far a flow's samples lie from images, as features of a network see both.

FID = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))    of the means mu and covariances S of features (arXiv 1706.08500)

Any network may stand in for Inception: what takes (B, 3, H, W) uint8 and gives (B, F).
"""

from __future__ import annotations

from tarflow_fast.fid.distance import frechet_distance
from tarflow_fast.fid.inception import inception_features
from tarflow_fast.fid.measure import Features, Fid, fid, image_statistics
from tarflow_fast.fid.statistics import Statistics, holds_statistics, load_statistics, save_statistics

__all__ = [
    "Features",
    "Fid",
    "Statistics",
    "fid",
    "frechet_distance",
    "holds_statistics",
    "image_statistics",
    "inception_features",
    "load_statistics",
    "save_statistics",
]
