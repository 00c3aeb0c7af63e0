"""Let the autoregressive transforms of a flow be inverted by one sweep, without changing the flow.

    made.accelerate(flow)     sampling and transform.inv run by one sweep
    made.restore(flow)        and on the library's own code again
    made.explain(flow)        which path each transform takes, and why

Only the class of each transform changes, to a subclass of its own class. Its weights are read at every call.
"""

from __future__ import annotations

import copy
import copyreg
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import Tensor, nn

from tarflow_fast import native
from tarflow_fast.made import nflows, normflows, torchflows, zuko
from tarflow_fast.made.paths import PATHS, Refusal, State, invert, path_of

__all__ = ["Explanation", "accelerate", "explain", "freeze", "restore", "unfreeze"]

LIBRARIES: dict[str, ModuleType] = {"zuko": zuko, "nflows": nflows, "normflows": normflows, "torchflows": torchflows}
T = TypeVar("T")

# Kept beside the transforms, never in them: state_dict, pickles and copies do not see it.
_STATES: WeakKeyDictionary[nn.Module, State] = WeakKeyDictionary()
_CLASSES: WeakValueDictionary[type, type] = WeakValueDictionary()  # original class: the subclass made of it


class Explanation(NamedTuple):
    """One autoregressive transform of a flow, and how it is inverted when no gradient is asked for.

    path: "cpu", the C++ engine; "torch", the sweep in PyTorch; "library", its own code.
    reason: why it is no better path; "" for the best.
    """

    name: str
    transform: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or 'the flow'} ({self.transform}): {self.path}" + (
            f", {self.reason}" if self.reason else ""
        )


def accelerate(flow: T, path: str = "auto") -> T:
    """Let the masked autoregressive transforms in `flow` be inverted by one sweep (`schedule.py`).

    x = f^-1(y) is the same, to rounding, as the library's, which runs the whole net once a feature. log |det dx/dy|
    comes out of the same sweep. The flow keeps its type, parameters, state_dict and pickle; training and densities go
    on as before. Weights are read at each call. Where a gradient is asked for, or a part of a transform is not known,
    the library's own code runs, and `explain` says so.

    Args:
        flow: a flow or transform of zuko, nflows, normflows or torchflows, a module that holds such, or an object that
            does, such as a posterior of sbi.
        path: "auto", "cpu" for the C++ engine or an error, or "torch" for the sweep in PyTorch.

    Returns:
        The same object. Accelerating again looks at it anew.

    Raises:
        TypeError: there is no module in it.
        ValueError: there is no transform in it that could run by a sweep; what was found is named. Nothing was changed.
        RuntimeError: path is "cpu", and there is no engine, or a transform that it cannot take.
    """
    if path not in PATHS:
        raise ValueError(f"accelerate: path must be one of {', '.join(PATHS)}, got {path!r}")
    if path == "cpu" and not native.available():
        raise RuntimeError(f"accelerate: path 'cpu': {native.reason()}")
    found = dict(_transforms("accelerate", flow))
    states, refusals = {}, []
    for name, module in found.items():
        original = _original(module)
        if not _known(original):
            refusals.append(f"{_label(name, module)}: {_why_unknown(original)}")
            continue
        state = State(_library(original).read, path)
        taken, reason, _ = path_of(module, state)
        if taken == "library":
            refusals.append(f"{_label(name, module)}: {reason}")
        elif path == "cpu" and taken != "cpu":
            raise RuntimeError(f"accelerate: path 'cpu' cannot take {_label(name, module)}: {reason}")
        states[module] = state  # also where the library runs now: it may be in training mode, and later not
    if len(refusals) == len(found):
        there = "; ".join(refusals) or f"no autoregressive transform in a {type(flow).__name__}"
        raise ValueError(f"accelerate: nothing here can be inverted by one sweep: {there}")
    for module, state in states.items():
        original = _original(module)
        module.__class__ = _CLASSES.get(original) or _subclass(original)
        _STATES[module] = state
    return flow


def restore(flow: T) -> T:
    """Take `accelerate` back: every transform has its own class again. Returns the same object.

    Raises:
        TypeError: there is no module in it.
    """
    for _, module in _transforms("restore", flow):
        module.__class__ = _original(module)
        _STATES.pop(module, None)
    return flow


def explain(flow: object) -> list[Explanation]:
    """The autoregressive transforms in `flow`, accelerated or not, and the path each takes without gradients.

    Raises:
        TypeError: there is no module in it.
    """
    explanations = []
    for name, module in _transforms("explain", flow):
        original, state = _original(module), _STATES.get(module)
        if state is None:
            reason = "not accelerated" if _known(original) else _why_unknown(original)
            explanations.append(Explanation(name, original.__name__, "library", reason))
        else:
            path, reason, _ = path_of(module, state)
            explanations.append(Explanation(name, original.__name__, path, reason))
    return explanations


