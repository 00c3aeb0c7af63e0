"""zuko: one sweep against as many passes, over drawn orders, graphs, nets, contexts and univariate transforms."""

from functools import partial

import pytest
import torch
from compare import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from made_cases import PATHS, Case, check_exact, check_same_draws, invert_zuko, loosen, zuko_case
from torch import nn

zuko = pytest.importorskip("zuko")

from tarflow_fast import made  # noqa: E402

law = settings(max_examples=12, deadline=None, derandomize=True)
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, partial(nn.ELU, 0.7), nn.Identity)


def spline(bins, **options):
    univariate = partial(zuko.transforms.MonotonicRQSTransform, **options)
    return {"univariate": univariate, "shapes": ((bins,), (bins,), (bins - 1,))}


nets = st.fixed_dictionaries(
    {
        "hidden_features": st.lists(st.sampled_from([3, 8, 40, 70]), min_size=0, max_size=3),
        "residual": st.booleans(),
        "activation": st.sampled_from(ACTIVATIONS),
    }
).filter(lambda net: net["hidden_features"] or not net["residual"])  # zuko has no residual net without a hidden layer
univariates = st.sampled_from([{}, spline(8), spline(3, bound=2.0, slope=1e-2), spline(1)])


@pytest.mark.parametrize("path", PATHS)
@law
@given(st.integers(2, 40), st.sampled_from([0, 0, 1, 3]), st.integers(0, 99), nets, univariates)
def test_orders(path, D, context, seed, net, univariate):
    torch.manual_seed(seed)
    passes = None if seed % 2 else 1 + seed % D
    if passes == 1 and not context:
        passes = 2  # with no input at all zuko builds no net
    check_exact(zuko_case(D, context, passes=passes, order=torch.randperm(D), **net, **univariate), path)


@pytest.mark.parametrize("path", PATHS)
@law
@given(st.integers(2, 20), st.sampled_from([0, 2]), st.integers(0, 99), nets)
def test_graphs(path, D, context, seed, net):
    """Of a random directed graph without circles, in which the features lie in any order."""
    torch.manual_seed(seed)
    adjacency = torch.eye(D, dtype=torch.bool) | (torch.rand(D, D) < 0.4).tril(-1)
    adjacency[-1, 0] = True
    places = torch.randperm(D)
    check_exact(zuko_case(D, context, adjacency=adjacency[places][:, places], **net), path)


@pytest.mark.parametrize("path", PATHS)
def test_contexts_of_any_shape_broadcast(path):
    case = zuko_case(4, 2)
    for y_shape, c_shape in (((4,), (2,)), ((5, 4), (2,)), ((4,), (5, 2)), ((3, 1, 4), (5, 2))):
        y, context = torch.randn(y_shape), torch.randn(c_shape)
        made.restore(case.module)
        expected = case.run(y, context)
        case.accelerate(path)
        got = case.run(y, context)
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["MAF", "NSF"])
def test_a_flow_samples_the_same(path, name):
    flow = loosen(getattr(zuko.flows, name)(5, 3, transforms=3, randperm=True), 0.3)
    context = torch.randn(7, 3)
    check_same_draws(flow, lambda: (flow(context).sample((4,)), *flow(context).rsample_and_log_prob((4,))), path, 3)


@pytest.mark.parametrize("name", ["NCSF", "SOSPF", "BPF"])
def test_other_univariates_run_in_pytorch(name):
    """Circular splines, and two that zuko inverts by bisection, which our sweep does in the same way."""
    flow = getattr(zuko.flows, name)(4, transforms=1).eval()
    transform = next(module for module in flow.modules() if hasattr(module, "hyper"))
    y = torch.rand(24, 4) - 0.5
    case = Case(transform, invert_zuko, (4,))
    expected = case.run(y)
    with pytest.raises(RuntimeError, match="cannot take"):
        made.accelerate(flow, "cpu")
    made.accelerate(flow)
    (explanation,) = made.explain(flow)
    assert explanation.path == "torch" and "univariate" in explanation.reason
    for ours, theirs in zip(case.run(y), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["NAF", "UNAF"])
def test_a_net_for_each_feature_is_left_to_zuko(name):
    flow = getattr(zuko.flows, name)(3, transforms=1)
    with pytest.raises(ValueError, match=r"univariate transform (U|)MNN"):
        made.accelerate(flow)


def test_a_function_from_elsewhere_is_left_to_zuko():
    def make(shift, scale):
        return zuko.transforms.MonotonicAffineTransform(shift, scale)

    with pytest.raises(ValueError, match="univariate transform make"):
        made.accelerate(zuko_case(3, univariate=make).module)


@pytest.mark.parametrize("path", PATHS)
def test_one_feature_is_not_autoregressive(path):
    with pytest.raises(ValueError, match="no autoregressive transform in a MAF"):
        made.accelerate(zuko.flows.MAF(1), path)


@pytest.mark.parametrize("path", PATHS)
def test_the_caller_keeps_its_noise(path):
    case = zuko_case(6)
    case.accelerate(path)
    y = case.noise()
    before = y.clone()
    case.run(y)
    assert same_bits(y, before)
