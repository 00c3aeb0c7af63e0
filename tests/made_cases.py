"""Masked autoregressive transforms of the libraries, and how the accelerated ones are held to them."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from compare import Judged
from torch import nn

from tarflow_fast import made, native

PATHS = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(not native.available(), reason=native.reason()))]
ROWS, NEIGHBOURS = 24, 6


class Case(NamedTuple):
    """A transform, and its slow direction: invert(transform, y, context) -> x, log_det.

    features: the shape of one y. context: the shape of one context, or None. unit: the noise lies in [0, 1]. engine:
    whether the C++ engine takes it. plain: the library's own answer, where `invert` does not give a right one.
    """

    module: nn.Module
    invert: Callable[[Any, torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor]]
    features: tuple[int, ...]
    context: tuple[int, ...] | None = None
    unit: bool = False
    engine: bool = True
    plain: Callable | None = None

    def noise(self, B=ROWS, scale=1.0):
        return torch.rand(B, *self.features) if self.unit else torch.randn(B, *self.features) * scale

    def contexts(self, B=ROWS):
        return None if self.context is None else torch.randn(B, *self.context)

    def accelerate(self, path):
        """On this path, or for what the engine does not take, on that in PyTorch, after "cpu" was refused."""
        expected = path if self.engine else "torch"
        if expected != path:
            with pytest.raises(RuntimeError, match="path 'cpu' cannot take"):
                made.accelerate(self.module, path)
        made.accelerate(self.module, expected)
        assert {each.path for each in made.explain(self.module)} == {expected}
        return self.module

    def run(self, y, context=None):
        with torch.no_grad():
            return self.invert(self.module, y, context)


def loosen(module, scale=0.3):
    """Every weight moved off its initial value, where many of these nets are the identity."""
    with torch.no_grad():
        for parameter in module.parameters():
            width = parameter.size(-1) if parameter.dim() > 1 else 4
            parameter.add_(torch.randn_like(parameter) * scale / max(width, 1) ** 0.5)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm1d):
                norm.running_mean.normal_(0, 0.3)
                norm.running_var.uniform_(0.5, 1.5)
    return module.eval()


def check_exact(case, path, y=None):
    """x and log_det by the error rule: float64 is the judge, the library's own float32 the measure.

    The largest errors of a flow are those of the row whose rounding it amplifies most, and there both are mere luck: of
    24 rows alone, 3 in 100 transforms fail in one order of sums or another. So the same rows are judged several times,
    with all weights, noise and contexts moved by an ulp or two.
    """
    y = case.noise() if y is None else y
    context, plain, judged = case.contexts(len(y)), case.plain or case.invert, Judged()
    for _ in range(NEIGHBOURS):
        with torch.no_grad():
            for parameter in case.module.parameters():
                parameter.copy_(near(parameter))
            made.restore(case.module)
            noise, given = near(y).clamp(0, 1) if case.unit else near(y), None if context is None else near(context)
            twin = copy.deepcopy(case.module).double()
            truth = plain(twin, noise.double(), None if given is None else given.double())
            expected = plain(case.module, noise, given)
        case.accelerate(path)
        for name, *each in zip(("x", "log_det"), case.run(noise, given), truth, expected, strict=True):
            judged.add(name, *each)
    judged.check()


def check_same_draws(flow, run, path, transforms):
    """The tensors that run() gives are those from before `accelerate`, with the same seed."""
    answers = []
    for ours in (False, True):
        if ours:
            made.accelerate(flow, path)
            assert [each.path for each in made.explain(flow)] == [path] * transforms
        torch.manual_seed(1)
        with torch.no_grad():
            answers.append(run())
    for before, after in zip(*answers, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def near(tensor):
    """Numbers at most two ulp away."""
    return tensor * (1 + torch.randint(-2, 3, tensor.shape) * (torch.finfo(tensor.dtype).eps / 2))


def zuko_case(D, context=0, **options):
    zuko = pytest.importorskip("zuko")
    transform = loosen(zuko.flows.MaskedAutoregressiveTransform(D, context, **options))
    return Case(transform, invert_zuko, (D,), (context,) if context else None)


def invert_zuko(transform, y, context):
    return transform(context).inv.call_and_ladj(y)


def invert(transform, y, context):
    return transform.inverse(y, context)


def nflows_case(kind, D, hidden, context=None, **options):
    transforms = pytest.importorskip("nflows.transforms")
    make = getattr(transforms, f"Masked{kind}AutoregressiveTransform")
    transform = loosen(make(features=D, hidden_features=hidden, context_features=context, **options))
    unit = kind != "Affine" and options.get("tails") is None
    engine = kind in ("Affine", "PiecewiseRationalQuadratic")
    return Case(transform, invert, (D,), context and (context,), unit, engine)


def normflows_case(kind, D, hidden, context=None, **options):
    flows = pytest.importorskip("normflows.flows")
    from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive

    make = flows.MaskedAffineAutoregressive if kind == "Affine" else MaskedPiecewiseRationalQuadraticAutoregressive
    transform = loosen(make(features=D, hidden_features=hidden, context_features=context, **options))
    tails = options.get("tails")
    return Case(
        transform, invert, (D,), context and (context,), kind != "Affine" and tails is None, tails != "circular"
    )


def torchflows_case(transformer, event, context=None, swapped=False, conditioner=None, **options):
    """transformer: a class of torchflows. swapped: its forward is the slow direction."""
    base = pytest.importorskip("torchflows.bijections.finite.autoregressive.layers_base")
    make = base.InverseMaskedAutoregressiveBijection if swapped else base.MaskedAutoregressiveBijection
    transform = make(event, transformer, context, transformer_kwargs=options, conditioner_kwargs=conditioner)
    slow, fast = ("forward", "inverse") if swapped else ("inverse", "forward")

    def run(transform, y, context):
        return getattr(transform, slow)(y, context)

    def plain(transform, y, context):
        """The log_det of the library's slow direction is that of another place, unless the bijection is affine."""
        x, _ = run(transform, y, context)
        return x, -getattr(transform, fast)(x, context)[1]

    name = transformer.__name__
    engine = name in ("Affine", "SafeAffine", "RationalQuadratic")
    affine = name in ("Affine", "SafeAffine", "InverseAffine", "Shift", "Scale")
    return Case(loosen(transform, 0.2), run, event, context, False, engine, None if affine else plain)
