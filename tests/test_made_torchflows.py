"""torchflows: one sweep against D passes, over drawn events, contexts, nets and transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_cases import PATHS, Case, check_exact, loosen, torchflows_case

pytest.importorskip("torchflows")

from torchflows.bijections.base import invert
from torchflows.bijections.finite.autoregressive import layers
from torchflows.bijections.finite.autoregressive.architectures import IAF, MAF
from torchflows.bijections.finite.autoregressive.transformers.linear import affine
from torchflows.bijections.finite.autoregressive.transformers.spline.linear import Linear

from tarflow_fast import made

law = settings(max_examples=12, deadline=None, derandomize=True)
AFFINE = (affine.Affine, affine.SafeAffine, affine.InverseAffine, affine.Shift, affine.Scale)
RQ = layers.RationalQuadratic
transformers = st.sampled_from(
    [*((kind, {}) for kind in AFFINE), (RQ, {"boundary": 2.0}), (RQ, {}), (RQ, {"boundary": 2.0, "n_bins": 3})]
)
nets = st.fixed_dictionaries({"n_hidden": st.sampled_from([None, 3, 20, 50]), "n_layers": st.integers(1, 4)})
events = st.sampled_from([(2,), (7,), (40,), (3, 4), (2, 3, 2)])


@pytest.mark.parametrize("path", PATHS)
@law
@given(events, st.sampled_from([None, None, (2,), (2, 2)]), st.booleans(), nets, transformers)
def test_bijections(path, event, context, swapped, net, transformer):
    kind, options = transformer
    torch.manual_seed(len(event))
    case = torchflows_case(kind, event, context, swapped, net, **options)
    check_exact(case, path)


@pytest.mark.parametrize("transformer", [Linear, layers.LinearRational])
def test_other_splines_run_in_pytorch(transformer):
    """They come without an engine; the log-determinant of linear rational splines is approximate in torchflows."""
    case = torchflows_case(transformer, (6,), boundary=2.0)
    y = case.noise()
    expected = case.run(y)
    case.accelerate("torch")
    x, log_det = case.run(y)
    torch.testing.assert_close(x, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det, -case.module.forward(x)[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", PATHS)
def test_the_log_det_of_a_spline_is_that_of_the_jacobian(path):
    """The library's own is not: it adds up the slopes at x."""
    case = torchflows_case(RQ, (3,), conditioner={"n_hidden": 20}, boundary=3.0)
    with torch.no_grad():
        for parameter in case.module.parameters():
            parameter.mul_(300)  # torchflows divides the raw heights and slopes by 1000
    case.module.double()
    y = case.noise(4).double()
    theirs = case.run(y)[1]
    case.accelerate(path)
    x, ours = case.run(y)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda t: case.module(t)[0], each) for each in x])
    truth = -torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    assert ((theirs - truth).abs() > 1e-4).any()


NAMED = [
    *(f"{kind}{way}MaskedAutoregressive" for kind in ("Affine", "RQS", "LRS") for way in ("Forward", "Inverse")),
]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_named_layers_and_batches_of_any_shape(name, batch):
    module = loosen(getattr(layers, name)((4,)), 0.2)
    slow = "forward" if "Inverse" in name else "inverse"
    case = Case(module, lambda module, y, context: getattr(module, slow)(y, context), (4,))
    y = torch.randn(*batch, 4)
    expected = case.run(y)
    made.accelerate(module)
    (explanation,) = made.explain(module)
    assert explanation.path != "library" and explanation.transform == name
    x, log_det = case.run(y)
    assert x.shape == expected[0].shape and log_det.shape == expected[1].shape
    torch.testing.assert_close(x, expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["DeepSigmoidal", "DenseSigmoidal", "DeepDenseSigmoidal", "UMNN"])
def test_transformers_by_bisection_are_left_to_torchflows(name):
    name = "UMNNMaskedAutoregressive" if name == "UMNN" else f"{name}ForwardMaskedAutoregressive"
    with pytest.raises(ValueError, match="a transformer of type"):
        made.accelerate(getattr(layers, name)((4,)))


def test_what_is_not_known_is_left_to_torchflows():
    def case(**conditioner):
        return torchflows_case(affine.Affine, (4,), conditioner=conditioner).module

    with pytest.raises(ValueError, match="bounds on the outputs"):
        made.accelerate(case(output_lower_bound=-1.0))
    mask = torch.zeros(4, 2, dtype=torch.bool)
    mask[0, 0] = True
    with pytest.raises(ValueError, match="the same for all inputs"):
        made.accelerate(case(global_parameter_mask=mask))
    with pytest.raises(ValueError, match="exchanged"):
        made.accelerate(invert(case()))


@pytest.mark.parametrize("make", [MAF, IAF])
@pytest.mark.parametrize("path", PATHS)
def test_architectures(path, make):
    torch.manual_seed(0)
    bijection = loosen(make((5,), n_layers=3), 0.1)
    y = torch.randn(24, 5)
    slow = bijection.inverse if make is MAF else bijection.forward
    with torch.no_grad():
        expected = slow(y)
        made.accelerate(bijection, path if make is MAF else "torch")
        got = slow(y)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
