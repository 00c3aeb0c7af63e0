"""Learned noise of the bytes: its density is one, and the bounds lie where they must around the exact probability."""

import math

import numpy as np
import pytest
import torch
from flows import random_flow

from tarflow_fast.data import UniformDequantizer, VariationalDequantizer, dequantize
from tarflow_fast.evaluate import classification, evaluate


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def drawn(in_channels=1, img_size=8, patch_size=2, scale=0.2, seed=0, **sizes):
    """A float64 dequantiser with every parameter drawn: at the start values it is uniform and proves nothing."""
    made = VariationalDequantizer(in_channels, img_size, patch_size, **sizes).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm.weight" in name:
                parameter.copy_(1 + 0.2 * draw)
            elif parameter.ndim == 2 and "embed" not in name:
                parameter.copy_((scale if "proj_out" in name else 1.0) * draw / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(0.2 * draw)
    return made.eval()


def pixels(B, shape, levels, seed=0):
    return torch.randint(levels, (B, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def nodes(count, edge=35.0):
    """Points in (0, 1) and weights for integrals over them, by trapezoids in logit space, where edges are smooth."""
    v = torch.linspace(-edge, edge, count, dtype=torch.float64)
    u = torch.sigmoid(v)
    return u, u * torch.sigmoid(-v) * (v[1] - v[0])


def legendre(count):
    """The same by Gauss-Legendre in t, u = t^2 (3 - 2 t), which takes the logarithms at the edges away."""
    t, weight = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(count))
    t = (t + 1) / 2
    return t**2 * (3 - 2 * t), weight / 2 * 6 * t * (1 - t)


def square(count, rule=legendre):
    """The same for (0, 1)^2: points (count^2, 1, 1, 2), images of one row of two pixels, and weights (count^2,)."""
    u, weight = rule(count)
    points = torch.stack(torch.meshgrid(u, u, indexing="ij"), dim=-1).reshape(-1, 1, 1, 2)
    return points, (weight[:, None] * weight).flatten()


# ---------------------------------------------------------------- the density


def test_the_density_of_one_number_integrates_to_one():
    made = drawn(img_size=1, patch_size=1)
    u, weight = nodes(400)
    for value in (0, 3, 16):
        image = torch.full((len(u), 1, 1, 1), value, dtype=torch.uint8)
        density = made.log_prob(image, u.view(-1, 1, 1, 1), 17).exp()
        assert (density * weight).sum().item() == pytest.approx(1, abs=1e-8)
        assert (density - 1).abs().max() > 0.05  # and it is not uniform


def test_the_density_of_two_pixels_integrates_to_one():
    """The second pixel is conditioned on the first, and the first on the second: two autoregressive steps."""
    made = drawn(img_size=(1, 2), patch_size=1)
    points, weight = square(100, lambda count: nodes(count, edge=22.0))
    images = torch.tensor([[0, 4]], dtype=torch.uint8).expand(len(points), 1, 1, 2)
    with torch.no_grad():
        log_q = made.log_prob(images, points, 17)
    assert (log_q.exp() * weight).sum().item() == pytest.approx(1, abs=1e-4)
    grid = log_q.view(100, 100)
    assert (grid[47] - grid[47, 50] - grid[53] + grid[53, 50]).abs().max() > 0.05  # the two depend on one another


@pytest.mark.parametrize("shape, patch_size", [((1, 2, 4), 2), ((2, 3, 2), 1)])
def test_log_q_is_what_autograd_says(shape, patch_size):
    made = drawn(shape[0], shape[1:], patch_size, num_blocks=3, layers_per_block=2)
    images, noise = pixels(3, shape, 17), torch.rand(3, *shape, dtype=torch.float64) * 0.98 + 0.01
    u, log_q = made(images, noise, 17)
    assert u.min() > 0 and u.max() < 1 and (u - noise).abs().max() > 0.01
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda w, row=row: made(images[row : row + 1], w, 17)[0].flatten(), noise[row : row + 1]
        ).flatten(1)
        assert -torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(log_q[row].item(), rel=1e-9, abs=1e-9)
    torch.testing.assert_close(made.log_prob(images, u, 17), log_q, rtol=1e-8, atol=1e-8)


def test_every_pixel_of_the_image_is_seen():
    made = drawn(scale=0.2)
    image, noise = pixels(1, (1, 8, 8), 256), torch.rand(1, 1, 8, 8, dtype=torch.float64)
    u, _ = made(image, noise, 256)
    for row, column in ((0, 0), (3, 5), (7, 7)):
        other = image.clone()
        other[0, 0, row, column] ^= 128
        assert ((made(other, noise, 256)[0] - u).abs() > 1e-9).all()


def test_noise_at_the_edges_stays_inside():
    made = drawn(scale=3.0).float()
    images = pixels(4, (1, 8, 8), 256)
    for edge in (0.0, 1 - 2.0**-24):
        u, log_q = made(images, torch.full(images.shape, edge), 256)
        assert u.min() >= 0 and u.max() < 1 and log_q.isfinite().all()


# ---------------------------------------------------------------- at the start it is uniform


def test_a_fresh_one_is_uniform_dequantisation():
    flow = random_flow(num_classes=3)
    images, noise = pixels(5, (1, 8, 8), 256), torch.rand(5, 1, 8, 8)
    fresh = VariationalDequantizer.of(flow)
    u, log_q = fresh(images, noise, 256)
    torch.testing.assert_close(u, noise, rtol=0, atol=2e-7)
    assert torch.equal(log_q, torch.zeros(5))
    y = torch.tensor([0, 1, 2, -1, 0])
    uniform = flow.bits_per_dim(images, y, seed=3, n_draws=2)
    torch.testing.assert_close(
        flow.bits_per_dim(images, y, seed=3, n_draws=2, dequantizer=fresh), uniform, rtol=0, atol=1e-5
    )
    same = flow.bits_per_dim(images, y, seed=3, n_draws=2, dequantizer=UniformDequantizer())
    assert torch.equal(same, uniform)


# ---------------------------------------------------------------- the bounds

LEVELS = 3
IMAGE = torch.tensor([[[[0, 2]]]], dtype=torch.uint8)


def tiny_flow():
    """A float64 flow over images of two pixels, which is no Gaussian over a cell of three levels."""
    return random_flow(img_size=(1, 2), patch_size=1, scale=0.4, dtype=torch.float64, num_blocks=3)


@torch.no_grad()
def exact_bits(flow):
    """-log2 P(IMAGE) / 2, with P the flow's probability of the cell."""
    points, weight = square(160)
    x = ((IMAGE + points) / LEVELS * 2 - 1).double()
    return -math.log2((flow.log_prob(x).exp() * weight).sum().item() * (2 / LEVELS) ** 2) / 2


@torch.no_grad()
def log_ratios(flow, made, count):
    """log p / q in nats at the nodes of a square, and the weights: expectations over q are sums over uniform noise."""
    points, weight = square(count)
    u, log_q = made(IMAGE.expand(len(points), 1, 1, 2), points, LEVELS)
    x = ((IMAGE + u) / LEVELS * 2 - 1).double()
    return flow.log_prob(x) - log_q + 2 * math.log(2 / LEVELS), weight


def expected_bits(flow, made, k, count):
    """The importance-weighted bound of k draws, by quadrature over all of them."""
    ratio, weight = log_ratios(flow, made, count)
    if k == 1:
        return -(ratio * weight).sum().item() / math.log(2) / 2
    pairs = torch.logaddexp(ratio[:, None], ratio)
    weights = weight[:, None] * weight
    if k == 2:
        return -((pairs - math.log(2)) * weights).sum().item() / math.log(2) / 2
    total = sum(
        ((torch.logaddexp(pairs, one) - math.log(3)) * weights).sum() * w for one, w in zip(ratio, weight, strict=True)
    )
    return -total.item() / math.log(2) / 2


def test_more_importance_is_tighter_and_never_beyond_the_exact_probability():
    flow, made = tiny_flow(), drawn(img_size=(1, 2), patch_size=1)
    exact = exact_bits(flow)
    one, two, three = (
        expected_bits(flow, made, 1, 20),
        expected_bits(flow, made, 2, 20),
        expected_bits(flow, made, 3, 12),
    )
    assert one == pytest.approx(expected_bits(flow, made, 1, 60), abs=1e-3)  # the quadrature has converged
    assert one > two + 0.05 > three + 0.1 > exact + 0.2


def test_bits_per_dim_draws_those_bounds():
    """The mean over many draws is the bound by quadrature, within five standard errors; with many it is exact."""
    flow, made = tiny_flow(), drawn(img_size=(1, 2), patch_size=1)
    exact, many = exact_bits(flow), IMAGE.expand(4096, 1, 1, 2)

    def measured(rows, k, dequantizer):
        settings = dict(levels=LEVELS, seed=1, batch_size=rows, importance=k)
        bits = flow.bits_per_dim(many[:rows], dequantizer=dequantizer, **settings)
        return bits.mean().item(), (bits.std() / rows**0.5).item()

    for k in (1, 2):
        for dequantizer in (made, UniformDequantizer()):
            mean, error = measured(4096, k, dequantizer)
            assert mean == pytest.approx(expected_bits(flow, dequantizer, k, 20), abs=5 * error) and error < 0.02
    for dequantizer in (made, None):
        mean, error = measured(128, 200, dequantizer)
        assert exact - 5 * error < mean < exact + 0.1
    draws = [flow.bits_per_dim(many[:64], levels=LEVELS, seed=3, dequantizer=made, n_draws=n) for n in (1, 16)]
    assert draws[1].std() < 0.5 * draws[0].std()


def test_the_bits_of_all_images_are_a_code():
    """Kraft: 2^-bits over all nine images sum to at most the flow's mass on their cells, and nearly to it with many."""
    flow, made = tiny_flow(), drawn(img_size=(1, 2), patch_size=1)
    images = torch.cartesian_prod(torch.arange(3), torch.arange(3)).view(9, 1, 1, 2).to(torch.uint8)
    points, weight = square(60)
    with torch.no_grad():
        mass = (flow.log_prob(points * 2 - 1).exp() * weight).sum().item() * 4

    def total(**settings):
        return (2 ** (-2 * flow.bits_per_dim(images, levels=LEVELS, seed=0, dequantizer=made, **settings))).sum().item()

    one, many = total(n_draws=300), total(importance=1000)
    assert 0.3 * mass < one < 0.95 * mass
    assert 0.9 * mass < many < 1.1 * mass < 1.1


def test_learned_noise_narrows_the_gap():
    """Training q alone, against a flow that stays: the bound comes nearer to the exact probability, and not beyond."""
    flow, made = tiny_flow().requires_grad_(False), VariationalDequantizer(1, (1, 2), 1).double()
    exact, before = exact_bits(flow), expected_bits(flow, made, 1, 30)
    assert before == pytest.approx(expected_bits(flow, UniformDequantizer(), 1, 30), abs=1e-9)
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for _ in range(60):
        u, log_q = made(IMAGE.expand(128, 1, 1, 2), torch.rand(128, 1, 1, 2, dtype=torch.float64), LEVELS)
        loss = (log_q - flow.log_prob((IMAGE + u) / LEVELS * 2 - 1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = expected_bits(flow, made, 1, 30)
    assert exact < after < exact + 0.7 * (before - exact)


def test_evaluate_and_classification_take_it():
    from fid_cases import MODEL, pictures

    images, made = pictures(9), drawn(MODEL.in_channels, 8).float()
    found = evaluate(MODEL, images, dequantizer=made, importance=2, n_draws=2, batch_size=4, seed=5)
    assert found.bits.isfinite().all()
    assert not torch.allclose(found.bits, evaluate(MODEL, images, n_draws=2, batch_size=4, seed=5).bits)
    seen, classify = [], MODEL.classify
    try:
        MODEL.classify = lambda x: seen.append(x) or classify(x)
        classification(MODEL, images, dequantizer=made)
        classification(MODEL, images)
    finally:
        del MODEL.classify
    learned, uniform = seen
    assert not torch.equal(learned, uniform)
    assert (learned - uniform).abs().max() < 2 / 256 + 1e-6  # they lie in the same cells


# ---------------------------------------------------------------- files and refusals


def test_it_is_saved_and_loaded(tmp_path):
    made = drawn(3, (4, 6), 2, num_blocks=1, context_layers=1).float()
    made.save(tmp_path)
    again = VariationalDequantizer.load(tmp_path)
    images, noise = pixels(2, (3, 4, 6), 256), torch.rand(2, 3, 4, 6)
    for mine, theirs in zip(again(images, noise, 256), made(images, noise, 256), strict=True):
        assert torch.equal(mine, theirs)
    path = tmp_path / "dequantizer.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"^VariationalDequantizer: cannot read .*dequantizer.safetensors: "):
        VariationalDequantizer.load(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"^VariationalDequantizer: there is no .*other/dequantizer.safetensors$"
    ):
        VariationalDequantizer.load(tmp_path / "other")
    random_flow().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(path)
    with pytest.raises(ValueError, match=r"^VariationalDequantizer: .* holds no dequantiser: "):
        VariationalDequantizer.load(tmp_path)


MADE, PIXELS, NOISE = drawn(scale=0.1).float(), pixels(2, (1, 8, 8), 256), torch.rand(2, 1, 8, 8)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: MADE([1], NOISE, 256), TypeError, "images must be a torch.Tensor, got list"),
        (lambda: MADE(NOISE, NOISE, 256), TypeError, "images must be integers, got torch.float32"),
        (lambda: MADE(PIXELS[:, 0], NOISE, 256), ValueError, "images must have shape (B, 1, 8, 8), got (2, 8, 8)"),
        (lambda: MADE(PIXELS, PIXELS, 256), TypeError, "noise must be floating, got torch.uint8"),
        (lambda: MADE(PIXELS, NOISE[:1], 256), ValueError, "noise must have shape (2, 1, 8, 8), got (1, 1, 8, 8)"),
        (lambda: MADE(PIXELS, NOISE.to("meta"), 256), ValueError, "noise must be on its device cpu, got meta"),
        (lambda: MADE(PIXELS, NOISE, 1), ValueError, "levels must be >= 2, got 1"),
        (lambda: MADE.log_prob(PIXELS, NOISE + 1, 256), ValueError, "u must be in [0, 1), got [1."),
        (lambda: VariationalDequantizer(1, 9, 2), ValueError, "img_size must be a multiple of patch_size = 2, got 9"),
        (lambda: VariationalDequantizer(1, 8, 2, 65), ValueError, "channels must be a multiple of 64, got 65"),
        (lambda: VariationalDequantizer(1, 8, 0), ValueError, "patch_size must be >= 1, got 0"),
        (lambda: VariationalDequantizer(1, 8, 2, num_blocks=1.0), TypeError, "num_blocks must be an int, got float"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(f"VariationalDequantizer: {message}")


def test_dequantisation_keeps_the_bytes():
    """Whatever the learned noise, the pixel lies in the cell of its byte."""
    u, _ = MADE(PIXELS, NOISE, 256)
    place = (dequantize(PIXELS, u, 256) + 1) * 128 - PIXELS
    assert place.min() >= -1e-4 and place.max() <= 1 + 1e-4 and place.std() > 0.1
