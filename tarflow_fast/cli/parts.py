"""What `evaluate` and `score` share: which images of a data set are measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tarflow_fast.data import ImageSet


def part_to_measure(whole: ImageSet, holdout: float) -> tuple[ImageSet, ImageSet, str]:
    """(the known images, the measured ones, in words which those are).

    Measured are those that `train --holdout` keeps away; with holdout 0 the set's own test part, or else all, which are
    the known ones too.
    """
    if holdout:
        return *whole.split(holdout), f"held out {holdout:g}"
    if whole.held_out is not None:
        return *whole.split(0.0), "held out"
    return whole, whole, "all"


def note_on_training(record: dict[str, Any], dataset: str, holdout: float) -> str | None:
    """What to tell where a flow was trained on these images with another share held out."""
    trained = record.get("config", {})
    if trained.get("dataset") == dataset and trained.get("holdout", 0.0) != holdout:
        return f"note: the flow was trained with --holdout {trained.get('holdout', 0.0):g} of these images"
    return None
