"""The masked autoregressive flows that bench/test_made.py times, as their libraries build them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

LAYERS = 5  # transforms in a flow, the usual number of sbi and zuko's tutorials; two hidden layers or blocks in each


class Flow(NamedTuple):
    """A flow of D features, and its two directions.

    slow: the one for which the library runs the net D times, for B rows.
    fast: the other one, one pass of the net, for given rows.
    inverse: slow, from given noise: x and the log-density or log-determinant.
    """

    module: nn.Module
    slow: Callable[[nn.Module, int], object]
    fast: Callable[[nn.Module, Tensor], object]
    inverse: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


def build(library: str, kind: str, D: int, hidden: int) -> Flow:
    """kind: "MAF", affine, or "NSF", rational-quadratic splines of 8 bins. Every weight is moved off its initial value,
    since some of these nets begin as the identity."""
    torch.manual_seed(0)
    flow = {"zuko": _zuko, "nflows": _nflows, "normflows": _normflows}[library](kind, D, hidden)
    with torch.no_grad():
        for parameter in flow.module.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 / parameter.size(-1) ** 0.5))
    flow.module.eval()
    return flow


def double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


def multiply_adds(module: nn.Module) -> int:
    """Of one masked pass of all nets, for one row."""
    return int(sum(layer.mask.sum() for layer in module.modules() if isinstance(getattr(layer, "mask", None), Tensor)))


def _zuko(kind: str, D: int, hidden: int) -> Flow:
    import zuko

    module = getattr(zuko.flows, kind)(D, transforms=LAYERS, hidden_features=(hidden, hidden))
    return Flow(
        module,
        lambda flow, B: flow().sample((B,)),
        lambda flow, x: flow().log_prob(x),
        lambda flow, z: flow().transform.inv.call_and_ladj(z),
    )


def _nflows(kind: str, D: int, hidden: int) -> Flow:
    from nflows import distributions, flows, transforms

    parts = []
    for _ in range(LAYERS):
        if kind == "MAF":
            parts.append(transforms.MaskedAffineAutoregressiveTransform(D, hidden, num_blocks=2))
            # Scales of about 1, as training on standardized data leaves them. They begin at 0.69, and then samples
            # overflow, since features grow from one to the next.
            with torch.no_grad():
                parts[-1].autoregressive_net.final_layer.bias.view(D, 2)[:, 0] += 0.54
                parts[-1].autoregressive_net.final_layer.weight.mul_(0.3)
        else:
            parts.append(
                transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                    D, hidden, num_bins=8, tails="linear", tail_bound=5.0, num_blocks=2
                )
            )
        parts.append(transforms.RandomPermutation(D))
    module = flows.Flow(transforms.CompositeTransform(parts), distributions.StandardNormal([D]))
    return Flow(
        module,
        lambda flow, B: flow.sample(B),
        lambda flow, x: flow.log_prob(x),
        lambda flow, z: flow._transform.inverse(z),
    )


def _normflows(kind: str, D: int, hidden: int) -> Flow:
    """Its affine flows sample by one pass and have the slow density. Its splines are the other way round."""
    import normflows

    parts = []
    for _ in range(LAYERS):
        if kind == "MAF":
            parts.append(normflows.flows.MaskedAffineAutoregressive(D, hidden, num_blocks=2))
        else:
            parts.append(normflows.flows.AutoregressiveRationalQuadraticSpline(D, 2, hidden, num_bins=8, tail_bound=5))
        parts.append(normflows.flows.Permute(D, mode="swap" if D % 2 == 0 else "shuffle"))
    module = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(D, trainable=False), parts)
    if kind == "NSF":
        return Flow(
            module,
            lambda flow, B: flow.sample(B),
            lambda flow, x: flow.log_prob(x),
            lambda flow, z: flow.forward_and_log_det(z),
        )
    rows: dict[int, Tensor] = {}
    return Flow(
        module,
        lambda flow, B: flow.log_prob(rows.setdefault(B, torch.randn(B, D))),
        lambda flow, z: flow.forward_and_log_det(z),
        lambda flow, x: flow.inverse_and_log_det(x),
    )
