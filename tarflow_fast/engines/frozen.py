"""Packed weights kept between calls, for a model whose weights are promised to stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from operator import attrgetter, is_

from torch import Tensor, nn

from tarflow_fast import native
from tarflow_fast.engines.cpu_native import PRECISIONS, Plan, Sizes, why_not_weights
from tarflow_fast.engines.weights import FORWARD_HOOKS, Weights, inspect
from tarflow_fast.transforms import Bijection

__all__ = ["FrozenNets"]


class FrozenNets:
    """The nets of a model as they were found, and for each precision their plans, packed at the first use.

    Args:
        bijections: of the model's blocks.

    Raises:
        RuntimeError: the native engine is not there, or cannot take a block; the reason is named.
    """

    def __init__(self, bijections: Sequence[Bijection]) -> None:
        if not native.available():
            raise RuntimeError(f"freeze: there is no native CPU engine to keep weights for: {native.reason()}")
        self._found: dict[int, tuple[Bijection, Weights, _Seen]] = {}
        self._plans: dict[tuple[int, int], Plan] = {}  # by net and precision
        self._bytes: dict[int, int] = {}  # of all plans of a precision
        for number, bijection in enumerate(bijections):
            weights = inspect(bijection.net, "cpu")
            reason = weights if isinstance(weights, str) else why_not_weights(weights)
            if reason:
                raise RuntimeError(f"freeze: the native CPU engine cannot take block {number}: {reason}")
            self._found[id(bijection.net)] = bijection, weights, _Seen(bijection.net, number)

    def __deepcopy__(self, memo: object) -> None:
        """A copy of the model has weights of its own: it is not frozen."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def weights(self, net: nn.Module, where: str = "reverse") -> Weights:
        """What `inspect(net)` found. where: the function called, for the message.

        Raises:
            RuntimeError: it is another net, or what `_Seen` looks at has changed.
        """
        _, weights, seen = self._found.get(id(net), (None, None, None))
        change = "a block was replaced" if seen is None else seen.change()
        if change:
            raise RuntimeError(
                f"{where}: the model was changed after freeze(): {change}; call freeze() again, or unfreeze()"
            )
        return weights

    def plan(self, net: nn.Module, sizes: Sizes, weights: Weights) -> Plan:
        """The net's packed weights. They are only read from then on, by any number of calls at once."""
        plan = self._plans.get((id(net), sizes.precision))
        if plan is None or not plan.usable:  # one made before a fork is not
            plan = self._plans[id(net), sizes.precision] = Plan.of(sizes).pack(weights)
        return plan

    @property
    def held(self) -> int:
        """Bytes of the plans made so far."""
        return sum(plan.bytes for plan in [*self._plans.values()] if plan.usable)

    def bytes_for(self, precision: str) -> int:
        """Bytes of the plans made so far, and of those still to be made in this precision."""
        code = PRECISIONS[precision]
        if code not in self._bytes:
            sizes = (Sizes.of(weights, each.transform, precision) for each, weights, _ in self._found.values())
            self._bytes[code] = sum(Plan.bytes_of(each) for each in sizes)
        others = (plan for (_, kind), plan in [*self._plans.items()] if kind != code and plan.usable)
        return self._bytes[code] + sum(plan.bytes for plan in others)


class _Seen:
    """What tells that a net is no longer what it was: its modules, parameters and hooks are other objects, or a
    parameter lies elsewhere or was written more often, as PyTorch counts (`TarFlow.freeze` says what it does not).
    """

    def __init__(self, net: nn.Module, number: int) -> None:
        self._number = number
        self._modules, self._parameters, self._hooks, self._states = [], [], [], []
        for path, module in net.named_modules():
            prefix, state = path and path + ".", module.__dict__
            self._states.append((state, prefix + "forward"))
            self._modules += [(module._modules, name, child, prefix + name) for name, child in module._modules.items()]
            self._hooks += [(state[name], path or "the block") for name in FORWARD_HOOKS]
            for name, parameter in module._parameters.items():
                address = None if parameter is None else parameter.data_ptr()
                version = None if parameter is None or parameter.is_inference() else parameter._version
                self._parameters.append((module._parameters, name, parameter, address, version, prefix + name))
        self._hooks += [(getattr(nn.modules.module, "_global" + name), "every module") for name in FORWARD_HOOKS]
        self._glance = _Glance(self._modules, self._parameters, self._hooks, self._states)

    def change(self) -> str:
        """What has changed; "" when nothing has."""
        if self._glance.finds_nothing():
            return ""
        for state, path in self._states:
            if "forward" in state:
                return f"block {self._number}: {path} was replaced"
        for there, name, expected, path in self._modules:
            if there.get(name) is not expected:
                return f"block {self._number}: {path} was replaced"
        for there, name, expected, address, version, path in self._parameters:
            if there.get(name) is not expected:
                return f"block {self._number}: {path} was replaced"
            if address is not None and expected.data_ptr() != address:
                return f"block {self._number}: {path} was moved"
            if version is not None and expected._version != version:
                return f"block {self._number}: {path} was written"
        for hooks, path in self._hooks:
            if hooks:
                return f"block {self._number}: {path} has hooks"
        return ""


class _Glance:
    """The same at a glance, by flat lists and without a line of Python an entry: between inversions, which leave
    little in the caches, the loops of `_Seen.change` were 7 to 9 % of a call of one row (four blocks of four layers of
    C 128), these are 5 to 6 %.
    """

    def __init__(self, modules: list, parameters: list, hooks: list, states: list) -> None:
        self._modules = [*{id(there): there for there, *_ in modules}.values()]
        self._parameters = [*{id(there): there for there, *_ in parameters}.values()]
        self._hooks, self._states = [each for each, _ in hooks], [state for state, _ in states]
        self._children, self._tensors = [child for _, _, child, _ in modules], [each[2] for each in parameters]
        self._addresses, self._versions = ([each[place] for each in parameters] for place in (3, 4))
        self._complete = None not in self._addresses + self._versions

    def finds_nothing(self) -> bool:
        """Whether nothing has changed; False also where that takes a closer look."""
        return (
            self._complete
            and _same_values(self._parameters, self._tensors)
            and [*map(Tensor.data_ptr, self._tensors)] == self._addresses
            and [*map(_version, self._tensors)] == self._versions
            and _same_values(self._modules, self._children)
            and not any(self._hooks)
            and not any(map(dict.get, self._states, repeat("forward")))
        )


_version = attrgetter("_version")


def _same_values(dicts: list[dict[str, object]], expected: list) -> bool:
    values = [*chain.from_iterable([each.values() for each in dicts])]
    return len(values) == len(expected) and all(map(is_, values, expected))
