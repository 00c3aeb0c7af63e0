"""Which images are foreign to a flow: scores of single images, and how well each score tells two sets apart.

Likelihood alone does not detect foreign images: a flow may give simple ones, which it has never seen, more likelihood
than its own (Nalisnick et al., arXiv 1810.09136). Every score here is larger for images that look more foreign.
"""

from __future__ import annotations

from tarflow_fast.ood.area import Area, area_under_roc
from tarflow_fast.ood.picture import draw_histograms
from tarflow_fast.ood.scores import SCORES, Comparison, check_levels, compare, complexity, compressed_bits, typicality

__all__ = [
    "SCORES",
    "Area",
    "Comparison",
    "area_under_roc",
    "check_levels",
    "compare",
    "complexity",
    "compressed_bits",
    "draw_histograms",
    "typicality",
]
