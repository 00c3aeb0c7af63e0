"""nflows and normflows: one sweep against D passes, over drawn nets, contexts and univariate transforms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_cases import PATHS, check_exact, check_same_draws, loosen, nflows_case, normflows_case
from torch import nn
from torch.nn import functional as F

nflows = pytest.importorskip("nflows")
normflows = pytest.importorskip("normflows")

from tarflow_fast import made  # noqa: E402

law = settings(max_examples=12, deadline=None, derandomize=True)
ACTIVATIONS = (F.relu, torch.relu, F.leaky_relu, F.elu, torch.tanh, F.tanh, torch.sigmoid, F.silu, F.gelu)
ACTIVATIONS += (nn.ReLU(), nn.Tanh(), nn.SiLU(), nn.ELU(0.5), nn.LeakyReLU(0.2), nn.GELU(), nn.Identity())
MAKE = {"nflows": nflows_case, "normflows": normflows_case}

nets = st.fixed_dictionaries(
    {
        "hidden": st.sampled_from([1, 3, 16, 50]),
        "context": st.sampled_from([None, None, 1, 3]),
        "num_blocks": st.integers(0, 3),
        "activation": st.sampled_from(ACTIVATIONS),
        "use_batch_norm": st.booleans(),
        "dropout_probability": st.sampled_from([0.0, 0.4]),
    }
)
blocks = st.sampled_from([{}, {}, {"use_residual_blocks": False}, {"use_residual_blocks": False, "random_mask": True}])
RQ = "PiecewiseRationalQuadratic"
tails = {"tails": "linear", "tail_bound": 2.0}
univariates = st.sampled_from(
    [("Affine", {}), (RQ, {"num_bins": 8, **tails}), (RQ, {"num_bins": 1, **tails}), (RQ, {"num_bins": 5})]
)


def options_of(library, net, block):
    """normflows has no feed-forward blocks with a context."""
    options = {**net, **block}
    return {**options, "context": None} if library == "normflows" and block else options


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("library", MAKE)
@law
@given(st.integers(1, 40), st.integers(0, 99), nets, blocks, univariates)
def test_nets(path, library, D, seed, net, block, univariate):
    torch.manual_seed(seed)
    kind, options = univariate
    if library == "normflows" and kind == RQ:
        options = {**options, "permute_mask": seed % 2 == 0}
    check_exact(MAKE[library](kind, D, **options_of(library, net, block), **options), path)


@pytest.mark.parametrize("kind, options", [
    ("PiecewiseLinear", {"num_bins": 4}),
    ("PiecewiseQuadratic", {"num_bins": 4}),
    ("PiecewiseQuadratic", {"num_bins": 4, **tails}),
    ("PiecewiseCubic", {"num_bins": 4}),
])  # fmt: skip
@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("path", PATHS)
def test_other_splines_run_in_pytorch(path, kind, options, context):
    check_exact(nflows_case(kind, 6, 20, context, **options), path)


def test_circular_splines_run_in_pytorch():
    check_exact(normflows_case(RQ, 6, 20, 2, tails="circular", tail_bound=2.0), "torch")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["Affine", RQ])
def test_hidden_features_scale_the_spline(path, kind):
    """Where a net says how wide it is, the raw widths and heights are divided by the square root of it."""
    case = nflows_case(kind, 5, 16, **({"num_bins": 6, **tails} if kind == RQ else {}))
    case.module.autoregressive_net.hidden_features = 16
    check_exact(case, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("library", MAKE)
def test_a_flow_samples_the_same(path, library):
    torch.manual_seed(0)
    if library == "nflows":
        from nflows import distributions, flows, transforms

        kinds = transforms.MaskedAffineAutoregressiveTransform, transforms.RandomPermutation
        layers = [transforms.CompositeTransform([kinds[0](5, 20, context_features=2), kinds[1](5)]) for _ in range(3)]
        flow = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([5]))
        context = torch.randn(4, 2)

        def run():
            return flow.sample_and_log_prob(6, context)
    else:
        spline = normflows.flows.AutoregressiveRationalQuadraticSpline
        base = normflows.distributions.DiagGaussian(5, trainable=False)
        flow = normflows.NormalizingFlow(base, [spline(5, 2, 20) for _ in range(3)])

        def run():
            return flow.sample(24)

    check_same_draws(loosen(flow), run, path, 3)


@pytest.mark.parametrize("path", PATHS)
def test_contexts_that_the_library_broadcasts(path):
    case = nflows_case("Affine", 4, 10, 2)
    y = torch.randn(5, 4)
    for context in (torch.randn(2), torch.randn(1, 2), torch.randn(5, 2)):
        made.restore(case.module)
        expected = case.run(y, context)
        case.accelerate(path)
        for ours, theirs in zip(case.run(y, context), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("library", MAKE)
def test_noise_outside_the_domain_is_refused_as_by_the_library(path, library):
    case = MAKE[library](RQ, 4, 10, num_bins=4)
    case.accelerate(path)
    y = torch.rand(5, 4)
    case.run(y)
    for bad in (1.5, -0.5):
        y[2, 1] = bad
        errors = []
        for _ in range(2):
            with pytest.raises(Exception) as error:
                case.run(y)
            errors.append(error.type)
            made.restore(case.module)
        assert errors[0] is errors[1]
        case.accelerate(path)


UNKNOWN = {
    "batch norm in training mode": ({"use_batch_norm": True}, lambda module: module.train()),
    "dropout in training mode": ({"dropout_probability": 0.5}, lambda module: module.train()),
    "activation": ({"activation": torch.sin}, lambda module: None),
    "in place": ({"activation": nn.ReLU(inplace=True)}, lambda module: None),
    "hooks": ({}, lambda module: module.autoregressive_net.blocks[0].register_forward_hook(lambda *_: None)),
}  # fmt: skip


@pytest.mark.parametrize("library", MAKE)
@pytest.mark.parametrize("reason", UNKNOWN)
def test_what_is_not_known_is_left_to_the_library(library, reason):
    options, change = UNKNOWN[reason]
    case = MAKE[library]("Affine", 4, 10, **options)
    change(case.module)
    with pytest.raises(ValueError, match=reason):
        made.accelerate(case.module)
    (explanation,) = made.explain(case.module)
    assert explanation.path == "library"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("library", MAKE)
def test_dropout_of_nothing_does_not_matter_in_training(path, library):
    case = MAKE[library]("Affine", 4, 10)
    case.module.train()
    check_exact(case, path)


@pytest.mark.parametrize("kind", ["tails", "bounds"])
def test_periodic_features_are_left_to_normflows(kind):
    options = {"tails": ["circular", "linear"]} if kind == "tails" else {"tails": "linear"}
    bound = torch.tensor([1.0, 2.0]) if kind == "bounds" else 1.0
    with pytest.raises(ValueError, match="Periodic" if kind == "tails" else "a bound for each feature"):
        made.accelerate(normflows_case(RQ, 2, 10, tail_bound=bound, **options).module)
