"""Transforms in plain PyTorch: laws by hypothesis, in the bulk, in the tails, and with parameters that are extreme."""

import pytest
import torch
from compare import assert_accurate
from hypothesis import given, settings
from hypothesis import strategies as st

from tarflow_fast.transforms.logistic_mixture import LogisticMixture
from tarflow_fast.transforms.spline import Spline

EPS = torch.finfo(torch.float64).eps
MIXTURES = {"mixture of 1": LogisticMixture(1), "mixture of 3": LogisticMixture(3), "mixture of 8": LogisticMixture()}
TRANSFORMS = MIXTURES | {"spline of 2": Spline(2), "spline of 8": Spline()}
every = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
draws = settings(max_examples=40, deadline=None, derandomize=True)
scales = st.sampled_from([0.0, 0.3, 1.0, 3.0, 10.0, 100.0, 1e4])
sizes = st.sampled_from([0.1, 1.0, 10.0, 1e4])
seeds = st.integers(0, 2**32 - 1)


def draw(transform, seed, scale, size, rows=64, D=3, dtype=torch.float64):
    """Numbers (rows, D), and the parameters of a token for each."""
    generator = torch.Generator().manual_seed(seed)
    x = size * torch.randn(rows, D, generator=generator, dtype=torch.float64)
    parameters = scale * torch.randn(rows, len(transform.parts) * D, generator=generator, dtype=torch.float64)
    return x.to(dtype), parameters.to(dtype)


def parts(transform, parameters):
    return parameters.unflatten(-1, (len(transform.parts), -1))


def worth(transform, x, z, parameters, stretched):
    """What one rounding of every number on the way is worth in z. One of x is worth a slope; one of u = z exp(a) + b,
    or of a parameter that is added to it, exp(-a) < 1100."""
    largest = parts(transform, parameters).abs().amax(-2)
    return (x.abs() + largest) * stretched.exp() + (1 + z.abs() + largest) * 1100


@every
@draws
@given(seed=seeds, scale=scales, size=sizes)
def test_inverse_of_forward_and_forward_of_inverse(transform, seed, scale, size):
    x, parameters = draw(transform, seed, scale, size)
    split = parts(transform, parameters)
    z, stretched = transform.encode(x, split)
    back, shrunk = transform.decode(z, split)
    again, _ = transform.encode(back, split)
    off = 64 * EPS * worth(transform, x, z, parameters, stretched)
    assert ((again - z).abs() <= off).all()
    steep = stretched > -5  # elsewhere the map may be too flat to tell one x from another
    assert ((back - x).abs() <= off * (1 + (-stretched).exp()))[steep].all()
    assert ((stretched + shrunk).abs() <= 1e-6)[steep].all()
    z, _ = draw(transform, seed, scale, size)
    x, shrunk = transform.decode(z, split)
    again, stretched = transform.encode(x, split)
    # A spline may turn from a slope of 1/1000 to one of 1000 within a millionth of a bin.
    assert ((stretched + shrunk).abs() <= (1e-6 if isinstance(transform, Spline) else 1e-9)).all()
    assert ((again - z).abs() <= 64 * EPS * worth(transform, x, z, parameters, stretched)).all()


@every
@draws
@given(seed=seeds, scale=st.sampled_from([0.0, 0.3, 1.0, 3.0]), size=st.sampled_from([0.1, 1.0, 10.0]))
def test_float32_is_as_near_to_float64_as_the_rule_asks(transform, seed, scale, size):
    x, parameters = draw(transform, seed, scale, size, dtype=torch.float32)
    z, _ = transform.encode(x, parts(transform, parameters))
    exact, stretched = transform.decode(z.double(), parts(transform, parameters.double()))
    got, log_det = transform.inverse(z, parameters)
    assert_accurate("inverse", got, exact, exact.float())
    assert_accurate("log_det", log_det, stretched.sum(-1), stretched.sum(-1).float())
    # There and back in float32: no further off than the exact inverse of what float32 gave.
    assert_accurate("inverse of forward", got, x.double(), exact.float())


