"""Transforms: what the parameters of a net do to a token. One transform, one file."""

from __future__ import annotations

from tarflow_fast.transforms.affine import Affine
from tarflow_fast.transforms.bijection import Bijection
from tarflow_fast.transforms.guidance import Guidance
from tarflow_fast.transforms.logistic_mixture import LogisticMixture
from tarflow_fast.transforms.named import Transform, find_transform, settle_transform
from tarflow_fast.transforms.shift import Shift
from tarflow_fast.transforms.spline import Spline

__all__ = [
    "Affine",
    "Bijection",
    "Guidance",
    "LogisticMixture",
    "Shift",
    "Spline",
    "Transform",
    "find_transform",
    "settle_transform",
]
