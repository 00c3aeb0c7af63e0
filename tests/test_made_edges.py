"""Noise at the edges: knots and bounds of splines, NaN and infinities, and what is no noise at all."""

import pytest
import torch
from compare import same_bits
from made_cases import PATHS, check_exact, nflows_case, normflows_case, torchflows_case, zuko_case

from tarflow_fast import made

BOUND = 2.0
RQ = "PiecewiseRationalQuadratic"


def zuko_spline(D, bins=4):
    zuko = pytest.importorskip("zuko")

    def options():
        import functools

        univariate = functools.partial(zuko.transforms.MonotonicRQSTransform, bound=BOUND)
        return {"univariate": univariate, "shapes": ((bins,), (bins,), (bins - 1,))}

    return zuko_case(D, **options())


def torchflows_spline(D, bins=4):
    pytest.importorskip("torchflows")
    from torchflows.bijections.finite.autoregressive.transformers.spline.rational_quadratic import RationalQuadratic

    return torchflows_case(RationalQuadratic, (D,), conditioner={"n_hidden": 20}, boundary=BOUND, n_bins=bins)


SPLINES = {
    "zuko": zuko_spline,
    "nflows": lambda D, bins=4: nflows_case(RQ, D, 20, num_bins=bins, tails="linear", tail_bound=BOUND),
    "nflows on [0, 1]": lambda D, bins=4: nflows_case(RQ, D, 20, num_bins=bins),
    "normflows": lambda D, bins=4: normflows_case(RQ, D, 20, num_bins=bins, tails="linear", tail_bound=BOUND),
    "torchflows": torchflows_spline,
}
every = pytest.mark.parametrize("path", PATHS)
spline = pytest.mark.parametrize("name", SPLINES)


def even(case, bins):
    """All bins of one size, so that their knots are numbers that noise can meet: -2, -1, 0, 1 and 2."""
    last = [module for module in case.module.modules() if hasattr(module, "mask")][-1]
    with torch.no_grad():
        last.weight.zero_()
        phi = last.bias.view(-1, last.bias.numel() // case.features[0])
        phi[:, : 2 * bins] = 0
        phi[:, 2 * bins :].normal_()


@every
@spline
def test_noise_at_knots_and_bounds(path, name):
    """Knots belong to two bins, whose splines meet there with one slope, so that either may answer."""
    case = SPLINES[name](3)
    even(case, 4)
    low, high = (0.0, 1.0) if case.unit else (-BOUND, BOUND)
    knots = torch.linspace(low, high, 5)
    y = torch.cat([knots, torch.nextafter(knots, torch.tensor(9.0)), torch.nextafter(knots, torch.tensor(-9.0))])
    y = y.clamp(low, high) if case.unit else y
    y = y[torch.randint(len(y), (40, 3))]
    with torch.no_grad():
        expected = (case.plain or case.invert)(case.module, y, None)
    case.accelerate(path)
    got = case.run(y)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)
    at = torch.isin(y, knots)
    torch.testing.assert_close(got[0][at], y[at], rtol=1e-5, atol=1e-5)  # bins of one size: knots stay


@every
@pytest.mark.parametrize("name", [name for name in SPLINES if "[" not in name])
def test_noise_beyond_the_bounds_stays_as_it_is(path, name):
    case = SPLINES[name](1 if name != "torchflows" and name != "zuko" else 2)
    case.accelerate(path)
    y = torch.tensor([-1e30, -50.0, -2.0000005, 2.0000005, 7.0, 1e30])[:, None].expand(-1, *case.features).contiguous()
    x, log_det = case.run(y)
    assert same_bits(x, y) and not log_det.any()


@every
@spline
def test_noise_near_the_bounds(path, name):
    case = SPLINES[name](7, 8)
    y = case.noise(scale=BOUND)
    y[:8] = torch.randint(0, 2, (8, 7)) * 1.0 if case.unit else torch.randint(0, 2, (8, 7)) * 2 * BOUND - BOUND
    check_exact(case, path, y)


AFFINE = {
    "zuko": lambda: zuko_case(6, hidden_features=(20,)),
    "zuko spline": lambda: zuko_spline(6),
    "nflows": lambda: nflows_case("Affine", 6, 20),
    "normflows": lambda: normflows_case("Affine", 6, 20),
}


@every
@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_bad_noise_stays_in_its_row(path, name, bad):
    case = AFFINE[name]()
    case.accelerate(path)
    y = case.noise()
    clean = case.run(y)
    y[5, 2] = bad
    got = case.run(y)
    others = torch.arange(len(y)) != 5
    for ours, theirs in zip(got, clean, strict=True):
        assert same_bits(ours[others], theirs[others])
    assert got[0][5, :2].isfinite().all() and same_bits(got[0][5, :2], clean[0][5, :2]), "features before it"
    if bad != bad:
        assert got[0][5, 2:].isnan().any()


@every
@pytest.mark.parametrize("name", ["nflows", "normflows", "torchflows"])
def test_bad_noise_of_splines_raises_as_in_the_library_or_stays_in_its_row(path, name):
    """Their splines check whole batches by assertions. The engine has none, and gives NaN where they raise."""
    case = SPLINES[name](6)
    y = case.noise()
    case.accelerate(path)
    clean = case.run(y)
    y[5, 2] = float("nan")
    if path == "torch":
        with pytest.raises((AssertionError, RuntimeError, IndexError)):
            case.run(y)
        made.restore(case.module)
        with pytest.raises((AssertionError, RuntimeError, IndexError)):
            case.run(y)
        return
    got, others = case.run(y), torch.arange(len(y)) != 5
    for ours, theirs in zip(got, clean, strict=True):
        assert same_bits(ours[others], theirs[others])
    assert got[0][5, 2].isnan() and not got[0][5, 3:].isfinite().all()


@every
@pytest.mark.parametrize("name", AFFINE)
def test_no_rows(path, name):
    case = AFFINE[name]()
    case.accelerate(path)
    x, log_det = case.run(torch.empty(0, 6))
    assert x.shape == (0, 6) and log_det.shape == (0,)


@every
@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("y", [torch.zeros(4, 5), torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, 6).half()])
def test_noise_of_another_shape_or_type_is_the_librarys_affair(path, name, y):
    case, answers = AFFINE[name](), []
    for accelerated in (False, True):
        if accelerated:
            case.accelerate(path)
        try:
            answers.append(case.run(y))
        except Exception as error:
            answers.append((type(error), str(error)))
    first, second = answers
    if isinstance(first[0], torch.Tensor):
        assert all(map(same_bits, first, second))
    else:
        assert first == second


@every
def test_a_context_too_many_or_too_few_is_the_librarys_affair(path):
    for given, context in ((None, torch.zeros(3, 2)), (2, None), (2, torch.zeros(3, 4)), (2, torch.zeros(5, 2))):
        case, answers = nflows_case("Affine", 6, 20, given), []
        for accelerated in (False, True):
            if accelerated:
                case.accelerate(path)
            try:
                answers.append(case.run(torch.zeros(3, 6), context))
            except Exception as error:
                answers.append((type(error), str(error)))
        first, second = answers
        same = isinstance(first[0], torch.Tensor) and all(map(same_bits, first, second))
        assert same or first == second
