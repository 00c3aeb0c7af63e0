"""The compiled CUDA library, loaded with ctypes. Every C function of csrc/tarflow_cuda.h is declared here, once.

The library is loaded at its first use, and `missing()` says why it cannot be used. Kernels run on the current stream of
the tensors' GPU, so that they may be captured in a CUDA graph.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from tarflow_fast import native

__all__ = ["FAILED", "call", "library", "missing", "refuses"]

ABI_VERSION = 2
LIBRARY = Path(__file__).parent / "_tarflow_cuda.so"
FAILED = 1000  # of enum tf_cuda_status: from here on a status is what CUDA said, plus this

_void, _int, _long, _str = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_char_p
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # name: (result, arguments)
    "tf_cuda_abi_version": (_int, []),
    "tf_cuda_error": (_str, [_int]),
    "tf_cuda_affine_scratch": (_long, [_long] * 3),
    "tf_cuda_affine_forward": (_int, [_void] * 5 + [_long] * 3 + [_int] * 4 + [_void]),
    "tf_cuda_affine_backward": (_int, [_void] * 6 + [_long] * 3 + [_int] * 4 + [_void]),
    "tf_cuda_affine_inverse": (_int, [_void] * 7 + [_long] * 3 + [_int] * 3 + [_void]),
}


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        NativeUnavailable: the library was not built, does not load, or is of another version.
    """
    loaded = _load()
    if isinstance(loaded, Exception):
        raise type(loaded)(*loaded.args)
    return loaded


def missing() -> str:
    """Why CUDA C++ kernels cannot run on this machine, or "" where they can."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    loaded = _load()
    return str(loaded) if isinstance(loaded, Exception) else ""


def refuses(device: torch.device, dtype: torch.dtype) -> str:
    """Why the library cannot take such tensors, or "" where it can: it reads the memory of a GPU only."""
    return "" if device.type == "cuda" else f"it needs GPU tensors, got {device}"


def call(name: str, like: torch.Tensor, *arguments: Any) -> None:
    """Calls a C function on the device and current stream of `like`. Tensors among the arguments become pointers.

    Raises:
        RuntimeError: the function refused, or CUDA did.
    """
    plain = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    with torch.cuda.device(like.device):
        status = getattr(library(), name)(*plain, torch.cuda.current_stream(like.device).cuda_stream)
    if status >= FAILED:
        raise RuntimeError(f"{name}: {library().tf_cuda_error(status).decode()}")
    if status:
        raise RuntimeError(f"{name}: failed with status {status}")


@functools.cache
def _load() -> ctypes.CDLL | Exception:
    if not LIBRARY.exists():
        error = native.build_report().get("cuda", {}).get("error")
        why = error or "reinstall with nvcc at hand"
        return native.NativeUnavailable(f"the CUDA library was not built: {why}")
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        version = loaded.tf_cuda_abi_version()
        if version != ABI_VERSION:
            return native.NativeUnavailable(
                f"the CUDA library is of another version (ABI {version}, expected {ABI_VERSION}): reinstall it"
            )
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return native.NativeUnavailable(f"the CUDA library does not load: {error}")
    return loaded
