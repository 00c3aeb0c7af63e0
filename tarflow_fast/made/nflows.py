"""The masked autoregressive transforms of nflows, of which sbi builds posteriors, as `net.py` describes them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tarflow_fast.made.blocks import alone, context_of, inside, layers_of, spline_of, statistics_of
from tarflow_fast.made.net import Made, Univariate

Inverted = Callable[[nn.Module, Tensor, "Tensor | None"], "tuple[Tensor, Tensor] | None"]

__all__ = ["KNOWN", "is_autoregressive", "methods", "read"]

_HERE = "nflows.transforms.autoregressive"
_KINDS = ("Affine", "PiecewiseLinear", "PiecewiseQuadratic", "PiecewiseCubic", "PiecewiseRationalQuadratic")
KNOWN = tuple(f"{_HERE}.Masked{kind}AutoregressiveTransform" for kind in _KINDS)


def is_autoregressive(kind: type) -> bool:
    """Whether it is the class of transforms that nflows inverts by running a net D times."""
    return kind.__module__ == _HERE and kind.__name__ == "AutoregressiveTransform"


def methods(original: type, inverted: Inverted) -> dict[str, object]:
    """What the class of accelerated transforms defines."""

    def inverse(self: nn.Module, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # The library broadcasts a context of one row; what else it makes of other shapes is its own affair.
        rows = isinstance(inputs, Tensor) and inputs.dim() == 2
        if rows and context is not None:
            rows = context.dim() == 1 or (context.dim() == 2 and context.size(0) in (1, inputs.size(0)))
        got = inverted(self, inputs, context) if rows else None
        return original.inverse(self, inputs, context) if got is None else got

    return {"inverse": inverse}


def read(transform: nn.Module) -> Made:
    """Of a Masked...AutoregressiveTransform of nflows.

    Raises:
        Unknown: its net has a part that is not known here.
    """
    from nflows.transforms import made

    net = transform.autoregressive_net
    layers = layers_of(net, made, gated=False)
    features, parameters = net.initial_layer.in_features, tuple(net.parameters())
    return Made(features, layers, _univariate(transform), parameters, context_of(net), statistics_of(net))


def _univariate(transform: nn.Module) -> Univariate:
    P, tails = transform._output_dim_multiplier(), getattr(transform, "tails", None)
    kind = next(name for base in type(transform).__mro__ for name in KNOWN if name.endswith(f".{base.__name__}"))
    if kind == KNOWN[0]:
        return Univariate(P, alone(transform, P), ("affine_softplus", (float(transform._epsilon),)))
    engine: tuple[str, tuple[float, ...]] | str = f"a {type(transform).__name__}"
    if kind == KNOWN[-1]:
        engine = spline_of(transform)
    return Univariate(P, alone(transform, P), engine, None if tails == "linear" else inside)
