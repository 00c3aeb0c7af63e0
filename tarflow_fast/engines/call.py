"""What one call of the user asks of the engines, and what each of them keeps for as long as the call lasts.

The state belongs to the call, never to a module, so that an interrupted or concurrent call leaves nothing behind. It
lies on the floor of the engines, since each of them reads it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from tarflow_fast.validate import check_positive_int

if TYPE_CHECKING:
    from tarflow_fast.engines.frozen import FrozenNets

__all__ = ["PRECISIONS", "Call", "torch_precision"]

PRECISIONS = ("fp32", "bf16", "int8")
State = TypeVar("State")


class Call:
    """What the K blocks of one call, or of the parts of a sample, share: choices, and memory made at first use.

    Args:
        backend: 'auto' or the name of an engine (engines/table.py).
        precision: 'fp32', 'bf16', 'int8' (native CPU engine only), or None: that of the parameters, or of autocast.
        differentiable: keep an autograd graph.
        memory_limit: bytes the engine may take, of the host or the GPU; None: most of what the machine has left. A
            larger batch is computed in parts.
        nets: those of the model, by which messages number a block.
        frozen: of a frozen model: what is known of its nets, and their packed weights.
        where: the function called, for messages.
        solving: the solver asked for (solvers/report.py); None: the default. An engine may prepare for it.

    Raises:
        TypeError, ValueError: an unknown precision, a memory_limit that is no positive int.
    """

    def __init__(
        self,
        backend: str = "auto",
        precision: str | None = None,
        differentiable: bool = False,
        memory_limit: int | None = None,
        nets: Sequence[nn.Module] = (),
        frozen: FrozenNets | None = None,
        where: str = "reverse",
        solving: Any = None,
    ) -> None:
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"{where}: precision must be None or one of {', '.join(PRECISIONS)}, got {precision!r}")
        if memory_limit is not None:
            memory_limit = check_positive_int(where, "memory_limit", memory_limit)
        self.backend, self.precision, self.differentiable = backend, precision, differentiable
        self.memory_limit, self.nets, self.frozen, self.where = memory_limit, nets, frozen, where
        self.solving = solving
        self.told = False  # whether it was said that a block is left to PyTorch
        self._states: dict[str, Any] = {}

    def state(self, engine: str, make: Callable[[], State]) -> State:
        """What this engine keeps for the call, made at the first use."""
        if engine not in self._states:
            self._states[engine] = make()
        return self._states[engine]

    def at(self, precision: str) -> Call:
        """The same call in another precision; it shares what the engines keep, so it is over when this one is."""
        other = copy.copy(self)
        other.precision = precision
        return other

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *raised: object) -> None:
        """The call is over. Not left to __del__: Python drops a Ctrl-C that comes inside one."""
        states, self._states = self._states, {}
        for state in states.values():
            state.close()

    def name_of(self, net: nn.Module) -> str:
        """What a message calls the block of this net."""
        number = self.number_of(net)
        return "a block" if number < 0 else f"block {number}"

    def number_of(self, net: nn.Module) -> int:
        """The number of the block of this net; -1 for a net that is not the model's."""
        return next((number for number, each in enumerate(self.nets) if each is net), -1)


def torch_precision(net: nn.Module, tokens: Tensor) -> str:
    """What PyTorch by itself computes a net in: 'fp32' (or wider), 'bf16' or 'fp16'."""
    if torch.is_autocast_enabled(tokens.device.type):
        return "bf16" if torch.get_autocast_dtype(tokens.device.type) == torch.bfloat16 else "fp16"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(net.pos_embed.dtype, "fp32")
