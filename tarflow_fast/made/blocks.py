"""The MADE of nflows and that of normflows: the same blocks, into which the context enters in another way."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tarflow_fast.made.net import IDENTITY, Activation, Layer, OfContext, Unknown, activation_of, check_plain, masked

__all__ = ["alone", "context_of", "inside", "layers_of", "spline_of", "statistics_of"]


def layers_of(net: Any, made: ModuleType, gated: bool) -> tuple[Layer, ...]:
    """The layers of a MADE.

    made: the library's module with the classes of the net.
    gated: how the context enters. False as in nflows: it is added, and what is added first passes the activation, as
        does the output of the first layer where no residual blocks follow. True as in normflows: it is added to the
        first layer, which no activation follows, and gates the residual blocks, glu(temps, context) =
        temps * sigmoid(context).

    Raises:
        Unknown: a part of it is not known here.
    """
    if type(net) is not made.MADE:
        raise Unknown(f"a net of type {type(net).__name__}")
    check_plain(net)
    reader, activation = _Reader(made.MaskedLinear), IDENTITY
    if not gated and not net.use_residual_blocks:
        activation = activation_of(net.activation)
    term = _context(net, IDENTITY if gated else activation_of(net.activation))
    reader.linear(net.initial_layer, IDENTITY, term=term)
    for block in net.blocks:
        check_plain(block)
        if block.dropout.training and block.dropout.p > 0:
            raise Unknown("dropout in training mode")
        if type(block) is made.MaskedFeedforwardBlock:
            if block.batch_norm is not None:
                reader.norm(block.batch_norm, activation)
                activation = IDENTITY
            reader.linear(block.linear, activation)
            activation = activation_of(block.activation)
        elif type(block) is made.MaskedResidualBlock and activation is IDENTITY:
            reader.residual(block, gated)
        else:
            raise Unknown(f"a {type(block).__name__} in such a net")
    reader.linear(net.final_layer, activation)
    return tuple(reader.layers)


class _Reader:
    """Layers, each of which reads the one before it."""

    def __init__(self, kind: type) -> None:
        self.kind, self.layers = kind, []

    def linear(self, linear: Any, activation: Activation, **options: Any) -> None:
        if type(linear) is not self.kind:
            raise Unknown(f"a {type(linear).__name__} where a MaskedLinear was expected")
        layer = masked(linear, source=len(self.layers), activation=activation)
        self.layers.append(replace(layer, **options))

    def norm(self, norm: Any, activation: Activation = IDENTITY) -> None:
        """Batch norm with its running statistics: a layer with a diagonal weight."""
        if type(norm) is not nn.BatchNorm1d:
            raise Unknown(f"a {type(norm).__name__} where a BatchNorm1d was expected")
        check_plain(norm)
        if norm.training or norm.running_mean is None:
            raise Unknown("batch norm in training mode")

        def scale() -> Tensor:
            inverse = torch.rsqrt(norm.running_var + norm.eps)
            return inverse if norm.weight is None else inverse * norm.weight

        def shift() -> Tensor:
            shifted = -norm.running_mean * scale()
            return shifted if norm.bias is None else shifted + norm.bias

        def mask() -> Tensor:
            return torch.eye(norm.num_features, dtype=torch.bool, device=norm.running_mean.device)

        self.layers.append(Layer(lambda: torch.diag(scale()), mask, shift, len(self.layers), activation))

    def residual(self, block: Any, gated: bool) -> None:
        residual, activation = len(self.layers), activation_of(block.activation)
        if getattr(block.activation, "inplace", False):
            raise Unknown("an activation in place, which changes what the residual connection adds")
        for i, linear in enumerate(block.linear_layers):
            if block.use_batch_norm:
                self.norm(block.batch_norm_layers[i])
            options: dict[str, Any] = {"residual": residual} if i == 1 else {}
            if gated and i == 1:
                options["gate"] = _context(block, Activation("sigmoid"))
            elif not gated and i == 0:
                options["term"] = _context(block)
            self.linear(linear, activation, **options)


def statistics_of(net: Any) -> tuple[Tensor, ...]:
    """What the batch norms of a net keep of the batches they saw."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm1d)]
    return tuple(each for norm in norms for each in (norm.running_mean, norm.running_var) if each is not None)


def _context(module: Any, activation: Activation = IDENTITY) -> OfContext | None:
    """What `context_layer` makes of the context, where the module has one."""
    layer = getattr(module, "context_layer", None)
    if layer is None:
        return None
    if type(layer) is not nn.Linear:
        raise Unknown(f"a context layer of type {type(layer).__name__}")
    check_plain(layer)
    return OfContext(lambda: layer.weight, lambda: layer.bias, activation)


def context_of(net: Any) -> int:
    """How many numbers of context the net takes."""
    return net.context_layer.in_features if _context(net) else 0


def alone(transform: Any, parameters: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The inverse of one feature: the transform's own `_elementwise_inverse`, as if it had one feature."""
    single = copy.copy(transform)
    single.features = 1

    def inverse(y: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        phi = phi.reshape(-1, parameters).clone()  # the library scales it in place
        x, log_det = single._elementwise_inverse(y.reshape(-1, 1), phi)
        return x.view(y.shape), log_det.view(y.shape)

    return inverse


def inside(y: Tensor) -> None:
    """Raises Unknown for noise outside [0, 1], which the library itself has to refuse."""
    if not bool(((y >= 0) & (y <= 1)).all()):
        raise Unknown("noise outside of [0, 1]")


def spline_of(transform: Any) -> tuple[str, tuple[float, ...]] | str:
    """What the engine has to know of a rational-quadratic spline with linear tails, or with none on [0, 1]."""
    K, tails = transform.num_bins, transform.tails == "linear"
    if K * max(transform.min_bin_width, transform.min_bin_height) > 1:
        return "minimal bins too large for their number"
    low, high = (-transform.tail_bound, transform.tail_bound) if tails else (0.0, 1.0)
    minima = transform.min_bin_width, transform.min_bin_height, transform.min_derivative
    width = getattr(transform.autoregressive_net, "hidden_features", 1)
    return "spline", tuple(map(float, (K, low, high, *minima, 1 / math.sqrt(width), tails)))
