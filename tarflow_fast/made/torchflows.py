"""The masked autoregressive bijections of torchflows, as `net.py` describes them.

The log-determinant of the sweep is that of the inverse at the noise y. The library writes the features over the noise
as it goes, so that its own adds up the slopes of the inverse at x instead of those at y. The two agree where the slope
does not depend on the place, which is so for affine bijections, and not for splines.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tarflow_fast.made.net import IDENTITY, Layer, Made, Univariate, Unknown, activation_of, check_plain, masked

Inverted = Callable[[nn.Module, Tensor, "Tensor | None"], "tuple[Tensor, Tensor] | None"]

__all__ = ["KNOWN", "is_autoregressive", "methods", "read"]

_HERE = "torchflows.bijections.finite.autoregressive"
_KINDS = ("Affine", "RQS", "LRS", "DeepSigmoidal", "DenseSigmoidal", "DeepDenseSigmoidal")
_NAMES = [f"{kind}{way}MaskedAutoregressive" for kind in _KINDS for way in ("Forward", "Inverse")]
_BASES = ("MaskedAutoregressiveBijection", "InverseMaskedAutoregressiveBijection")
KNOWN = (
    *(f"{_HERE}.layers_base.{name}" for name in _BASES),
    *(f"{_HERE}.layers.{name}" for name in (*_NAMES, "UMNNMaskedAutoregressive")),
)


def is_autoregressive(kind: type) -> bool:
    """Whether it is the class of bijections that torchflows inverts by running a net D times."""
    return kind.__module__ == f"{_HERE}.layers_base" and kind.__name__ == _BASES[0]


def methods(original: type, inverted: Inverted) -> dict[str, object]:
    """What the class of accelerated bijections defines: `inverse`, or `forward` where that is the slow direction."""

    def flat(self: nn.Module, y: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor] | None:
        event, shape = tuple(self.event_shape), self.conditioner_transform.context_shape
        if not event or not isinstance(y, Tensor) or tuple(y.shape[-len(event) :]) != event:
            return None
        batch, noise = y.shape[: -len(event)], y
        if context is not None:
            if not shape or tuple(context.shape) != (*batch, *shape):
                return None
            context = context.reshape(*batch, -1)
        got = inverted(self, noise.reshape(*batch, self.n_dim), context)
        return None if got is None else (got[0].reshape(y.shape), got[1])

    def inverse(self: nn.Module, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        got = flat(self, z, context)
        return original.inverse(self, z, context) if got is None else got

    def forward(self: nn.Module, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        got = flat(self, x, context)
        return original.forward(self, x, context) if got is None else got

    swapped = any(base.__name__ == _BASES[1] for base in original.__mro__)
    return {"forward": forward} if swapped else {"inverse": inverse}


def read(bijection: nn.Module) -> Made:
    """Of a MaskedAutoregressiveBijection or an InverseMaskedAutoregressiveBijection.

    Raises:
        Unknown: it has a part that is not known here.
    """
    from torchflows.bijections.finite.autoregressive.conditioning.context import Concatenation
    from torchflows.bijections.finite.autoregressive.conditioning.transforms import MADE

    if {"forward", "inverse"} & set(vars(bijection)):
        raise Unknown("forward and inverse exchanged by invert()")
    conditioner = bijection.conditioner_transform
    if type(conditioner) is not MADE or type(conditioner.context_combiner) is not Concatenation:
        raise Unknown(f"a conditioner of type {type(conditioner).__name__}")
    check_plain(conditioner, conditioner.context_combiner)
    if conditioner.global_parameter_mask is not None:
        raise Unknown("parameters that are the same for all inputs")
    if (conditioner.output_lower_bound, conditioner.output_upper_bound) != (-torch.inf, torch.inf):
        raise Unknown("bounds on the outputs of the conditioner")
    layers = _layers(conditioner.sequential, bijection.n_dim, MADE.MaskedLinear)
    univariate, context = _univariate(bijection.transformer), conditioner.context_combiner.n_context_dims
    return Made(bijection.n_dim, layers, univariate, tuple(bijection.parameters()), context)


def _layers(net: nn.Sequential, features: int, kind: type) -> tuple[Layer, ...]:
    if type(net) is not nn.Sequential:
        raise Unknown(f"a net of type {type(net).__name__}")
    check_plain(net)
    layers: list[Layer] = []
    activation = IDENTITY
    for i, module in enumerate(net):
        if i % 2:
            activation = activation_of(module)
        elif type(module) is kind:
            layers.append(masked(module, None if i else features, source=len(layers), activation=activation))
        else:
            raise Unknown(f"a {type(module).__name__} where a MaskedLinear was expected")
    if len(net) % 2 == 0:
        raise Unknown("an activation after the last layer")
    return tuple(layers)


def _univariate(transformer: nn.Module) -> Univariate:
    from torchflows.bijections.finite.autoregressive.transformers.linear import affine
    from torchflows.bijections.finite.autoregressive.transformers.spline.linear import Linear
    from torchflows.bijections.finite.autoregressive.transformers.spline.linear_rational import LinearRational
    from torchflows.bijections.finite.autoregressive.transformers.spline.rational_quadratic import RationalQuadratic

    t, kind = transformer, type(transformer)
    # The others are inverted by a bisection that ends for the whole batch at once, or depend on the place of a feature.
    if kind not in (Linear, LinearRational, RationalQuadratic) and kind.__module__ != affine.__name__:
        raise Unknown(f"a transformer of type {kind.__name__}")
    P, single = t.n_parameters_per_element, copy.copy(t)
    single.event_shape = torch.Size((1,))

    def inverse(y: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = single.inverse(y.reshape(-1, 1), phi.reshape(-1, 1, P))
        return x.view(y.shape), log_det.view(y.shape)

    engine: tuple[str, tuple[float, ...]] | str = f"a transformer of type {kind.__name__}"
    if kind in (affine.Affine, affine.SafeAffine):
        engine = "affine_exp", (t.identity_unconstrained_alpha, 1 / t.const, t.m)
    elif kind is RationalQuadratic and t.max_input == t.max_output == -t.min_input == -t.min_output:
        constants = t.n_bins, t.max_input, t.min_bin_size, t.min_delta, t.boundary_u_delta
        engine = "spline_torchflows", tuple(map(float, constants))
    return Univariate(P, inverse, engine)
