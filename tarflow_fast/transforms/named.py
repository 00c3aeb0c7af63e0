"""The transforms by their names, with their sizes: "affine", "logistic_mixture", "logistic_mixture:4", "spline"."""

from __future__ import annotations

from tarflow_fast.transforms.affine import Affine
from tarflow_fast.transforms.logistic_mixture import LogisticMixture
from tarflow_fast.transforms.shift import Shift
from tarflow_fast.transforms.spline import Spline

__all__ = ["KINDS", "Transform", "find_transform", "settle_transform"]

Transform = Affine | Shift | LogisticMixture | Spline
KINDS = {kind.name: kind for kind in (Affine, Shift, LogisticMixture, Spline)}


def find_transform(where: str, transform: object) -> Transform:
    """The transform that a name, with sizes after colons where they are not the usual ones, or an object stands for.

    str(find_transform(where, name)) is the full name, which gives the same transform again.

    Raises:
        TypeError: it is neither a string nor a transform.
        ValueError: there is none of that name, or the sizes are not what it takes.
    """
    if isinstance(transform, tuple(KINDS.values())):
        return transform
    expected = f"one of {', '.join(KINDS)}, its sizes after colons"
    if not isinstance(transform, str):
        raise TypeError(
            f"{where}: transform must be a transform or a string, {expected}, got {type(transform).__name__}"
        )
    name, *sizes = transform.split(":")
    try:
        return KINDS[name](*(int(size) if size.isascii() and size.isdigit() else float(size) for size in sizes))
    except (KeyError, TypeError, ValueError) as error:
        reason = "" if isinstance(error, KeyError) else f" ({error})"
        raise ValueError(f"{where}: transform must be {expected}, got {transform!r}{reason}") from error


def settle_transform(where: str, transform: object, nvp: bool) -> tuple[str | None, bool]:
    """The full name and nvp as a configuration keeps them: None where nvp tells the transform, True for affine and
    False for shift, so that the configuration of such a flow is what it always was.

    Raises:
        TypeError, ValueError: as `find_transform`; nvp is False, and the transform another than the shift.
    """
    if transform is None:
        return None, bool(nvp)
    found = find_transform(where, transform)
    if isinstance(found, Shift):
        return None, False
    if not nvp:
        raise ValueError(f"{where}: transform must be shift where nvp is False, got {str(found)!r}")
    return None if isinstance(found, Affine) else str(found), True
