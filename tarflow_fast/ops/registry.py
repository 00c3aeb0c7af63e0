"""Which backend runs an op: one visible table an op, and the rules that read it.

backend = "auto"    the first backend of the device's list that can run; falling back to a later one warns once
          "torch"   plain PyTorch, any device           "cpu"   the compiled library
          "triton"  Triton kernels, GPU                 "cuda"  compiled CUDA C++, GPU

A backend asked for by name, also through TARFLOW_FAST_BACKEND (read when the argument is "auto"), either runs or raises
with the reason. Only "auto" falls back.
"""

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tarflow_fast import native

__all__ = [
    "BACKENDS",
    "LIBRARY",
    "OPS",
    "Backend",
    "Op",
    "asked_for",
    "choose",
    "constant_when_traced",
    "explain",
    "under_transform",
    "warn_once",
]

BACKENDS = ("auto", "torch", "cpu", "triton", "cuda")

# define / impl rather than custom_op: a fifth of the overhead a call (2.6 against 11.7 us, measured on one CPU).
LIBRARY = torch.library.Library("tarflow_fast", "FRAGMENT")


def asked_for(backend: str) -> str:
    """The backend an argument asks for, "auto" included, which leaves it to the environment."""
    return os.environ.get("TARFLOW_FAST_BACKEND") or "auto" if backend == "auto" else backend


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    missing() says why it cannot run on this machine at all, refuses(device, dtype) why not on such tensors; "" is yes.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    missing: Callable[[], str] = lambda: ""
    refuses: Callable[[torch.device, torch.dtype], str] = lambda device, dtype: ""


@dataclass(frozen=True)
class Op:
    """An op's backends, and for each device type the order in which "auto" tries them (other devices: torch)."""

    name: str
    backends: Mapping[str, Backend]
    auto: Mapping[str, tuple[str, ...]]

    def resolve(self, backend: str, device: torch.device, dtype: torch.dtype) -> Backend:
        """The backend that runs; raises as `resolve_name`."""
        return self.backends[self.resolve_name(backend, device, dtype)]

    def resolve_name(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the backend that runs.

        Raises:
            ValueError: there is no backend of that name.
            RuntimeError: the backend asked for by name cannot run here, on these tensors.
        """
        asked = asked_for(backend)
        if asked not in BACKENDS:
            source = "TARFLOW_FAST_BACKEND" if backend == "auto" else f"{self.name}: backend"
            raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {asked!r}")
        if asked == "auto":
            return self._first_that_runs(device, dtype)
        why_not = self.why_not(asked, device, dtype)
        if why_not:
            raise RuntimeError(f"{self.name}: backend {asked!r} cannot run: {why_not}")
        return asked

    def why_not(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        """Why a backend cannot run on tensors of this device and dtype; "" when it can."""
        if backend not in self.backends:
            return f"{self.name} has no {backend} kernel"
        entry = self.backends[backend]
        return entry.refuses(device, dtype) or entry.missing()

    def _first_that_runs(self, device: torch.device, dtype: torch.dtype) -> str:
        first, *others = self.auto.get(device.type, ("torch",))
        why_not = self.why_not(first, device, dtype)
        if not why_not:
            return first
        if first == "cpu":
            native.check_override()  # an instruction set asked for by name must not end in a quiet fallback
        for name in others:
            if not self.why_not(name, device, dtype):
                warn_once(f"tarflow_fast runs on {name!r} instead of {first!r} ({device.type} tensors): {why_not}")
                return name
        raise RuntimeError(f"{self.name}: no backend runs on {device}: {why_not}")


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Adds an op to those `explain` lists."""
    OPS[op.name] = op
    return op


def explain() -> list[dict[str, Any]]:
    """One row an op and backend: {"op", "backend", "available", "reason"}; the reason says why not."""
    rows = []
    for op in OPS.values():
        for backend in BACKENDS[1:]:
            entry = op.backends.get(backend)
            reason = entry.missing() if entry else f"{op.name} has no {backend} kernel"
            rows.append({"op": op.name, "backend": backend, "available": not reason, "reason": reason})
    return rows


def under_transform() -> bool:
    """Inside vmap, jacrev, jvp or another torch.func transform, or forward-mode AD.

    There the ops take their plain PyTorch form: it can be batched and differentiated to any order, a kernel cannot.
    """
    if torch.compiler.is_compiling():
        return False
    in_functorch = torch._C._functorch.peek_interpreter_stack() is not None
    return in_functorch or torch.autograd.forward_ad._current_level >= 0


def constant_when_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile calls `function`, of constants, once while tracing and keeps the answer.

    The mark that torch.compiler.assume_constant_result makes; calling that would import the compiler, and with it
    triton, into every process. Without the mark the function is traced, which PyTorch warns of but does.
    """
    function._dynamo_marked_constant = True
    return function


def choose(op: Op, backend: str, tensor: torch.Tensor, unable: str = "") -> str:
    """Name of the backend that runs, for ops whose plain PyTorch form is called in place of the op, not inside it.

    That form has PyTorch's own gradients, of any order, and takes less memory than a gradient written out for it. A
    compiled graph keeps what was chosen when it was traced. unable: why the kernels cannot take these shapes, or "".
    """
    if under_transform():
        op.resolve(backend, tensor.device, tensor.dtype)
        return "torch"
    return _choose(op.name, backend, tensor.device, tensor.dtype, unable)


@constant_when_traced
def _choose(name: str, backend: str, device: torch.device, dtype: torch.dtype, unable: str) -> str:
    chosen = OPS[name].resolve_name(backend, device, dtype)
    if chosen == "torch" or not unable:
        return chosen
    if asked_for(backend) == "auto":
        return "torch"
    raise RuntimeError(f"{name}: backend {chosen!r} cannot run: {unable}")


# ---- what the kinds of backend have in common ----------------------------------------------------------------------


def cpu_refuses(device: torch.device, dtype: torch.dtype) -> str:
    """The compiled library reads the memory of the host only."""
    return "" if device.type == "cpu" else f"it needs CPU tensors, got {device}"


@functools.cache
def interpreted() -> bool:
    """Whether Triton kernels are interpreted on the CPU; Triton decides once, when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_missing() -> str:
    """Why Triton kernels cannot run on this machine."""
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken install raises whatever it likes; the reason is what matters
        return f"triton cannot be imported: {error}"
    if interpreted() or torch.cuda.is_available():
        return ""
    return "there is no GPU (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"


def triton_refuses(device: torch.device, dtype: torch.dtype) -> str:
    """The interpreter takes CPU tensors, the compiler GPU tensors."""
    if interpreted():
        return "Triton's interpreter computes bfloat16 wrongly" if dtype is torch.bfloat16 else ""
    if device.type == "cuda":
        return ""
    return f"it needs GPU tensors, or TRITON_INTERPRET=1 for CPU tensors, got {device}"


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
