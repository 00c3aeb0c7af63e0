"""What one sweep needs to know of a masked autoregressive transform: its net, as layers, and its univariate transform.

A net of any of the libraries is a list of layers. Number l, counted from 1, computes

    v_l = v_r + gate * ((W * M) f(v_s) + bias + term)

from an earlier vector v_s, where v_0 is x. M is the mask, f an activation, r an earlier layer whose output is added (a
residual connection), and `term` and `gate` are functions of the context alone, which is known from the start. The
output of the last layer are the parameters of the univariate transforms: P numbers for each of the D features, those of
feature i at i P ... i P + P - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as _of_all

__all__ = ["ACTIVATIONS", "IDENTITY", "Activation", "Layer", "Made", "OfContext", "Univariate", "Unknown"]
__all__ += ["activation_of", "check_plain", "masked"]


class Unknown(Exception):
    """A part of a transform is not known here, and the message says which one. The library's own path runs then."""


@dataclass(frozen=True)
class Activation:
    """An elementwise function: its name, and its slope below zero where it has one (alpha of elu)."""

    name: str
    slope: float = 0.0

    def __call__(self, v: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](v, self.slope)


ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {  # the order is that of enum tf_made_activation
    "identity": lambda v, slope: v,
    "relu": lambda v, slope: F.relu(v),
    "leaky_relu": lambda v, slope: F.leaky_relu(v, slope),
    "elu": lambda v, slope: F.elu(v, slope),
    "tanh": lambda v, slope: torch.tanh(v),
    "sigmoid": lambda v, slope: torch.sigmoid(v),
    "silu": lambda v, slope: F.silu(v),
    "gelu": lambda v, slope: F.gelu(v),
}

IDENTITY = Activation("identity")
_FUNCTIONS = {
    F.relu: Activation("relu"),
    torch.relu: Activation("relu"),
    F.leaky_relu: Activation("leaky_relu", 0.01),
    F.elu: Activation("elu", 1.0),
    torch.tanh: Activation("tanh"),
    F.tanh: Activation("tanh"),
    torch.sigmoid: Activation("sigmoid"),
    F.sigmoid: Activation("sigmoid"),
    F.silu: Activation("silu"),
    F.gelu: Activation("gelu"),
}


def activation_of(function: object) -> Activation:
    """The activation that a module of torch.nn or a function of torch computes.

    Raises:
        Unknown: it is none of ACTIVATIONS.
    """
    if isinstance(function, nn.Module):
        check_plain(function)
        kind = type(function)
        if kind in (nn.Identity, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU):
            return Activation(kind.__name__.lower())
        if kind is nn.LeakyReLU:
            return Activation("leaky_relu", float(function.negative_slope))
        if kind is nn.ELU:
            return Activation("elu", float(function.alpha))
        if kind is nn.GELU and function.approximate == "none":
            return Activation("gelu")
    elif isinstance(function, Hashable) and function in _FUNCTIONS:
        return _FUNCTIONS[function]
    raise Unknown(f"activation {function!r}")


@dataclass(frozen=True)
class OfContext:
    """f(W c + bias), a function of the context c alone: (rows, E) -> (rows, units)."""

    weight: Callable[[], Tensor]  # (units, E), read anew at every call
    bias: Callable[[], Tensor | None]
    activation: Activation = IDENTITY

    def __call__(self, context: Tensor) -> Tensor:
        return self.activation(F.linear(context, self.weight(), self.bias()))


@dataclass(frozen=True)
class Layer:
    """One layer, as above. `weight` may have more columns than v_s has units: the others are those of the context."""

    weight: Callable[[], Tensor]  # (units, inputs), read anew at every call
    mask: Callable[[], Tensor]  # the same shape, of zeros and ones, of any dtype
    bias: Callable[[], Tensor | None]  # (units,)
    source: int = 0
    activation: Activation = IDENTITY
    residual: int | None = None
    term: OfContext | None = None
    gate: OfContext | None = None


@dataclass(frozen=True)
class Univariate:
    """The transform y = f(x; phi) of one feature.

    parameters: P, the numbers in phi.
    inverse: the library's own; (y, phi) of shapes (..., n) and (..., n, P) -> x and log |dx / dy|, both (..., n).
    engine: kind and constants for the C++ engine (`engine.py`), or why it has no such transform.
    check: raises, or raises `Unknown`, for noise (..., D) that the library would refuse.
    """

    parameters: int
    inverse: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    engine: tuple[str, tuple[float, ...]] | str
    check: Callable[[Tensor], None] | None = None


@dataclass(frozen=True)
class Made:
    """A masked autoregressive transform of D features."""

    features: int
    layers: tuple[Layer, ...]
    univariate: Univariate
    parameters: tuple[Tensor, ...]  # all that a gradient could be asked for
    context: int = 0
    statistics: tuple[Tensor, ...] = ()  # of batch norms, from which weights are computed, too

    def form(self) -> tuple[object, ...]:
        """All that is no tensor. A schedule and a plan hold for one form and the same masks."""

        def activation(function: OfContext | None) -> Activation | None:
            return None if function is None else function.activation

        layers = [
            (each.source, each.activation, each.residual, activation(each.term), activation(each.gate))
            for each in self.layers
        ]
        return self.features, self.context, self.univariate.parameters, self.univariate.engine, *layers


def check_plain(*modules: nn.Module) -> None:
    """Raises Unknown where calling a module runs more than the forward of its class."""
    if _of_all._global_forward_hooks or _of_all._global_forward_pre_hooks:
        raise Unknown("hooks on every module")
    for module in modules:
        state = module.__dict__
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
            raise Unknown(f"hooks, or a replaced forward, on a {type(module).__name__}")


def masked(linear: nn.Linear, features: int | None = None, **options: object) -> Layer:
    """The layer of a linear module with a buffer `mask`.

    features: how many of its inputs are x; those after them are the context, whose share becomes the term.
    """
    check_plain(linear)
    term = None
    if features is not None and linear.in_features > features:
        term = OfContext(lambda: (linear.mask * linear.weight)[:, features:], lambda: None)

    return Layer(lambda: linear.weight, lambda: linear.mask, lambda: linear.bias, term=term, **options)