def freeze(flow: T) -> T:
    """Promise that the weights stay as they are: they are packed once, at the next call, and kept.

    A call that finds a weight replaced, moved or written, as PyTorch counts, raises RuntimeError. `unfreeze`, or
    `freeze` again, lets go of the packed weights. Paths other than "cpu" pack nothing, so there is nothing to keep.
    Returns the same object.

    Raises:
        TypeError: there is no module in it.
        ValueError: none of its transforms is accelerated.
    """
    return _set_frozen("freeze", flow, True)


def unfreeze(flow: T) -> T:
    """Take `freeze` back. Raises as `freeze` does."""
    return _set_frozen("unfreeze", flow, False)


def _set_frozen(where: str, flow: T, frozen: bool) -> T:
    states = [_STATES[module] for _, module in _transforms(where, flow) if module in _STATES]
    if not states:
        raise ValueError(f"{where}: no transform in this {type(flow).__name__} is accelerated")
    for state in states:
        state.set_frozen(frozen)
    return flow


def _transforms(where: str, flow: object) -> Iterator[tuple[str, nn.Module]]:
    """All autoregressive transforms of the libraries, each once, with the path to it."""
    modules = [*_modules(flow, "", 3)]
    if not modules:
        raise TypeError(f"{where}: flow must be a torch.nn.Module, or hold one, got {type(flow).__name__}")
    seen: set[int] = set()
    for prefix, root in modules:
        for name, module in root.named_modules():
            library = _library(type(module))
            if (
                library is not None
                and id(module) not in seen
                and any(map(library.is_autoregressive, type(module).__mro__))
            ):
                seen.add(id(module))
                yield ".".join(part for part in (prefix, name) if part), module


def _modules(thing: object, path: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """The modules that an object holds in its attributes, or in lists, tuples and dicts there."""
    if isinstance(thing, nn.Module):
        yield path, thing
    elif depth and not isinstance(thing, (type, ModuleType, Tensor, str)):
        items: Any = enumerate(thing) if isinstance(thing, (list, tuple)) else ()
        items = thing.items() if isinstance(thing, dict) else items or getattr(thing, "__dict__", {}).items()
        for name, each in [*items]:
            yield from _modules(each, f"{path}.{name}" if path else str(name), depth - 1)


def _library(kind: type) -> ModuleType | None:
    names = (base.__module__.partition(".")[0] for base in kind.__mro__)
    return next((LIBRARIES[name] for name in names if name in LIBRARIES), None)


def _known(original: type) -> bool:
    library = _library(original)
    return library is not None and f"{original.__module__}.{original.__qualname__}" in library.KNOWN


def _why_unknown(original: type) -> str:
    return f"a {original.__name__} is not known here"


def _label(name: str, module: nn.Module) -> str:
    return f"{name or 'the flow'} ({_original(module).__name__})"


def _original(module: nn.Module) -> type:
    """The class the module has, or had before `accelerate`."""
    kind = type(module)
    return kind.__bases__[0] if _CLASSES.get(kind.__bases__[0]) is kind else kind


def _subclass(original: type) -> type:
    """The class of accelerated transforms; it looks like the original."""

    def inverted(self: nn.Module, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """x and log |det dx/dy| by one sweep, or None where the library's own code has to run."""
        state = _STATES.get(self)
        if state is None:
            return None
        got = invert(self, state, y, context)
        if isinstance(got, str):
            if isinstance(got, Refusal) and got not in state.warned:
                state.warned.add(got)
                warnings.warn(f"a {original.__name__} is inverted by its own code: {got}", stacklevel=4)
            return None
        return got

    # tarflow_fast/apply has the same few lines. This room stands alone, and none below both would be their place.
    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple:
        make, args, *rest = super(made, self).__reduce_ex__(protocol)
        if make is copyreg.__newobj__:  # pickle would insist on the class the instance has
            make, args = copyreg._reconstructor, (made, object, None)
        return make, tuple(original if each is made else each for each in args), *rest

    def __deepcopy__(self: nn.Module, memo: dict[int, object]) -> nn.Module:
        function, args, state, *_ = self.__reduce_ex__(4)
        new = memo[id(self)] = function(*args)
        setstate = getattr(new, "__setstate__", new.__dict__.update)
        setstate(copy.deepcopy(state, memo))
        new.__class__ = type(self)
        if self in _STATES:
            _STATES[new] = State(_STATES[self].read, _STATES[self].path)
        return new

    body = {
        "__reduce_ex__": __reduce_ex__,
        "__deepcopy__": __deepcopy__,
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        **_library(original).methods(original, inverted),
    }
    made = type(original)(original.__name__, (original,), body)
    _CLASSES[original] = made
    return made
