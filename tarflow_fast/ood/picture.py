"""A picture of scores: one histogram a score, sets over one another. Needs matplotlib only at the call."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from tarflow_fast.files import write_atomic
from tarflow_fast.ood.scores import SCORES

_AXES = {
    "likelihood": "bits/dim",
    "typicality": "|bits/dim - mean|",
    "complexity": "bits/dim - compressed bits/dim",
}


def draw_histograms(path: str | Path, sets: dict[str, dict[str, Tensor]]) -> bool:
    """One panel for each of the scores, with a histogram of each set, as a PNG file; whole or not at all.

    sets: the name of a set -> its scores, as `Comparison.own` has them. Heights are shares of images per unit of score.
    Returns False, and draws nothing, without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    names = [name for name in SCORES if all(name in scores for scores in sets.values())]
    figure = Figure(figsize=(4.5 * len(names), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        panel = figure.add_subplot(1, len(names), number + 1, xlabel=_AXES[name], title=name)
        panel.set_yticks([])
        low = min(scores[name].min().item() for scores in sets.values())
        high = max(scores[name].max().item() for scores in sets.values())
        bins = min(60, math.ceil(2 * math.sqrt(max(len(scores[name]) for scores in sets.values()))))
        span = (low, high) if high > low else (low - 0.5, low + 0.5)
        for index, scores in enumerate(sets.values()):
            panel.hist(scores[name].numpy(), bins=bins, range=span, density=True, alpha=0.55, color=f"C{index}")
    handles = [patches[0] for patches in figure.axes[0].containers]
    figure.legend(handles, list(sets), loc="outside upper center", ncols=len(sets))
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return True
