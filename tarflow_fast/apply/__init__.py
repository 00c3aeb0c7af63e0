"""Let these engines invert a model of another package: the original TarFlow, or a flow over tokens made of its blocks.

    tarflow_fast.apply_to(model)       reverse, and forward without gradients, run on the engines of this package
    tarflow_fast.remove_from(model)    and on its own code again

The model keeps its modules, parameters, keys and training; only its class becomes a subclass of its own class. At every
call its weights are read from its modules into a flow of this package which owns none (`structure.py`, `shadow.py`).
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from tarflow_fast.apply.probe import knows_forward, probe_blocks, probe_reverse
from tarflow_fast.apply.shadow import Shadow, unknown_argument
from tarflow_fast.apply.structure import Structure, read
from tarflow_fast.flow import TokenFlow
from tarflow_fast.ops.registry import warn_once

__all__ = ["apply_to", "remove_from"]

M = TypeVar("M", bound=nn.Module)


class _Applied(NamedTuple):
    """What is known of one model."""

    structure: Structure
    shadow: Shadow
    density: bool  # whether its forward was seen to be ours


# Kept beside the models, never in them: state_dict, pickles and copies do not see it.
_APPLIED: WeakKeyDictionary[nn.Module, _Applied] = WeakKeyDictionary()
_CLASSES: WeakValueDictionary[type, type] = WeakValueDictionary()  # original class: the subclass made of it


def apply_to(model: M) -> M:
    """Let `model.reverse` run on the engines of this package, with the same weights, arguments and numbers.

    The model is an instance of the original TarFlow's `Model`, or of a flow over tokens made of the same blocks, such
    as the single-system `TarFlow` of transferable-samplers (reverse returns tokens and log |det dx/dz|, nats). It is
    recognized by its structure and by a probe: copies of its blocks, with drawn weights, must compute what ours do.

    Only the class of this instance changes, to a subclass of its own. Training, hooks, `state_dict`, `.to()`, new
    weights by any way: all go on as before, since the weights are read at each call. Copies and pickles are of the
    original class: apply to them again. Where a later call finds something that engines cannot honour (hooks, adapters,
    a replaced layer), the model's own reverse runs, and a warning says why, once.

    Three things are other than in the original's reverse, as in `TarFlow.reverse`: images carry no gradient; a label
    below 0 is no label, where the original takes the last class; the noise is never written.

    Args:
        model: the model itself, not a wrapper (DDP, torch.compile) around it. On any device, in any mode; dropout must
            be off.

    Returns:
        The same model. Applying again looks at it anew.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: it is not such a flow; the message says what differs, and where. Nothing was changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_to: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, TokenFlow):
        raise ValueError(f"apply_to: model is a {type(model).__name__} of tarflow_fast, which needs no help")
    original = _original(model, "apply_to")
    try:
        structure = read(model, original)
        if not callable(getattr(original, "reverse", None)):
            raise ValueError(f"a {original.__name__} has no reverse")
        shadow = Shadow(structure)
        probe_blocks(model, structure, shadow)
        probe_reverse(model, original, structure)
        density = knows_forward(model, original, structure)
        model.__class__ = _CLASSES.get(original) or _subclass(original)
    except (TypeError, ValueError) as error:
        raise ValueError(f"apply_to: {error}") from error
    _APPLIED[model] = _Applied(structure, shadow, density)
    return model


def remove_from(model: M) -> M:
    """Take `apply_to` back: the model has its own class and its own reverse again. Returns it.

    A model to which nothing was applied stays as it is.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: its class was changed after `apply_to`, so that the original cannot be put back.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"remove_from: model must be a torch.nn.Module, got {type(model).__name__}")
    model.__class__ = _original(model, "remove_from")
    _APPLIED.pop(model, None)
    return model


def _original(model: nn.Module, where: str) -> type:
    """The class the model has, or had before `apply_to`."""
    kind = type(model)
    for each in kind.__mro__:
        if each is not object and _CLASSES.get(each.__bases__[0]) is each:
            if each is kind:
                return each.__bases__[0]
            raise ValueError(f"{where}: the class of the model was changed after apply_to, to {kind.__name__}")
    return kind


def _subclass(original: type) -> type:
    """The class of models to which `apply_to` was applied; it looks like the original."""

    @functools.wraps(original.reverse)
    def reverse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _reverse(self, original, args, kwargs)

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, original, args, kwargs)

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple:
        make, args, *rest = super(made, self).__reduce_ex__(protocol)
        if make is copyreg.__newobj__:  # pickle would insist on the class the instance has
            make, args = copyreg._reconstructor, (made, object, None)
        return make, tuple(original if each is made else each for each in args), *rest

    body = {
        "reverse": reverse,
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
    }
    made = type(original)(original.__name__, (original,), body)
    _CLASSES[original] = made
    return made


def _forward(model: nn.Module, original: type, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Without gradients an engine computes it, where it was seen at `apply_to` to compute the same."""
    applied = _APPLIED.get(model)
    if applied is None or not applied.density or kwargs or len(args) > 2 or torch.is_grad_enabled():
        return original.forward(model, *args, **kwargs)
    try:
        structure = read(model, original)
        if structure.change_since(applied.structure):
            return original.forward(model, *args)
        applied.shadow.link(structure)
    except ValueError:
        return original.forward(model, *args)
    found = applied.shadow.encoded_as(model, *args)
    return original.forward(model, *args) if found is None else found


def _reverse(model: nn.Module, original: type, args: tuple, kwargs: dict[str, Any]) -> Any:
    applied = _APPLIED.get(model)
    if applied is None:  # a copy made in another way than by pickle or copy
        return original.reverse(model, *args, **kwargs)
    try:
        structure = read(model, original)
        if change := structure.change_since(applied.structure):
            raise ValueError(change)
        applied.shadow.link(structure)
        signature = inspect.signature(original.reverse)
        bound = signature.bind(model, *args, **kwargs)
    except ValueError as reason:
        warn_once(f"reverse of a {original.__name__} runs on its own code: {reason}")
        return original.reverse(model, *args, **kwargs)
    bound.apply_defaults()
    _, *arguments = bound.arguments.items()
    if name := unknown_argument(signature, bound.arguments):
        warn_once(f"reverse of a {original.__name__} runs on its own code: argument {name!r} is not known")
        return original.reverse(model, *args, **kwargs)
    return applied.shadow.reversed_as(model, dict(arguments))