@every
@draws
@given(seed=seeds, scale=st.sampled_from([0.0, 0.3, 1.0, 3.0, 10.0]), size=st.sampled_from([0.1, 1.0, 10.0]))
def test_log_det_is_that_of_autograd(transform, seed, scale, size):
    x, parameters = draw(transform, seed, scale, size, rows=16)
    x.requires_grad_()
    z, stretched = transform.encode(x, parts(transform, parameters))
    (slope,) = torch.autograd.grad(z.sum(), x)
    assert ((slope - stretched.exp()).abs() <= 1e-7 * slope + 1e-12).all()
    assert slope.gt(0).logical_or(stretched < -600).all()
    back, shrunk = transform.decode(z.detach().requires_grad_(), parts(transform, parameters))
    assert torch.isfinite(back).all() and torch.isfinite(shrunk).all()


@every
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 1e4])
def test_it_increases_over_a_million_points(transform, scale):
    around = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    far = torch.linspace(30, 1e4, 200_000, dtype=torch.float64)
    x = torch.cat([-far.flip(0), around, far]).sort().values
    _, parameters = draw(transform, 5, scale, 1.0, rows=1, D=1)
    z, stretched = transform.encode(x[:, None], parts(transform, parameters).expand(len(x), -1, -1))
    assert torch.isfinite(z).all() and torch.isfinite(stretched).all()
    steps, rounding = z.diff(dim=0), EPS * (z.abs() + 1100 * (1 + scale))[1:]
    assert (steps >= -16 * rounding).all()
    assert (steps > 0).sum() > 1000
    ends = torch.tensor([[-1e4], [1e4]], dtype=torch.float64)
    back, _ = transform.decode(ends, parts(transform, parameters).expand(2, -1, -1))
    assert torch.isfinite(back).all() and back[0] < back[1]


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("extreme", [1e4, -1e4, 1e8, -1e8])
def test_extreme_parameters_give_finite_numbers(transform, extreme, dtype):
    P = len(transform.parts)
    for which in range(P):
        parameters = torch.zeros(5, P, dtype=dtype)
        parameters[:, which] = extreme
        x = torch.tensor([[-1e4], [-1.0], [0.0], [1.0], [1e4]], dtype=dtype)
        for result in (*transform.encode(x, parameters[..., None]), *transform.inverse(x, parameters)):
            assert torch.isfinite(result).all()


@every
def test_noise_that_is_not_finite_stays_so_and_ends(transform):
    z = torch.tensor([[torch.inf], [-torch.inf], [torch.nan], [0.5]])
    x, _ = transform.inverse(z, torch.zeros(4, len(transform.parts)))
    assert not torch.isfinite(x[:3]).any() and x[3] == 0.5
    _, parameters = draw(transform, 0, 1.0, 1.0, rows=4, D=1)
    parameters[0, 0] = torch.nan
    assert torch.isnan(transform.inverse(torch.zeros(4, 1), parameters)[0])[0]


@every
def test_parameters_that_are_zero_make_the_identity(transform):
    x, _ = draw(transform, 3, 0.0, 3.0)
    zeros = torch.zeros(len(x), len(transform.parts), x.size(1), dtype=x.dtype)
    for map in (transform.encode, transform.decode):
        y, log_det = map(x, zeros)
        assert (y - x).abs().max() <= 16 * EPS * x.abs().max() and log_det.abs().max() <= 1e-12


@every
def test_gradients_of_both_directions(transform):
    x, parameters = draw(transform, 11, 0.7, 1.0, rows=2, D=2)
    x.requires_grad_(), parameters.requires_grad_()

    def forward(x, parameters):
        return transform.encode(x, parts(transform, parameters))

    for function in (forward, transform.inverse):
        assert torch.autograd.gradcheck(function, (x, parameters))
        assert torch.autograd.gradgradcheck(function, (x, parameters))


