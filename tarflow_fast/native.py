"""The compiled CPU library: found, checked, loaded with ctypes, and every C function of csrc/tarflow.h declared once.

Nothing is loaded before the first use, and nothing here fails at import: `available()` and `reason()` tell how things
stand, `library()` raises when the library cannot be used.

Environment: TARFLOW_CPU_ISA chooses the instruction set by name instead of the best one this machine runs.
"""

import ctypes
import functools
import json
import os
from pathlib import Path
from typing import Any

import torch  # before the library: the two then share torch's copy of libgomp, hence one thread pool

__all__ = ["DTYPES", "NativeUnavailable", "available", "build_report", "check", "check_override"]
__all__ += ["isa", "isas", "library", "pointer", "reason", "threads"]

ABI_VERSION = 7
LIBRARY = Path(__file__).parent / "_tarflow_cpu.so"
REPORT = Path(__file__).parent / "build_report.json"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # enum tf_dtype
NO_MEMORY, ISA_UNKNOWN, ISA_UNSUPPORTED = 2, 3, 4  # enum tf_status

_void, _int, _long, _str = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_char_p
_double = ctypes.c_double
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # name: (result, arguments)
    "tf_abi_version": (_int, []),
    "tf_built_isas": (_str, []),
    "tf_select_isa": (_int, [_str]),
    "tf_isa": (_str, []),
    "tf_has_openmp": (_int, []),
    "tf_affine_forward": (_int, [_void] * 4 + [_long] * 3 + [_int] * 5),
    "tf_affine_backward": (_int, [_void] * 6 + [_long] * 3 + [_int] * 5),
    "tf_peak_read": (_double, [_void, _long, _int]),
    "tf_peak_flops": (_double, [_int, _long, _int]),
    "tf_test_exp": (None, [_void, _void, _long]),
    "tf_test_round": (_int, [_void, _void, _long, _int]),
    "tf_test_gelu": (None, [_void, _void, _long]),
    "tf_test_matmul": (_int, [_void, _void, _void, _void, _long, _long, _long, _int]),
    "tf_plan_bytes": (_long, [_void]),
    "tf_plan_create": (_int, [_void, _void]),
    "tf_plan_pack": (_int, [_void, _void, _int, _int, _void]),
    "tf_plan_rest": (_int, [_void]),
    "tf_plan_destroy": (None, [_void]),
    "tf_workspace_bytes": (_long, [_void, _long, _long, _int]),
    "tf_workspace_create": (_int, [_void, _long, _long, _int, _void]),
    "tf_workspace_rest": (_int, [_void]),
    "tf_workspace_destroy": (None, [_void]),
    "tf_invert": (_int, [_void, _void, _void, _void, _double, _int]),
    "tf_made_numbers": (_long, [_void]),
    "tf_made_pack": (_int, [_void, _void, _int]),
    "tf_made_invert": (_int, [_void, _void, _void, _int]),
    "tf_pass": (_int, [_void, _void, _void, _int]),
    "tf_invert_windows": (_int, [_void, _void, _void, _void, _double, _int]),
}


class NativeUnavailable(RuntimeError):
    """The native library cannot be used; the message says why."""


def library() -> ctypes.CDLL:
    """The loaded library, its instruction set chosen.

    Raises:
        NativeUnavailable: it was not built, does not load, or is of another version.
        ValueError: TARFLOW_CPU_ISA names no instruction set of this build.
        RuntimeError: TARFLOW_CPU_ISA names one that this machine cannot run.
    """
    loaded = _load()
    if isinstance(loaded, Exception):
        # A fresh one each time: re-raising the kept one would chain the tracebacks of all callers.
        raise type(loaded)(*loaded.args)
    return loaded


def available() -> bool:
    """Whether the native library can be used here and now."""
    return not isinstance(_load(), Exception)


def reason() -> str:
    """Why the native library cannot be used; empty when it can."""
    loaded = _load()
    return str(loaded) if isinstance(loaded, Exception) else ""


def check_override() -> None:
    """Raises if TARFLOW_CPU_ISA asks for an instruction set that cannot be had."""
    if os.environ.get("TARFLOW_CPU_ISA") and not isinstance(_load(), NativeUnavailable):
        library()


def isa() -> str | None:
    """The instruction set in use, one of `isas()`; None without the library."""
    loaded = _load()
    return None if isinstance(loaded, Exception) else loaded.tf_isa().decode()


def isas() -> list[str]:
    """The instruction sets in the library, slowest first."""
    loaded = _load()
    return [] if isinstance(loaded, Exception) else loaded.tf_built_isas().decode().split(",")


@functools.cache
def cpuinfo(key: str) -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.split(":")[0].strip() == key), "")
    except OSError:
        return ""


def threads() -> int:
    """How many threads a native call may use: torch's own number."""
    return torch.get_num_threads()


def pointer(tensor: torch.Tensor | None) -> int | None:
    """The address a C function takes: of a contiguous CPU tensor, NULL for None."""
    return None if tensor is None else tensor.data_ptr()


def check(status: int, name: str) -> None:
    """Raises what a nonzero status of C function `name` means."""
    if status == NO_MEMORY:
        raise MemoryError(f"{name}: not enough memory for its scratch buffers")
    if status != 0:
        raise RuntimeError(f"{name}: failed with status {status}")


def build_report() -> dict[str, Any]:
    """What the build wrote down: compiler, version, flags, instruction sets, error. Empty if nothing was ever built."""
    try:
        return json.loads(REPORT.read_text())
    except (OSError, ValueError):
        return {}


@functools.cache
def _load() -> ctypes.CDLL | Exception:
    if not LIBRARY.exists():
        error = build_report().get("error")
        why = f"its build failed: {error}" if error else "it was not built (reinstall with a C++17 compiler at hand)"
        return NativeUnavailable(f"the native CPU library is missing: {why}")
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        loaded.tf_abi_version.restype = _int
        version = loaded.tf_abi_version()
    except (OSError, AttributeError) as error:
        return NativeUnavailable(f"the native CPU library does not load: {error}")
    if version != ABI_VERSION:
        return NativeUnavailable(
            f"the native CPU library is of another version (ABI {version}, expected {ABI_VERSION}): reinstall it"
        )
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return _select_isa(loaded, os.environ.get("TARFLOW_CPU_ISA") or None)


def _select_isa(loaded: ctypes.CDLL, name: str | None) -> ctypes.CDLL | Exception:
    status = loaded.tf_select_isa(name.encode() if name else None)
    built = loaded.tf_built_isas().decode().replace(",", ", ")
    if status == ISA_UNKNOWN:
        return ValueError(f"TARFLOW_CPU_ISA: expected one of {built}, got {name!r}")
    if status == ISA_UNSUPPORTED:
        return RuntimeError(f"TARFLOW_CPU_ISA: this machine cannot run {name!r} (built: {built})")
    return loaded
