"""block_inverse: the inverse of a whole flow block, all tokens and layers (arXiv 2412.06329, section 2.1).

    x[p(0)] = z[p(0)];   x[p(i+1)] = z[p(i+1)] * exp(a_i) + b_i;   log_det = sum_{i < T-1, d} a_i[d]
    (a_i, b_i) = net(x[p(0)] .. x[p(i)]),   guided: a_c + g_i (a_c - a_u), b likewise (tarflow_fast/inverse/guidance.py)

p(i) = i, or T-1-i when the block is flipped. The last token needs no pass of the net.

backend "torch"  one token after another through the block's own modules, any device; differentiable on request
        "cpu"    the native engine: all of it in a few native calls, fp32, bf16 or int8 (tarflow_fast/inverse/engine.py)
        "triton" fused kernels of one sampling step, replayed as a CUDA graph (tarflow_fast/inverse/graph.py)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tarflow_fast import native
from tarflow_fast.inverse.eligibility import DTYPES, Weights, inspect
from tarflow_fast.inverse.graph import invert_graph, prepare_graph, why_not_graph
from tarflow_fast.inverse.guidance import Guidance
from tarflow_fast.inverse.sequential import invert_sequential
from tarflow_fast.inverse.workspace import InverseCall
from tarflow_fast.ops.registry import (
    Backend,
    Op,
    asked_for,
    cpu_refuses,
    register,
    triton_missing,
    triton_refuses,
    under_transform,
    warn_once,
)

if TYPE_CHECKING:
    from tarflow_fast.block import MetaBlock

__all__ = ["InversePath", "block_inverse", "find_path"]

OnToken = Callable[[], None] | None


def block_inverse(
    block: MetaBlock, z: Tensor, y: Tensor | None, guidance: Guidance, call: InverseCall, on_token: OnToken = None
) -> tuple[Tensor, Tensor]:
    """Invert `block` at z.

    Args:
        block: the flow block.
        z: (B, T, D) noise, never written.
        y: (B,) int64 labels, negative for none; or None.
        guidance: weight, what it acts on, temperature, annealing.
        call: backend, precision and memory of the inverse call this block is part of.
        on_token: called once for every token solved.

    Returns:
        x: (B, T, D) in z's dtype. log_det: (B,) nats, the sum of a, float32 (float64 for a float64 block).

    Raises:
        RuntimeError: a backend or a precision asked for by name cannot run; the reason is named.
        ValueError: z or y of the wrong shape, y of the wrong dtype or device; weights that are not finite, labels not
            below num_classes (native engine), sizes that overflow.
        MemoryError: one row alone needs more than the memory limit.
    """
    T, D = block.pos_embed.size(0), block.proj_in.in_features  # what the engines read, whatever z is
    if z.ndim != 3 or tuple(z.shape[1:]) != (T, D):
        raise ValueError(f"block_inverse: z must have shape (B, {T}, {D}), got {tuple(z.shape)}")
    if y is not None and y.shape != z.shape[:1]:
        raise ValueError(f"block_inverse: y must have shape ({len(z)},), one label a row, got {tuple(y.shape)}")
    if y is not None and (y.dtype != torch.int64 or y.device != z.device):
        raise ValueError(f"block_inverse: y must be int64 on {z.device}, got {y.dtype} on {y.device}")
    path = _path_in_call(block, z, call)
    if path.backend == "cpu":
        return _invert_cpu(block, z, y, guidance, call, on_token, path.weights)
    if path.backend == "triton":
        try:
            call.graph = prepare_graph(block, z, guidance, call.graph, call.precision, call.memory_limit)
        except MemoryError:  # PyTorch would need no less
            raise
        except Exception as error:  # Triton's compiler and the driver raise what they like
            if asked_for(call.backend) == "triton":
                raise
            _check_precision(block, z, call, str(error), error)
            warn_once(f"tarflow_fast inverts on 'torch' instead of 'triton' ({z.device.type} tensors): {error}")
        else:
            return _invert_triton(block, z, y, guidance, call, on_token)
    _check_precision(block, z, call, path.reason or _why_no_engine(z))
    if path.aside and not call.told:
        call.told = True  # one block is named; the others, for the same reason or another, are in `info.blocks`
        warn_once(
            f"tarflow_fast inverts {call.name_of(block)} on 'torch' instead of {path.first!r}: {path.reason} "
            "(tarflow_fast.info.blocks(model) lists every block)"
        )
    return _invert_torch(block, z, y, guidance, call, on_token)


def _path_in_call(block: MetaBlock, z: Tensor, call: InverseCall) -> InversePath:
    """`find_path`, for all blocks of the call when its first one comes, in the order a model inverts.

    Between inversions, which leave none of Python's code in the caches, each look took longer (four blocks of four
    layers of C 128, one row: a call of 3.6 ms, so 3.2). What a block's own modules may have changed is looked at again.
    """
    if call.paths is None:
        call.paths = {id(each): find_path(each, z, call) for each in reversed(call.blocks)}
    path = call.paths.pop(id(block), None) or find_path(block, z, call)
    if path.backend == "torch":
        call.paths.clear()  # modules run, with whatever hooks they have
    return path


class InversePath(NamedTuple):
    """How one block is inverted in one call.

    backend: "torch", "cpu" or "triton".  first: the backend the op's table chose, and reason: why it cannot take this
    block in this call, "" when it does; or that "torch" was asked for.  aside: that it was the block, looked at for
    this call (its precision, say), which `first` would not take, and not the call alone.  weights: for the engine.
    """

    backend: str
    first: str
    reason: str = ""
    aside: bool = False
    weights: Weights | None = None


def find_path(block: MetaBlock, z: Tensor, call: InverseCall) -> InversePath:
    """The path `block_inverse` takes for such arguments; of z only type, dtype, layout and device are looked at.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend asked for by name cannot run; the reason is named. A frozen model was changed.
    """
    first = _OP.resolve_name(call.backend, z.device, z.dtype)
    if first == "torch":
        return InversePath(first, first, "backend 'torch' was asked for" if asked_for(call.backend) == first else "")
    objection = call_reason(z, call)
    if not objection:
        if first == "cpu":
            found = inspect(block) if call.frozen is None else call.frozen.weights(block, call.where)
        else:
            found = why_not_graph(block, z, call.precision)
        if isinstance(found, Weights):
            return InversePath(first, first, weights=found)
        if not found:
            return InversePath(first, first)
    reason = objection or found
    if asked_for(call.backend) == first:
        raise RuntimeError(f"block_inverse: backend {first!r} cannot run: {reason}")
    return InversePath("torch", first, reason, aside=not objection)


def call_reason(z: Tensor, call: InverseCall) -> str:
    """Why no engine can serve this call, whatever the block; "" when it can."""
    if call.differentiable:
        return "it has no gradient, and a differentiable inverse was asked for"
    if torch.compiler.is_compiling() or under_transform():
        return "it runs neither inside torch.compile nor inside a torch.func transform"
    if type(z) is not Tensor or z.layout != torch.strided or z.dtype not in DTYPES:
        return f"z is a {type(z).__name__} of {z.dtype}"
    return ""


def _torch_precision(block: MetaBlock, z: Tensor) -> str:
    """What PyTorch computes in by itself: float32 and wider count as fp32."""
    if torch.is_autocast_enabled(z.device.type):
        return "bf16" if torch.get_autocast_dtype(z.device.type) == torch.bfloat16 else "fp16"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(block.pos_embed.dtype, "fp32")


def _why_no_engine(z: Tensor) -> str:
    """Where 'auto' chose PyTorch at once."""
    first = _OP.auto.get(z.device.type, ("torch",))[0]
    return f"{z.device.type} tensors have none" if first == "torch" else _OP.why_not(first, z.device, z.dtype)


def _check_precision(
    block: MetaBlock, z: Tensor, call: InverseCall, reason: str, cause: Exception | None = None
) -> None:
    """Raise where PyTorch would not compute in the precision asked for; reason: why no engine does."""
    if call.precision not in (None, _torch_precision(block, z)):
        raise RuntimeError(
            f"block_inverse: precision {call.precision!r} needs an engine that computes in it: {reason}"
        ) from cause


def _invert_torch(
    block: MetaBlock, z: Tensor, y: Tensor | None, guidance: Guidance, call: InverseCall, on_token: OnToken
) -> tuple[Tensor, Tensor]:
    return invert_sequential(block, z, y, guidance, call.kv_cache(block, z), on_token)


def _invert_cpu(
    block: MetaBlock,
    z: Tensor,
    y: Tensor | None,
    guidance: Guidance,
    call: InverseCall,
    on_token: OnToken,
    weights: Weights,
) -> tuple[Tensor, Tensor]:
    # half precision has no kernels here: its weights are exact in float32
    own = "bf16" if _torch_precision(block, z) == "bf16" else "fp32"
    return call.engine(call.precision or own).invert(block, z, y, guidance, on_token, weights)


def _invert_triton(
    block: MetaBlock, z: Tensor, y: Tensor | None, guidance: Guidance, call: InverseCall, on_token: OnToken
) -> tuple[Tensor, Tensor]:
    return invert_graph(block, z, y, guidance, call.graph, on_token)


_OP = register(
    Op(
        "block_inverse",
        {
            "torch": Backend(_invert_torch),
            "cpu": Backend(_invert_cpu, None, native.reason, cpu_refuses),
            "triton": Backend(_invert_triton, None, triton_missing, triton_refuses),
        },
        auto={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    )
)