@every
@pytest.mark.parametrize("flip", [False, True])
def test_a_sequence_takes_the_parameters_of_the_token_before(transform, flip):
    B, T, D = 2, 4, 3
    x, parameters = draw(transform, 2, 0.5, 1.0, rows=B * T, D=D)
    x, parameters = x.view(B, T, D), parameters.view(B, T, -1)
    z, log_det = transform.forward(x, parameters, flip)
    seen, found = (x.flip(1), z.flip(1)) if flip else (x, z)
    assert torch.equal(found[:, 0], seen[:, 0])
    total = 0
    for i in range(T - 1):
        back, shrunk = transform.inverse(found[:, i + 1], parameters[:, i])
        assert (back - seen[:, i + 1]).abs().max() < 1e-12
        total = total - shrunk
    assert (log_det - total).abs().max() < 1e-10


def test_a_mixture_is_the_formula_of_the_paper():
    transform, (x, parameters) = LogisticMixture(3), draw(LogisticMixture(3), 9, 1.0, 1.5)
    a, b, weight, mean, scale = parts(transform, parameters).split([1, 1, 3, 3, 3], dim=-2)
    a, scale = a / (1 + a.abs() / 7), scale / (1 + scale.abs() / 7)
    F = (weight.softmax(-2) * torch.sigmoid((x[:, None] - mean) / scale.exp())).sum(-2)
    expected = (torch.log(F / (1 - F)) - b[:, 0]) / a[:, 0].exp()
    z, _ = transform.encode(x, parts(transform, parameters))
    assert (z - expected).abs().max() < 1e-9


def test_a_spline_is_the_formula_of_the_paper():
    K, (x, parameters) = 5, draw(Spline(5), 9, 1.0, 1.5, rows=40, D=1)
    z, stretched = Spline(K).encode(x, parts(Spline(K), parameters))
    bins = set()
    for x_i, told, z_i, log_slope in zip(x[:, 0], parameters, z[:, 0], stretched[:, 0], strict=True):
        a, b, (width, height, raw) = told[0], told[1], told[2:].split([K, K, K - 1])
        clip = lambda u: u / (1 + u.abs() / 7)  # noqa: E731
        u = (x_i - b) * torch.exp(-clip(a))
        widths, heights = (8 * (0.001 + (1 - 0.001 * K) * each.softmax(0)) for each in (width, height))
        slopes = torch.cat([torch.ones(1), clip(raw).exp(), torch.ones(1)])
        left, low = -4.0, -4.0
        expected, slope = u, torch.ones(())
        for k in range(K):
            if left <= u < left + widths[k] and -4 < u < 4:
                xi, s, d0, d1 = (u - left) / widths[k], heights[k] / widths[k], slopes[k], slopes[k + 1]
                below = s + (d1 + d0 - 2 * s) * xi * (1 - xi)
                expected = low + heights[k] * (s * xi**2 + d0 * xi * (1 - xi)) / below
                slope = s**2 * (d1 * xi**2 + 2 * s * xi * (1 - xi) + d0 * (1 - xi) ** 2) / below**2
                bins.add(k)
            left, low = left + widths[k], low + heights[k]
        assert abs(z_i - expected) < 1e-12 * (1 + abs(expected))
        assert abs(log_slope - (slope.log() - clip(a))) < 1e-11
    assert bins == set(range(K))


def test_a_spline_is_smooth_at_its_knots_and_linear_in_its_tails():
    transform, (_, parameters) = Spline(6), draw(Spline(6), 4, 1.0, 1.0, rows=1, D=1)
    parameters[:, :2] = 0  # then u is x
    widths = 8 * (0.001 + 0.994 * parameters[0, 2:8].softmax(0))
    knots = (-4 + torch.cat([torch.zeros(1), widths.cumsum(0)]))[:, None]
    split = parts(transform, parameters).expand(len(knots), -1, -1)
    (below, slope_below), (above, slope_above) = (transform.encode(knots + step, split) for step in (-1e-9, 1e-9))
    assert (above - below).abs().max() < 1e-6 and (slope_above - slope_below).abs().max() < 1e-5
    assert slope_below[0].abs() < 1e-6 and slope_above[-1].abs() < 1e-6
    far = torch.tensor([[-1e4], [-4.0], [4.0], [4.5], [1e4]], dtype=torch.float64)
    z, stretched = transform.encode(far, split[:5])
    assert torch.equal(z, far) and stretched.abs().max() == 0
