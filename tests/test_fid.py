"""FID: the distance of Gaussians, statistics in batches and in files, samples of a flow."""

import re

import numpy as np
import pytest
import torch
from fid_cases import MODEL, Evil, F, net, pictures
from flows import random_flow

from tarflow_fast.data import ImageSet, generator
from tarflow_fast.data.images import to_uint8
from tarflow_fast.fid import (
    Statistics,
    fid,
    frechet_distance,
    holds_statistics,
    image_statistics,
    load_statistics,
    save_statistics,
)
from tarflow_fast.model import TarFlow


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def gaussian(seed=0, size=F, rank=None):
    """A mean and a covariance of this rank, in float64."""
    draw = np.random.default_rng(seed)
    root = draw.normal(size=(size, rank or 3 * size))
    return draw.normal(size=size), root @ root.T / root.shape[1]


# ---------------------------------------------------------------- the distance


def test_distance_of_commuting_gaussians_is_that_of_their_deviations():
    """Covariances with one set of eigenvectors: the distance is |mu1 - mu2|^2 + the sum of (s1 - s2)^2."""
    (mu1, _), (mu2, _) = gaussian(1), gaussian(2)
    rotation, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(F, F)))
    s1, s2 = np.array([0.1, 1, 2, 3, 0.5, 30]), np.array([7, 0.2, 2, 1e-3, 1, 4])
    found = frechet_distance(mu1, rotation @ np.diag(s1**2) @ rotation.T, mu2, rotation @ np.diag(s2**2) @ rotation.T)
    assert found == pytest.approx(((mu1 - mu2) ** 2).sum() + ((s1 - s2) ** 2).sum(), rel=1e-12)


def test_distance_is_that_of_the_eigenvalues_of_the_product():
    """In general the trace of (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of S1 S2."""
    (mu1, s1), (mu2, s2) = gaussian(1), gaussian(2)
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2)).sum()
    assert abs(roots.imag) < 1e-12
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * roots.real
    assert frechet_distance(mu1, s1, torch.tensor(mu2), torch.tensor(s2)) == pytest.approx(expected, rel=1e-12)


def test_distance_is_symmetric_and_does_not_see_a_rotation_or_a_common_shift():
    (mu1, s1), (mu2, s2) = gaussian(1), gaussian(2)
    found = frechet_distance(mu1, s1, mu2, s2)
    assert frechet_distance(mu2, s2, mu1, s1) == pytest.approx(found, rel=1e-13)
    q, _ = np.linalg.qr(np.random.default_rng(4).normal(size=(F, F)))
    turned = frechet_distance(q @ mu1 + 5, q @ s1 @ q.T, q @ mu2 + 5, q @ s2 @ q.T)
    assert turned == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("size", [1, F, 300])
def test_distance_to_itself_is_zero(size):
    mu, sigma = gaussian(size=size)
    assert 0 <= frechet_distance(mu, sigma, mu, sigma) < 1e-13 * np.trace(sigma) * size


def test_singular_covariances_give_the_distance_and_a_warning():
    """Gaussians on subspaces. Rank 1 and rank 1: tr (S1 S2)^(1/2) = |u . v| for S1 = u u^T and S2 = v v^T."""
    (u, _), (v, _) = gaussian(1, 40), gaussian(2, 40)
    with pytest.warns(RuntimeWarning, match=r"sigma1 \(rank 1 of 40\) and sigma2 \(rank 1 of 40\): there were fewer"):
        found = frechet_distance(np.zeros(40), np.outer(u, u), np.zeros(40), np.outer(v, v))
    assert found == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-6)
    mu, sigma = gaussian(5, 40, rank=7)
    with pytest.warns(RuntimeWarning, match=r"\(rank 7 of 40\)"):
        assert frechet_distance(mu, sigma, mu, sigma) < 1e-12
    with pytest.warns(RuntimeWarning, match=r"\(rank 0 of 40\)"):
        assert frechet_distance(mu, 0 * sigma, mu, sigma) == pytest.approx(np.trace(sigma), rel=1e-6)


def test_a_covariance_that_was_kept_in_float32_will_do():
    mu, sigma = gaussian(5, 40, rank=7)
    with pytest.warns(RuntimeWarning, match="singular"):
        found = frechet_distance(mu.astype(np.float32), sigma.astype(np.float32), mu, sigma)
    assert found < 1e-3 * np.trace(sigma)


EYE, ZERO = np.eye(2), np.zeros(2)


