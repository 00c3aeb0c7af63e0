"""The masked autoregressive transforms of normflows, as `net.py` describes them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tarflow_fast.made.blocks import alone, context_of, inside, layers_of, spline_of, statistics_of
from tarflow_fast.made.net import Made, Univariate, Unknown, check_plain

Inverted = Callable[[nn.Module, Tensor, "Tensor | None"], "tuple[Tensor, Tensor] | None"]

__all__ = ["KNOWN", "is_autoregressive", "methods", "read"]

KNOWN = (
    "normflows.flows.affine.autoregressive.MaskedAffineAutoregressive",
    "normflows.flows.neural_spline.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive",
)


def is_autoregressive(kind: type) -> bool:
    """Whether it is the class of transforms that normflows inverts by running a net D times."""
    return kind.__module__ == "normflows.flows.affine.autoregressive" and kind.__name__ == "Autoregressive"


def methods(original: type, inverted: Inverted) -> dict[str, object]:
    """What the class of accelerated transforms defines. The spline layers of normflows call it in their forward."""

    def inverse(self: nn.Module, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = isinstance(inputs, Tensor) and inputs.dim() == 2
        if rows and context is not None:
            rows = context.shape[:-1] == inputs.shape[:-1]
        got = inverted(self, inputs, context) if rows else None
        return original.inverse(self, inputs, context) if got is None else got

    return {"inverse": inverse}


def read(transform: nn.Module) -> Made:
    """Of a MaskedAffineAutoregressive or a MaskedPiecewiseRationalQuadraticAutoregressive.

    Raises:
        Unknown: it has a part that is not known here.
    """
    from normflows.nets import made

    net = transform.autoregressive_net
    layers = layers_of(net, made, gated=True)
    if type(net.preprocessing) is not nn.Identity:
        raise Unknown(f"a preprocessing of type {type(net.preprocessing).__name__}")
    check_plain(net.preprocessing)
    features, parameters = net.initial_layer.in_features, tuple(net.parameters())
    return Made(features, layers, _univariate(transform), parameters, context_of(net), statistics_of(net))


def _univariate(transform: nn.Module) -> Univariate:
    P = transform._output_dim_multiplier()
    if not hasattr(transform, "num_bins"):
        return Univariate(P, alone(transform, P), ("affine_sigmoid", (2.0, 1e-3)))
    if transform.tails not in (None, "linear", "circular"):
        raise Unknown(f"a spline with tails {transform.tails!r}")
    if isinstance(transform.tail_bound, Tensor):
        if transform.tail_bound.numel() != 1:
            raise Unknown("a spline with a bound for each feature")
        engine: tuple[str, tuple[float, ...]] | str = "a spline whose bound is a tensor"
    else:
        engine = "a circular spline" if transform.tails == "circular" else spline_of(transform)
    return Univariate(P, alone(transform, P), engine, inside if transform.tails is None else None)
