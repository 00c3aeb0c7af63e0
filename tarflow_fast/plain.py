"""Whether a module is just what its class says, so that its parameters may be read and its call left out.

Adapters, hooks, patched and replaced modules must be called: a fast path steps aside for them.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["BACKWARD_HOOKS", "FORWARD_HOOKS", "global_hooks", "not_plain"]

FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def global_hooks(hooks: tuple[str, ...]) -> bool:
    """Whether hooks of these kinds are registered for every module."""
    return any(getattr(torch.nn.modules.module, "_global" + name) for name in hooks)


def not_plain(module: nn.Module, kind: type[nn.Module], hooks: tuple[str, ...]) -> str:
    """Why this is not exactly a `kind` without hooks of these kinds: "is a Scaled", "has hooks"; "" when it is."""
    if type(module) is not kind:
        return f"is a {type(module).__name__}"
    state = module.__dict__  # read as it is: attributes of a Module go through a search, for 12 modules a layer
    for name in hooks:  # not any(): its generator costs more than the look, and there are 48 modules a block
        if state[name]:
            return "has hooks"
    return "has a forward of its own" if "forward" in state else ""