@pytest.mark.parametrize(
    "args, error, message",
    [
        (([0, 0], EYE, ZERO, EYE), TypeError, "mu1 must be a tensor or an array, got list"),
        ((ZERO, EYE, EYE, EYE), ValueError, "mu2 must have shape (F,), got (2, 2)"),
        ((ZERO, ZERO, ZERO, EYE), ValueError, "sigma1 must have shape (F, F), got (2,)"),
        (
            (ZERO, np.eye(3), ZERO, EYE),
            ValueError,
            "sigma1 must have shape (F, F) with the F >= 1 of mu1, got (3, 3) and F = 2",
        ),
        ((ZERO, EYE, np.zeros(3), np.eye(3)), ValueError, "mu2 must have the 2 features of mu1, got 3"),
        ((ZERO, EYE, ZERO, EYE * np.nan), ValueError, "sigma2 must be finite, got 4 not so"),
        ((ZERO, EYE, ZERO, np.array([[1, 0.5], [0, 1]])), ValueError, "sigma2 must be symmetric"),
        ((ZERO, -EYE, ZERO, EYE), ValueError, "sigma1 must be positive semi-definite, got the eigenvalue -1"),
    ],
)
def test_what_is_no_gaussian_is_refused(args, error, message):
    with pytest.raises(error, match=re.escape("frechet_distance: " + message) + "$"):
        frechet_distance(*args)


# ---------------------------------------------------------------- statistics


def gathered(rows, sizes):
    found = Statistics()
    for part in torch.as_tensor(rows).split(sizes):
        found.update(part)
    return found


def test_statistics_are_numpys_of_all_rows_at_once():
    rows = np.random.default_rng(0).normal(size=(100, F)) @ np.random.default_rng(1).normal(size=(F, F))
    for sizes in ([100], [1] * 100, [7, 0, 93], [64, 36]):
        found = gathered(rows, sizes)
        assert found.count == 100
        np.testing.assert_allclose(found.mean.numpy(), rows.mean(0), rtol=0, atol=1e-14)
        np.testing.assert_allclose(found.covariance.numpy(), np.cov(rows, rowvar=False), rtol=1e-12, atol=1e-14)


def test_a_mean_far_from_zero_costs_no_digits():
    """Sums of x x^T, as torchmetrics keeps them, would lose all: 1e8 squared has no digits left for a variance of 1."""
    rows = np.random.default_rng(0).normal(size=(200, 3))
    found = gathered(rows + 1e8, 20).covariance.numpy()
    np.testing.assert_allclose(found, np.cov(rows, rowvar=False), rtol=0, atol=1e-6)


