"""Which path inverts a transform in one call: the C++ engine, the sweep in PyTorch, or the library's own code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tarflow_fast import native
from tarflow_fast.made.engine import Plan, glance, why_not
from tarflow_fast.made.net import Made, Unknown
from tarflow_fast.made.schedule import Schedule, masks_of
from tarflow_fast.made.sweep import sweep

__all__ = ["PATHS", "Refusal", "State", "invert", "path_of"]

PATHS = ("auto", "cpu", "torch")
DTYPES = (torch.float32, torch.float64)
PART_NUMBERS = 1 << 25  # of what one part of the rows needs beside its results: 128 MiB in float32


class Refusal(str):
    """Why the library's code runs in this call, where `explain` would name another path: the user is told once."""


@dataclass(eq=False)
class State:
    """What is kept of one transform beside it: nothing here decides a result.

    path: the one that was asked for, of PATHS.
    """

    read: Callable[[nn.Module], Made]
    path: str = "auto"
    frozen: bool = False
    warned: set[str] = field(default_factory=set)  # why calls went to the library, each told once
    # Of the last call: the form, the masks in the library's own type, a glance at each, and the schedule made of them.
    # They are written at once, so that another thread never finds the masks of one call with the schedule of another.
    _last: tuple[tuple, list[Tensor], list[tuple], Schedule | Unknown] | None = None
    _plan: Plan | None = None

    def schedule(self, made: Made) -> Schedule:
        """Of the masks as they are now. It is made again when they, or the form of the transform, have changed.

        Raises:
            Unknown: they are not autoregressive.
        """
        form, masks = made.form(), [layer.mask() for layer in made.layers]
        glances, last = [glance(mask) for mask in masks], self._last
        same = last is not None and last[0] == form
        same = same and ((self.frozen and glances == last[2]) or all(map(_equal, masks, last[1])))
        if same:  # where it is frozen, the promise is for masks, too
            _, masks, _, schedule = last
        else:
            masks = [mask.detach().clone() for mask in masks]
            try:
                schedule = Schedule.of(made, masks_of(made.layers, made.features))
            except Unknown as reason:
                schedule = reason
        self._last = form, masks, glances, schedule
        if isinstance(schedule, Unknown):
            raise Unknown(*schedule.args)
        return schedule

    def plan(self, made: Made, schedule: Schedule, dtype: torch.dtype) -> Plan:
        """The plan of the engine for this schedule, made again where the one at hand is of another."""
        plan = self._plan
        if plan is None or plan.schedule is not schedule or plan.dtype is not dtype:
            plan = self._plan = Plan(made, schedule, dtype)
        return plan

    def set_frozen(self, frozen: bool) -> None:
        """Keep the packed weights from the next call on, or let go of them."""
        self.frozen, self._plan = frozen, None


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype is not b.dtype or a.device != b.device:
        return False
    whole = all(each.is_contiguous() and each.nbytes % 8 == 0 for each in (a, b))
    if whole and not a.storage_offset() * a.itemsize % 8:  # eight bytes at a time: 9 times as fast
        a, b = a.view(-1).view(torch.int64), b.view(-1).view(torch.int64)
    return torch.equal(a, b)


def path_of(module: nn.Module, state: State) -> tuple[str, str, tuple[Made, Schedule] | None]:
    """ "cpu", "torch" or "library", why it is no better one, and the transform as it was read, with its schedule.

    This is what the transform alone decides. A call may still be one for the library (`invert`).
    """
    try:
        made = state.read(module)
        weight = made.layers[0].weight()
        if weight.is_meta:
            return "library", "weights on the meta device", None
        read = made, state.schedule(made)
    except Unknown as reason:
        return "library", str(reason), None
    if any(
        each.dtype is not weight.dtype or each.device != weight.device for each in (*made.parameters, *made.statistics)
    ):
        return "library", "weights of several types or devices", read
    if weight.dtype not in DTYPES:
        return "library", f"weights of {weight.dtype}", read
    if weight.device.type != "cpu":
        return "torch", f"on {weight.device.type}", read
    if state.path == "torch":
        return "torch", "asked for", read
    if not native.available():
        return "torch", native.reason(), read
    if reason := why_not(made):
        return "torch", reason, read
    return "cpu", "", read


