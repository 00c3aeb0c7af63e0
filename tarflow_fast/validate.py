"""Checks of what users hand to the model: each raises before anything is touched, naming argument, expected, got."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def quiet_stream(tensor: Tensor) -> bool:
    """Whether values may be read back to the host: not while torch.compile traces, a CUDA graph is captured, or
    torch.func.vmap runs, where a tensor stands for many."""
    if torch.compiler.is_compiling() or tensor.is_meta or _under_vmap(tensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _under_vmap(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):  # one layer a transform
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def check_positive_int(where: str, name: str, value: object, minimum: int = 1) -> int:
    """An int of Python's or NumPy's (not bool) of at least `minimum`, as an int."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{where}: {name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{where}: {name} must be >= {minimum}, got {value}")
    return int(value)


def check_number(where: str, name: str, value: object) -> float:
    """A real number of Python's or NumPy's (not bool), as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where}: {name} must be a number, got {type(value).__name__}")
    return float(value)


def seeded(where: str, seed: object) -> torch.Generator:
    """A CPU generator of this seed, an int in [0, 2**63)."""
    if check_positive_int(where, "seed", seed, 0) >= 2**63:
        raise ValueError(f"{where}: seed must be below 2**63, got {seed}")
    return torch.Generator().manual_seed(int(seed))


def find_device(where: str, name: str, index: int = 0) -> torch.device:
    """The device of this name; "auto" is GPU number `index`, or the CPU where there is none.

    Raises ValueError for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{where}: device must be auto, cpu, cuda or cuda:<number>, got {name!r}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"{where}: device {name!r} was asked for, and torch {torch.__version__} sees no GPU")
        device = torch.device("cuda", index if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"{where}: device {device} was asked for, and there are {torch.cuda.device_count()} GPUs")
    return device


def check_tensor(
    where: str, name: str, value: object, shape: tuple[int | str, ...], like: Tensor, scaled: bool = False
) -> Tensor:
    """A dense floating tensor of `shape` (strings stand for any size), on the device and in the dtype of `like`.

    Under autocast any of float32, bfloat16 and float16 will do, since the layers cast for themselves, but they leave
    float64 as it is: both are float64, or neither. scaled: values meet `like` before any layer, which may widen them.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a torch.Tensor, got {type(value).__name__}")
    matches = value.ndim == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    if not matches:
        expected = "(" + ", ".join(str(size) for size in shape) + ")"
        raise ValueError(f"{where}: {name} must have shape {expected}, got {tuple(value.shape)}")
    if value.layout != torch.strided:
        raise TypeError(f"{where}: {name} must be a dense (strided) tensor, got {value.layout}")
    if value.device != like.device:
        raise ValueError(f"{where}: {name} must be on the model's device {like.device}, got {value.device}")
    if value.dtype != like.dtype and not (value.is_floating_point() and _autocast_casts(value, like, scaled)):
        raise TypeError(f"{where}: {name} must have the model's dtype {like.dtype}, got {value.dtype}")
    return value


def _autocast_casts(value: Tensor, like: Tensor, scaled: bool) -> bool:
    return (
        torch.is_autocast_enabled(value.device.type)
        and value.dtype != torch.float64
        and (scaled or like.dtype != torch.float64)
    )


def check_labels(where: str, y: object, B: int, num_classes: int, like: Tensor) -> Tensor | None:
    """Labels (B,) of any integer dtype on the model's device, below num_classes (negative: no label), as int64; or an
    int, one label for all.

    None stays None, and an unconditional model (num_classes = 0) takes no notice of labels, as in the original.
    Raises TypeError for what is neither, ValueError for labels of another dtype, length, device or range.
    """
    if y is None or num_classes == 0:
        return None
    if isinstance(y, numbers.Integral) and not isinstance(y, bool):
        if y >= num_classes:
            raise ValueError(f"{where}: y must be below num_classes = {num_classes} (negative: no label), got {y}")
        return torch.full((B,), max(int(y), -1), dtype=torch.int64, device=like.device)
    if not isinstance(y, Tensor):
        raise TypeError(f"{where}: y must be an integer torch.Tensor of shape ({B},), got {type(y).__name__}")
    if y.dtype not in _INTEGERS:
        raise ValueError(f"{where}: y must have an integer dtype, got {y.dtype}")
    if y.shape != (B,):
        raise ValueError(f"{where}: y must have shape ({B},), one label a row, got {tuple(y.shape)}")
    if y.device != like.device:
        raise ValueError(f"{where}: y must be on the model's device {like.device}, got {y.device}")
    if B and quiet_stream(y) and int(y.max()) >= num_classes:
        raise ValueError(
            f"{where}: y must be below num_classes = {num_classes} (negative: no label), got {int(y.max())}"
        )
    return y.long()
