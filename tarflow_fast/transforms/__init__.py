"""Transforms: what the parameters of a net do to a token. One transform, one file."""

from __future__ import annotations

from tarflow_fast.transforms.affine import Affine
from tarflow_fast.transforms.bijection import Bijection
from tarflow_fast.transforms.guidance import Guidance
from tarflow_fast.transforms.shift import Shift

__all__ = ["TRANSFORMS", "Affine", "Bijection", "Guidance", "Shift"]

TRANSFORMS = {transform.name: transform for transform in (Affine(), Shift())}
