"""The masked autoregressive transforms of zuko (MAF, NSF), as `net.py` describes them."""

from __future__ import annotations

import copy
import copyreg
import functools
import math
from collections.abc import Callable

from torch import Tensor, nn

from tarflow_fast.made.net import IDENTITY, Layer, Made, Univariate, Unknown, activation_of, check_plain, masked

Inverted = Callable[[nn.Module, Tensor, "Tensor | None"], "tuple[Tensor, Tensor] | None"]

__all__ = ["KNOWN", "is_autoregressive", "methods", "read"]

KNOWN = ("zuko.flows.autoregressive.MaskedAutoregressiveTransform",)


def is_autoregressive(kind: type) -> bool:
    """Whether it is a class of transforms that zuko inverts by running a net several times."""
    return kind.__module__ == "zuko.flows.autoregressive" and kind.__name__ == "MaskedAutoregressiveTransform"


def methods(original: type, inverted: Inverted) -> dict[str, object]:
    """What the class of accelerated transforms defines: forward gives a transform whose inverse is swept."""

    def forward(self: nn.Module, c: Tensor | None = None) -> object:
        transform = original.forward(self, c)
        transform.__class__ = _swept()
        transform.swept = functools.partial(inverted, self), c
        return transform

    return {"forward": forward}


@functools.cache
def _swept() -> type:
    """The class of transforms whose inverse is one sweep."""
    from torch.distributions.transforms import Transform, _InverseTransform
    from zuko.transforms import AutoregressiveTransform

    class SweptInverse(_InverseTransform):
        """The inverse, whose log-determinant comes out of the sweep."""

        def call_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
            inverted, context = self._inv.swept
            got = inverted(y, context)
            if got is not None:
                return got
            x = self._inv._inverse_by_passes(y)
            return x, self.log_abs_det_jacobian(y, x)

    class SweptAutoregressiveTransform(AutoregressiveTransform):
        """zuko's, with `_inverse` by one sweep."""

        def _inverse(self, y: Tensor) -> Tensor:
            inverted, context = self.swept
            got = inverted(y, context)
            return self._inverse_by_passes(y) if got is None else got[0]

        def _inverse_by_passes(self, y: Tensor) -> Tensor:
            return AutoregressiveTransform._inverse(self, y)

        def __reduce_ex__(self, protocol: int) -> tuple:
            """As zuko's own: files know nothing of the sweep."""
            state = {name: each for name, each in self.__getstate__().items() if name != "swept"}
            return copyreg._reconstructor, (AutoregressiveTransform, object, None), state

        def __deepcopy__(self, memo: dict[int, object]) -> Transform:
            new = memo[id(self)] = copyreg.__newobj__(type(self))
            new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
            return new

        @property
        def inv(self) -> SweptInverse:
            return SweptInverse(self)

    return SweptAutoregressiveTransform


def read(transform: nn.Module) -> Made:
    """Of a zuko.flows.MaskedAutoregressiveTransform.

    Raises:
        Unknown: its net has a part that is not known here.
    """
    features = transform.hyper.out_features // transform.total
    layers = _layers(transform.hyper, features)
    context = transform.hyper.in_features - features
    univariate = _univariate(transform.univariate, tuple(transform.shapes), transform.total)
    return Made(features, layers, univariate, tuple(transform.hyper.parameters()), context)


def _layers(net: nn.Module, features: int) -> tuple[Layer, ...]:
    from zuko.nn import MaskedLinear, MaskedMLP, Residual

    if type(net) is not MaskedMLP:
        raise Unknown(f"a net of type {type(net).__name__}")
    check_plain(net)
    layers: list[Layer] = []
    activation = IDENTITY

    def add(linear: nn.Module, **options: object) -> None:
        if type(linear) is not MaskedLinear:
            raise Unknown(f"a {type(linear).__name__} where a MaskedLinear was expected")
        layers.append(masked(linear, None if layers else features, **options))

    for module in net:
        if type(module) is MaskedLinear:
            add(module, source=len(layers), activation=activation)
            activation = IDENTITY
        elif type(module) is Residual:
            check_plain(module)
            if len(module) != 3 or not layers or activation is not IDENTITY:
                raise Unknown("a residual block of another form")
            source = len(layers)
            add(module[0], source=source)
            add(module[2], source=source + 1, activation=activation_of(module[1]), residual=source)
        else:
            if activation is not IDENTITY or not layers:
                raise Unknown("an activation where a MaskedLinear was expected")
            activation = activation_of(module)
    if activation is not IDENTITY:
        raise Unknown("an activation after the last layer")
    return tuple(layers)


def _univariate(make: object, shapes: tuple, total: int) -> Univariate:
    from zuko.transforms import MonotonicAffineTransform, MonotonicRQSTransform
    from zuko.utils import unpack

    def inverse(y: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        inverted = make(*unpack(phi, shapes)).inv
        return inverted.call_and_ladj(y)

    kind, options = (make.func, make.keywords) if isinstance(make, functools.partial) else (make, {})
    # NAF has a net for each feature, and a function from elsewhere could have the like: its features cannot be parted.
    if isinstance(kind, nn.Module) or not getattr(kind, "__module__", "").startswith("zuko."):
        raise Unknown(f"a univariate transform {getattr(kind, '__name__', type(kind).__name__)}")
    if any(isinstance(each, Tensor) for each in options.values()):
        raise Unknown("a univariate transform with a tensor among its options")
    positional = isinstance(make, functools.partial) and make.args
    slope = options.get("slope", 1e-3)
    if not 0 < slope < 1:
        raise Unknown(f"a slope of {slope}")
    engine: tuple[str, tuple[float, ...]] | str = f"no univariate transform {getattr(kind, '__name__', kind)}"
    sizes = [math.prod(shape) for shape in shapes]
    if kind is MonotonicAffineTransform and not positional and sizes == [1, 1] and set(options) <= {"slope"}:
        engine = "affine_zuko", (math.log(slope),)
    elif kind is MonotonicRQSTransform and not positional and set(options) <= {"slope", "bound"} and len(sizes) == 3:
        bound, K = options.get("bound", 5.0), sizes[0]
        if sizes == [K, K, K - 1] and all(len(shape) == 1 for shape in shapes):
            engine = "spline_zuko", (K, bound, math.log(slope))
    return Univariate(total, inverse, engine)