def invert(module: nn.Module, state: State, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor] | str:
    """The inverse x of y (..., D), and log |det dx/dy| (...); or why the library's own code has to compute it.

    context: (E,) or (..., E), which broadcasts with y.
    """
    if refusal := _surroundings(y, context):
        return refusal
    path, reason, read = path_of(module, state)
    if read is None or path == "library":
        return reason
    made, schedule = read
    if refusal := _refuses(made, y, context):
        return Refusal(refusal)
    with torch.no_grad():
        if made.univariate.check is not None:
            try:
                made.univariate.check(y)
            except Unknown as reason:
                return str(reason)
        y, context, shape = _rows(y, context)
        x, log_det = torch.empty_like(y), y.new_empty(y.size(0))
        plan = state.plan(made, schedule, y.dtype) if path == "cpu" else None
        rows = max(PART_NUMBERS // sum(map(len, schedule.places)), 256)
        for first in range(0, y.size(0), rows):
            part = slice(first, first + rows)
            own = context if context is None or context.size(0) == 1 else context[part]
            if plan is None:
                x[part], log_det[part] = sweep(made, schedule, y[part], own)
                continue
            try:
                x[part], log_det[part] = plan.invert(made, y[part], own, keep=state.frozen)
            except Unknown as reason:
                return str(reason)
    return x.reshape(*shape, made.features), log_det.reshape(shape)


def _surroundings(y: Tensor, context: Tensor | None) -> str:
    """Why a call cannot read numbers from memory, or would lose what others derive from them; "" where it can.

    Noise, context and weights can each be the one that torch.func or forward-mode AD follows, and the weights are not
    known here yet: what tells is that such a transform is active.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "under torch.compile or torch.jit.trace"
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0:
        return "under torch.func or forward-mode AD"
    if not all(type(each) in (Tensor, nn.Parameter) for each in ((y,) if context is None else (y, context))):
        return "noise or context that is no plain tensor"
    return ""


def _refuses(made: Made, y: Tensor, context: Tensor | None) -> str:
    tensors: Sequence[Tensor] = (y,) if context is None else (y, context)
    weight = made.layers[0].weight()
    if torch.is_grad_enabled() and any(each.requires_grad for each in (*tensors, *made.parameters)):
        return "a gradient is asked for (torch.no_grad() says that none is)"
    if torch.is_autocast_enabled(y.device.type):
        return "under autocast"
    if any(each.dtype is not weight.dtype or each.device != weight.device for each in tensors):
        return "noise or context of another dtype or device than the weights"
    if any(each.layout is not torch.strided for each in tensors):
        return "noise or context that is not dense"
    if (context is not None) != bool(made.context):
        return "a context, and a net that takes none" if context is not None else "no context, and a net that takes one"
    if y.dim() < 1 or y.size(-1) != made.features:
        return f"noise of shape {tuple(y.shape)} for {made.features} features"
    if context is not None and (context.dim() < 1 or context.size(-1) != made.context):
        return f"a context of shape {tuple(context.shape)} for {made.context} numbers"
    return ""


def _rows(y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None, torch.Size]:
    """y as (B, D), the context as (B, E), or as (1, E) where all rows share it, and the shape of the batch."""
    if context is None:
        return y.reshape(-1, y.size(-1)), None, y.shape[:-1]
    shape = torch.broadcast_shapes(y.shape[:-1], context.shape[:-1])
    y = y.expand(*shape, y.size(-1)).reshape(-1, y.size(-1))
    wide = context.expand(*shape, context.size(-1))
    if all(stride == 0 or size == 1 for size, stride in zip(wide.shape[:-1], wide.stride()[:-1], strict=True)):
        return y, context.reshape(-1, context.size(-1))[:1], shape
    return y, wide.reshape(-1, context.size(-1)), shape