def test_the_order_of_batches_does_not_matter():
    rows = torch.randn(90, F, dtype=torch.float64)
    one, other = gathered(rows, 20), gathered(rows.flip(0), [13, 50, 27])
    torch.testing.assert_close(one.mean, other.mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(one.covariance, other.covariance, rtol=0, atol=1e-14)


def test_half_precision_features_are_summed_in_float64():
    rows = torch.randn(3000, 2).half()
    np.testing.assert_allclose(gathered(rows, 100).mean, rows.double().numpy().mean(0), rtol=0, atol=1e-13)


def test_rows_that_cannot_be_added_change_nothing():
    found = gathered(torch.randn(5, 2, dtype=torch.float64), 5)
    before = found.mean.clone(), found.covariance.clone()
    for rows, message in (
        (torch.zeros(2, 3), r"features must have shape \(B, 2\), got \(2, 3\)"),
        (torch.zeros(2), r"features must have shape \(B, 2\), got \(2,\)"),
        (torch.tensor([[0, float("nan")], [0, 0], [float("inf"), 0]]), "must be finite, got 2 rows that are not"),
    ):
        with pytest.raises(ValueError, match=message):
            found.update(rows)
    assert found.count == 5 and torch.equal(found.mean, before[0]) and torch.equal(found.covariance, before[1])
    with pytest.raises(TypeError, match=r"features must be a torch\.Tensor, got list"):
        found.update([[0.0]])
    with pytest.raises(ValueError, match="a mean needs at least 1 row, got 0"):
        _ = Statistics().mean
    with pytest.raises(ValueError, match="a covariance needs at least 2 rows, got 1"):
        _ = gathered(torch.zeros(1, 2), 1).covariance
    with pytest.raises(ValueError, match="cannot be added to those of a file that does not tell their number"):
        Statistics.of(ZERO, EYE).update(torch.zeros(1, 2))


def test_grey_images_are_seen_as_rgb_and_few_levels_as_all_of_them():
    grey = pictures()
    rgb = ImageSet(grey.images.repeat(1, 3, 1, 1), None, (), 256, "")
    found = image_statistics(grey, net, batch_size=7)
    expected = net(rgb.images).numpy()
    for each in (found, image_statistics(rgb, net)):
        np.testing.assert_allclose(each.mean, expected.mean(0), rtol=0, atol=1e-13)
        np.testing.assert_allclose(each.covariance, np.cov(expected, rowvar=False), rtol=0, atol=1e-13)
    seen = []
    image_statistics(pictures(levels=17), lambda images: seen.append(images) or net(images))
    assert set(seen[0].unique().tolist()) == {round(255 * level / 16) for level in range(17)}


# ---------------------------------------------------------------- files


def torchmetrics_state(rows):
    """What the original's prepare_fid_stats.py saves, less Inception's weights."""
    rows = torch.as_tensor(rows).double()
    return {
        "real_features_sum": rows.sum(0), "real_features_cov_sum": rows.T @ rows,
        "real_features_num_samples": torch.tensor(len(rows)), "fake_features_sum": torch.zeros(F),
        "inception.fc.weight": torch.zeros(2, 2),
    }  # fmt: skip


def test_files_of_statistics(tmp_path):
    rows = np.random.default_rng(0).normal(size=(30, F))
    mu, sigma = rows.mean(0), np.cov(rows, rowvar=False)
    np.savez(tmp_path / "a.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "b.npz", mean=mu.astype(np.float32), cov=sigma)
    torch.save({"mu": torch.tensor(mu), "sigma": torch.tensor(sigma)}, tmp_path / "c.pt")
    torch.save(torchmetrics_state(rows), tmp_path / "d.pth")
    save_statistics(tmp_path / "new" / "e.npz", gathered(rows, 7))
    counts = {"a.npz": None, "b.npz": None, "c.pt": None, "d.pth": 30, "new/e.npz": 30}
    for name, count in counts.items():
        assert holds_statistics(tmp_path / name)
        found = load_statistics(tmp_path / name)
        np.testing.assert_allclose(found.mean, mu, rtol=0, atol=1e-7 if name == "b.npz" else 1e-14)
        np.testing.assert_allclose(found.covariance, sigma, rtol=0, atol=1e-14)
        assert found.count == count
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["e.npz"]
    np.savez(tmp_path / "images.npz", x=np.zeros((2, 8, 8), np.uint8))
    assert not holds_statistics(tmp_path / "images.npz") and not holds_statistics("digits")


def test_files_that_hold_no_statistics(tmp_path, capsys):
    np.savez(tmp_path / "other.npz", x=EYE)
    np.savez(tmp_path / "half.npz", mu=ZERO)
    np.savez(tmp_path / "shape.npz", mu=ZERO, sigma=np.eye(3))
    np.savez(tmp_path / "nan.npz", mu=ZERO * np.nan, sigma=EYE)
    np.savez(tmp_path / "words.npz", mu=np.array(["a"]), sigma=EYE)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "nan.npz").read_bytes()[:100])
    torch.save({"x": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save(torchmetrics_state(np.zeros((1, F))), tmp_path / "one.pth")
    torch.save({"mu": Evil()}, tmp_path / "evil.pt")
    for name, message in (
        ("other.npz", "{0} must hold an array mu or mean, got x"),
        ("half.npz", "{0} must hold mu and sigma, or real_features_sum and its kin, got mu"),
        ("shape.npz", "{0} holds no mean and covariance: Statistics: mu must have shape (F,) and sigma (F, F), F >= 1, "
         "got (2,) and (3, 3)"),
        ("nan.npz", "{0} holds no mean and covariance: Statistics: mu must be finite"),
        ("words.npz", "mu in {0} must hold real numbers, got <U1"),
        ("cut.npz", "{0} is not a whole file of numbers: "),
        ("other.pt", "{0} must hold mu and sigma, or real_features_sum and its kin, got x"),
        ("one.pth", "{0} must hold statistics of at least 2 images, got 1"),
        ("mu.txt", "path must end in .npz, .pt, .pth or .safetensors, got {0}"),
    ):  # fmt: skip
        path = tmp_path / name
        with pytest.raises(ValueError, match=re.escape("load_statistics: " + message.format(path))):
            load_statistics(path)
    with pytest.raises(ValueError, match="objects other than tensors"):
        load_statistics(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""
    with pytest.raises(FileNotFoundError, match="path must be a file"):
        load_statistics(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"save_statistics: path must end in .npz, got x.pt"):
        save_statistics("x.pt", Statistics.of(ZERO, EYE))


# ---------------------------------------------------------------- of a flow


def test_fid_of_a_flow_is_that_of_its_samples():
    """n samples in batches, every class in equal shares, denoised, as bytes."""
    reference = image_statistics(pictures(60), net)
    draw = {"guidance": 1.5, "guide_what": "b", "attn_temp": 1.0, "annealed_guidance": True}
    found = fid(MODEL, reference, net, n=50, batch_size=32, noise_std=0.2, seed=4, **draw)
    y, parts = torch.arange(50) * 3 // 50, []
    for rows in (slice(0, 32), slice(32, 50)):
        seed = generator(4, "fid", rows.start).initial_seed()
        x = MODEL.sample(len(y[rows]), y[rows], seed=seed, **draw)
        parts.append(to_uint8(MODEL.denoise(x, y[rows], noise_std=0.2)))
    rows = net(torch.cat(parts).repeat(1, 3, 1, 1)).numpy()
    expected = frechet_distance(rows.mean(0), np.cov(rows, rowvar=False), reference.mean, reference.covariance)
    assert found.distance == pytest.approx(expected, rel=1e-9) and found.statistics.count == 50 and found.bad == 0
    others = [
        fid(MODEL, reference, net, n=50, batch_size=32, **changed).distance
        for changed in ({}, {"seed": 4}, {"seed": 4, "conditional": False}, {"seed": 4, "noise_std": 0.2}, draw)
    ]
    assert len({*others, found.distance}) == 6


def test_fid_falls_as_the_flow_comes_nearer():
    """Against its own samples a flow's FID is near 0, and an altered flow's is larger."""
    other, reference = random_flow(1, num_classes=3), Statistics()
    with torch.no_grad():
        other.var.mul_(0.2)
    for seed in range(8):
        x = MODEL.sample(96, torch.arange(96) % 3, seed=100 + seed)
        reference.update(net(to_uint8(x).repeat(1, 3, 1, 1)))
    own, foreign = (fid(each, reference, net, n=600, batch_size=300).distance for each in (MODEL, other))
    assert own < 0.1 * foreign


def test_samples_that_are_not_finite_are_left_out_and_counted(monkeypatch):
    sample = TarFlow.sample

    def broken(self, n, *args, **kwargs):
        x = sample(self, n, *args, **kwargs)
        x[1, 0, 3, 3], x[2, 0, 0, 0] = float("nan"), float("inf")
        return x

    reference = image_statistics(pictures(), net)
    seen = []
    monkeypatch.setattr(TarFlow, "sample", broken)
    found = fid(MODEL, reference, lambda images: seen.append(len(images)) or net(images), n=40, batch_size=20)
    assert found.bad == 4 and found.statistics.count == 36 and seen == [1, 18, 18] and found.distance > 0
    monkeypatch.setattr(TarFlow, "sample", lambda self, n, *args, **kwargs: torch.full((n, 1, 8, 8), float("nan")))
    with pytest.raises(ValueError, match="fid: needs at least 2 finite samples, got 0 of 4"):
        fid(MODEL, reference, net, n=4)


def test_fewer_samples_than_features_warn():
    reference = image_statistics(pictures(), net)
    with pytest.warns(RuntimeWarning, match=r"singular are sigma1 \(rank 4 of 6\): there were fewer samples"):
        assert np.isfinite(fid(MODEL, reference, net, n=5).distance)


def test_mistakes_are_found_before_a_sample_is_drawn(monkeypatch):
    monkeypatch.setattr(TarFlow, "sample", lambda *args, **kwargs: pytest.fail("drew"))
    reference = image_statistics(pictures(), net)
    for args, changes, error, message in (
        ((Statistics.of(ZERO, EYE), net), {}, ValueError, "fid: reference must be of features of size (6,), got (2,)"),
        ((reference, lambda images: 0), {}, TypeError, "fid: features must give a torch.Tensor, got int"),
        ((reference, lambda images: images), {}, ValueError, "fid: features must give shape (1, F), got (1, 3, 8, 8)"),
        ((reference, net), {"n": 1}, ValueError, "fid: n must be >= 2, got 1"),
        ((reference, net), {"batch_size": 0}, ValueError, "fid: batch_size must be >= 1, got 0"),
    ):
        with pytest.raises(error, match=re.escape(message) + "$"):
            fid(MODEL, *args, **changes)
    for images, message in (
        (pictures(1), "image_statistics: images must hold at least 2, got 1 (pictures)"),
        (pictures(4, channels=2), "image_statistics: images must have 1 or 3 channels, got 2"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            image_statistics(images, net)
