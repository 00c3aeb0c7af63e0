"""The table of engines: who evaluates the net of a flow block, in what order they are asked, and why one cannot.

"torch"   the net's own modules, any device; differentiable on request                        (engines/torch.py)
"cpu"     the native engine: a whole inverse in a few native calls, fp32, bf16 or int8        (engines/cpu.py)
"triton"  fused kernels of one sampling step, replayed as a CUDA graph                        (engines/triton.py)

The protocol of an engine:

    missing()                   why it cannot run on this machine at all; "" is yes
    refuses(device, dtype)      why not on such tensors
    why_not(bijection, weights, z, call)   why not this block in this call; `weights` are what the one walk found
    open(bijection, z, y, guidance, call, weights) -> passes

and of its passes:

    run(tokens, position) -> parameters    the net on W tokens against the cache of those before
    solve(z, on_token) -> (x, log_det)     its own loop over all tokens, or None: then the solvers use `run`
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tarflow_fast.engines.call import Call, torch_precision
from tarflow_fast.engines.cpu import CpuEngine, CpuPasses
from tarflow_fast.engines.torch import TorchEngine, TorchPasses
from tarflow_fast.engines.triton import TritonEngine, TritonPasses
from tarflow_fast.engines.weights import DTYPES, Weights, inspect
from tarflow_fast.ops.registry import Op, asked_for, register, under_transform, warn_once
from tarflow_fast.transforms import Bijection, Guidance

__all__ = ["TABLE", "Path", "check_precision", "find_path", "open_passes"]

# An entry of the registry like those of the ops, so that `explain` and TARFLOW_FAST_BACKEND treat all alike.
TABLE = register(
    Op(
        "block_inverse",
        {engine.name: engine for engine in (TorchEngine(), CpuEngine(), TritonEngine())},
        auto={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    )
)


class Path(NamedTuple):
    """Which engine evaluates one block in one call.

    engine: its name.  first: the one the table chose for such tensors.  reason: why that one cannot take this block in
    this call, "" when it does; or that "torch" was asked for.  aside: that `first` refuses the block, and not the call
    alone.  weights: what the walk found, for engines that read weights.
    """

    engine: str
    first: str
    reason: str = ""
    aside: bool = False
    weights: Weights | None = None


def find_path(bijection: Bijection, z: Tensor, call: Call, insist: bool = True) -> Path:
    """The path for such arguments; of z only type, dtype, layout and device are looked at.

    insist: whether a backend asked for by name must take the block; else PyTorch may, as for any block that is refused.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend asked for by name cannot run; the reason is named. A frozen model was changed.
    """
    first = TABLE.resolve_name(call.backend, z.device, z.dtype)
    if first == "torch":
        return Path(first, first, "backend 'torch' was asked for" if asked_for(call.backend) == first else "")
    net, reason, aside = bijection.net, _why_not_call(z, call), False
    if not reason:
        frozen = first == "cpu" and call.frozen is not None
        found = call.frozen.weights(net, call.where) if frozen else inspect(net, z.device.type)
        aside = True
        if isinstance(found, Weights):
            reason = TABLE.backends[first].why_not(bijection, found, z, call)
            if not reason:
                return Path(first, first, weights=found)
        else:
            reason = found
    if insist and asked_for(call.backend) == first:
        raise RuntimeError(f"block_inverse: backend {first!r} cannot run: {reason}")
    return Path("torch", first, reason, aside)


def open_passes(
    bijection: Bijection, z: Tensor, y: Tensor | None, guidance: Guidance, call: Call, path: Path | None = None
) -> TorchPasses | CpuPasses | TritonPasses:
    """The passes over one block of the engine that takes it.

    Args:
        bijection: net, transform and order of the block.
        z: (B, T, D) tokens, never written.
        y: (B,) int64 labels, negative for none; or None.
        guidance: weight, what it acts on, temperature, annealing.
        call: backend, precision and memory of the call this block is part of.
        path: what `find_path` gave, if that was asked already.

    Raises:
        RuntimeError: a backend or a precision asked for by name cannot run; the reason is named.
        ValueError: z or y of the wrong shape, y of the wrong dtype or device; guidance of a transform without a rule.
    """
    _check(bijection, z, y)
    guidance.check(bijection.transform)
    path = find_path(bijection, z, call) if path is None else path
    if path.engine == "triton":
        try:
            return TABLE.backends["triton"].open(bijection, z, y, guidance, call, path.weights)
        except MemoryError:  # PyTorch would need no less
            raise
        except Exception as error:  # Triton's compiler and the driver raise what they like
            if asked_for(call.backend) == "triton":
                raise
            check_precision(bijection, z, call, str(error), error)
            warn_once(f"tarflow_fast inverts on 'torch' instead of 'triton' ({z.device.type} tensors): {error}")
    elif path.engine == "torch":
        check_precision(bijection, z, call, path.reason or _why_no_engine(z))
        if path.aside and not call.told:
            call.told = True  # one block is named; the others, for the same reason or another, are in `info.blocks`
            warn_once(
                f"tarflow_fast inverts {call.name_of(bijection.net)} on 'torch' instead of {path.first!r}: "
                f"{path.reason} (tarflow_fast.info.blocks(model) lists every block)"
            )
    else:
        return TABLE.backends[path.engine].open(bijection, z, y, guidance, call, path.weights)
    return TABLE.backends["torch"].open(bijection, z, y, guidance, call)


def _check(bijection: Bijection, z: Tensor, y: Tensor | None) -> None:
    T, D = bijection.net.num_tokens, bijection.net.token_size  # what the engines read, whatever z is
    if z.ndim != 3 or tuple(z.shape[1:]) != (T, D):
        raise ValueError(f"block_inverse: z must have shape (B, {T}, {D}), got {tuple(z.shape)}")
    if y is not None and y.shape != z.shape[:1]:
        raise ValueError(f"block_inverse: y must have shape ({len(z)},), one label a row, got {tuple(y.shape)}")
    if y is not None and (y.dtype != torch.int64 or y.device != z.device):
        raise ValueError(f"block_inverse: y must be int64 on {z.device}, got {y.dtype} on {y.device}")


def _why_not_call(z: Tensor, call: Call) -> str:
    """Why no engine but PyTorch can serve this call, whatever the block; "" when it can."""
    if call.differentiable:
        return "it has no gradient, and a differentiable inverse was asked for"
    if torch.compiler.is_compiling() or under_transform():
        return "it runs neither inside torch.compile nor inside a torch.func transform"
    if type(z) is not Tensor or z.layout != torch.strided or z.dtype not in DTYPES:
        return f"z is a {type(z).__name__} of {z.dtype}"
    return ""


def _why_no_engine(z: Tensor) -> str:
    """Where 'auto' chose PyTorch at once."""
    first = TABLE.auto.get(z.device.type, ("torch",))[0]
    return f"{z.device.type} tensors have none" if first == "torch" else TABLE.why_not(first, z.device, z.dtype)


def check_precision(bijection: Bijection, z: Tensor, call: Call, reason: str, cause: Exception | None = None) -> None:
    """Raise where PyTorch would not compute in the precision asked for; reason: why no engine does."""
    if call.precision not in (None, torch_precision(bijection.net, z)):
        raise RuntimeError(
            f"block_inverse: precision {call.precision!r} needs an engine that computes in it: {reason}"
        ) from cause
