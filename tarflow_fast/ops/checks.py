"""Checks of what the user hands over, all in one form: `op: argument must ..., got ...`."""

from collections.abc import Sequence
from typing import Any

import torch

DtypePair = tuple[torch.dtype, torch.dtype]


def check_tensor(op: str, name: str, value: Any) -> None:
    """TypeError unless `value` is a dense tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {value.layout}")


def check_same_device(op: str, name: str, value: torch.Tensor, reference_name: str, reference: torch.Tensor) -> None:
    """ValueError unless both tensors lie on one device."""
    if value.device != reference.device:
        raise ValueError(
            f"{op}: {name} must be on the device of {reference_name}, {reference.device}, got {value.device}"
        )


def check_dtypes(op: str, names: str, dtypes: DtypePair, allowed: Sequence[DtypePair]) -> None:
    """TypeError unless the pair of dtypes is one of `allowed`."""
    if dtypes not in allowed:
        pairs = ", ".join(map(show_dtypes, allowed))
        raise TypeError(f"{op}: {names} must have dtypes {pairs}, got {show_dtypes(dtypes)}")


def check_like(op: str, name: str, value: torch.Tensor, reference_name: str, reference: torch.Tensor) -> None:
    """ValueError unless shape, dtype and device are those of the reference, as a gradient has those of its tensor."""
    expected, got = ((tuple(t.shape), t.dtype, t.device) for t in (reference, value))
    if got != expected:
        raise ValueError(
            f"{op}: {name} must have the shape, dtype and device of {reference_name}, "
            f"{expected[0]}, {expected[1]}, {expected[2]}, got {got[0]}, {got[1]}, {got[2]}"
        )


def check_bool(op: str, name: str, value: Any) -> None:
    """TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")


def show_shape(shape: Sequence[int]) -> str:
    """(2, 5, 6), the same for torch.Size and tuples."""
    return str(tuple(shape))


def show_dtypes(dtypes: DtypePair) -> str:
    """(float32, bfloat16), without the prefix torch."""
    return "(" + ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) + ")"


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_rows(op: str, name: str, value: Any) -> None:
    """A floating tensor (..., N), at least one dimension, N at least 1."""
    check_tensor(op, name, value)
    if value.ndim < 1 or value.shape[-1] < 1:
        raise ValueError(f"{op}: {name} must have shape (..., N) with N >= 1, got {show_shape(value.shape)}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must have a floating dtype, got {value.dtype}")


def check_vector(op: str, name: str, value: Any, rows_name: str, rows: torch.Tensor) -> None:
    """A parameter (N,) for `rows` (..., N), on their device: their dtype, or float32 beside 16-bit rows."""
    check_tensor(op, name, value)
    if value.shape != rows.shape[-1:]:
        raise ValueError(
            f"{op}: {name} must have shape (N,) = {show_shape(rows.shape[-1:])}, got {show_shape(value.shape)}"
        )
    if value.dtype not in dtypes_beside(rows):
        allowed = " or ".join(map(str, dtypes_beside(rows)))
        raise TypeError(f"{op}: {name} must have dtype {allowed}, got {value.dtype}")
    check_same_device(op, name, value, rows_name, rows)


def dtypes_beside(rows: torch.Tensor) -> tuple[torch.dtype, ...]:
    """What may go with `rows`: their own dtype, and float32 beside 16-bit ones."""
    return (rows.dtype,) if rows.dtype.itemsize > 2 else (rows.dtype, torch.float32)
