"""Scores of foreign images: areas against counted pairs, the laws of the scores, and the command `score`."""

import re
import zlib

import numpy as np
import pytest
import torch
from flows import random_flow
from PIL import Image

from tarflow_fast.cli import main
from tarflow_fast.cli.score import verdict
from tarflow_fast.data import ImageSet, load_array
from tarflow_fast.evaluate import evaluate
from tarflow_fast.ood import (
    SCORES,
    Area,
    area_under_roc,
    compare,
    complexity,
    compressed_bits,
    draw_histograms,
    typicality,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def images_of(pixels, levels=256):
    return ImageSet(pixels.to(torch.uint8), None, (), levels, "made up")


def noise(count, seed, channels=1, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


# ---------------------------------------------------------------- the area


@pytest.mark.parametrize(
    "own, other, area",
    [
        ([1, 2, 3], [4, 5], 1.0),
        ([4, 5], [1, 2, 3], 0.0),
        ([1, 3], [2, 4], 0.75),  # of the pairs (1, 2), (1, 4), (3, 2), (3, 4) one is the wrong way round
        ([1, 2], [2, 3], 0.875),  # one tie among four pairs
        ([7, 7, 7], [7, 7], 0.5),
        ([-float("inf"), 0], [0, float("inf")], 0.875),
    ],
)
def test_area_counts_pairs(own, other, area):
    assert area_under_roc(torch.tensor(own), torch.tensor(other)).value == area


def test_area_is_the_share_of_pairs():
    own, other = torch.randint(20, (83,)), torch.randint(5, 25, (57,))
    pairs = (other[None] > own[:, None]).double() + 0.5 * (other[None] == own[:, None]).double()
    found = area_under_roc(own, other)
    assert found.value == pytest.approx(pairs.mean().item(), rel=1e-12)
    variance = pairs.mean(0).var() / 57 + pairs.mean(1).var() / 83
    assert found.standard_error == pytest.approx(variance.sqrt().item(), rel=1e-9)


def test_area_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    own, other = torch.randint(12, (211,)), torch.randint(3, 15, (94,))  # many ties
    labels = [0] * len(own) + [1] * len(other)
    expected = metrics.roc_auc_score(labels, torch.cat([own, other]).tolist())
    assert area_under_roc(own, other).value == pytest.approx(expected, rel=1e-12)


def test_area_of_exchanged_sets_and_of_any_increasing_scale():
    own, other = torch.randn(60).double(), torch.randn(45).double() + 0.4
    found, exchanged = area_under_roc(own, other), area_under_roc(other, own)
    assert found.value == pytest.approx(1 - exchanged.value, abs=1e-12)
    assert found.standard_error == pytest.approx(exchanged.standard_error, rel=1e-9)
    assert area_under_roc(own.exp(), other.exp()) == found


def test_standard_error_is_the_spread_over_fresh_sets():
    drawn = [area_under_roc(torch.randn(80), torch.randn(50) + 0.8) for _ in range(400)]
    spread = torch.tensor([area.value for area in drawn]).std().item()
    told = sum(area.standard_error for area in drawn) / len(drawn)
    assert 0.87 < told / spread < 1.15  # a spread of 400 is known to 3.5 %


def test_standard_error_of_a_single_image_is_unknown():
    assert np.isnan(area_under_roc(torch.tensor([1.0]), torch.tensor([2.0, 3.0])).standard_error)


# ---------------------------------------------------------------- the scores


def test_typicality_is_two_sided_and_zero_at_the_mean():
    assert typicality(torch.tensor([2.0, 1.5, 3.0]), 2.0).tolist() == [0.0, 0.5, 1.0]


def test_a_constant_image_is_simple_and_noise_is_not():
    flat = compressed_bits(images_of(torch.full((2, 1, 28, 28), 77)))
    assert (flat < 0.25).all()
    rough = compressed_bits(images_of(noise(3, 0, size=28)))
    assert ((rough > 7.9) & (rough < 8.3)).all()  # it cannot be compressed, and zlib adds a few bytes


def test_a_png_may_be_the_smaller_one():
    """Of a ramp in two directions, PNG's filters leave next to nothing; zlib alone sees no repetition."""
    side = torch.arange(32)
    ramp = (side[:, None] * 5 + side[None] * 3) % 256
    (bits,) = compressed_bits(images_of(ramp[None, None]))
    assert bits < 0.5 * len(zlib.compress(ramp.to(torch.uint8).numpy().tobytes(), 9)) * 8 / 32**2


def test_compressed_bits_of_colours_and_of_many_images():
    images = noise(300, 1, channels=3)
    images[::2] = 9
    bits = compressed_bits(images_of(images))
    assert torch.equal(bits[270:], compressed_bits(images_of(images[270:])))
    assert bits[::2].max() < 1.5 < 7.9 < bits[1::2].min()


def test_complexity_is_what_the_compressor_leaves():
    assert complexity(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 6.0])).tolist() == [2.0, -1.0]


def test_compare_brings_the_scores_together():
    own, other = images_of(noise(5, 2)), images_of(torch.zeros(4, 1, 8, 8))
    own_bits, other_bits, reference = torch.rand(5) + 3, torch.rand(4), torch.tensor([2.0, 4.0])
    found = compare(own_bits, other_bits, own, other, reference)
    assert found.reference_mean == 3.0 and tuple(found.areas) == SCORES
    assert torch.equal(found.other["typicality"], typicality(other_bits, 3.0))
    assert torch.equal(found.own["complexity"], complexity(own_bits, compressed_bits(own)))
    assert found.areas["likelihood"].value == 0 and found.areas["typicality"].value == 1
    assert compare(own_bits, other_bits, own, other).reference_mean == pytest.approx(own_bits.double().mean().item())


FLAT = images_of(torch.zeros(2, 1, 8, 8))
BITS = torch.ones(2)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: area_under_roc([1.0], BITS), TypeError, "area_under_roc: own must be a tensor, got list"),
        (
            lambda: area_under_roc(BITS, torch.empty(0)),
            ValueError,
            "area_under_roc: other must have shape (n,) with n > 0, got (0,)",
        ),
        (
            lambda: area_under_roc(torch.tensor([1.0, np.nan]), BITS),
            ValueError,
            "area_under_roc: own must hold no NaN, got 1",
        ),
        (
            lambda: typicality(torch.tensor([1.0, np.inf]), 2.0),
            ValueError,
            "typicality: bits must be finite, got inf for image 1 and 1 such images of 2",
        ),
        (lambda: typicality(BITS, np.nan), ValueError, "typicality: reference_mean must be finite, got nan"),
        (
            lambda: complexity(BITS, torch.ones(3)),
            ValueError,
            "complexity: compressed must be of 2 images as bits is, got 3",
        ),
        (
            lambda: compressed_bits(images_of(torch.zeros(1, 2, 8, 8))),
            ValueError,
            "compressed_bits: images must have 1 or 3 channels, got 2 (made up)",
        ),
        (
            lambda: compare(BITS, torch.ones(3), FLAT, FLAT),
            ValueError,
            "compare: other_bits must be of 2 images (made up), got 3",
        ),
        (
            lambda: compare(BITS, BITS, FLAT, images_of(torch.zeros(2, 1, 8, 8), 17)),
            ValueError,
            "compare: both sets must have one number of grey levels, for bits/dim to mean the same, got 256 (made up) "
            "and 17 (made up)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message) + "$"):
        call()


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny flow over 8 x 8 images, and two sets: noise, and flat images."""
    folder = tmp_path_factory.mktemp("score")
    random_flow().save_pretrained(folder / "flow")
    np.save(folder / "noise.npy", noise(40, 3).numpy())
    np.save(folder / "flat.npy", (128 + noise(30, 4) % 2).numpy())
    np.save(folder / "wide.npy", noise(4, 5, size=12).numpy())
    return folder


def run(capsys, *args):
    code = main([str(arg) for arg in args])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_score_prints_and_writes_what_the_library_computes(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from tarflow_fast import TarFlow

    own, other = folder / "noise.npy", folder / "flat.npy"
    args = ["score", folder / "flow", "--data", own, "--against", other, "--n_draws", 2, "--seed", 5]
    code, out, err = run(capsys, *args, "--out", tmp_path / "out")
    model, sets = TarFlow.from_pretrained(folder / "flow"), [load_array(own), load_array(other)]
    bits = [evaluate(model, images, conditional=False, n_draws=2, seed=5) for images in sets]
    found = compare(bits[0].bits, bits[1].bits, *sets)
    lines = out.splitlines()
    assert code == 0 and err == ""
    assert lines[0] == f"{own}, all  40 images  bits/dim {bits[0].mean:.4f} +- {bits[0].standard_error:.4f}"
    assert lines[1] == f"{other}, all   30 images  bits/dim {bits[1].mean:.4f} +- {bits[1].standard_error:.4f}"
    for line, name in zip(lines[2:5], SCORES, strict=True):
        area = found.areas[name]
        assert re.sub(" +", " ", line) == (f"area under the ROC, {name} {area.value:.4f} +- {area.standard_error:.4f}")
    assert lines[5].endswith(f"from {bits[0].mean:.4f} bits/dim, the mean of 40 of these images of {own}")
    assert lines[6] == verdict(found.areas["likelihood"], str(other))
    assert lines[7] == f"{tmp_path}/out: scores.npz, histogram.png" and len(lines) == 8
    with np.load(tmp_path / "out" / "scores.npz") as written:
        assert len(written) == 7 and written["reference_mean"] == found.reference_mean
        for side, scores in (("data", found.own), ("against", found.other)):
            for name in SCORES:
                assert np.array_equal(written[f"{side}_{name}"], scores[name].numpy())
    picture = np.asarray(Image.open(tmp_path / "out" / "histogram.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_score_of_few_images_and_a_held_out_share(folder, capsys):
    args = ["score", folder / "flow", "--data", folder / "noise.npy", "--against", folder / "flat.npy"]
    code, out, _ = run(capsys, *args, "--holdout", 0.25, "--images", 8)
    lines = out.splitlines()
    assert code == 0 and [line.split("bits/dim")[0].split()[-2:] for line in lines[:2]] == [["8", "images"]] * 2
    assert f"{folder}/noise.npy, held out 0.25  8 images" in lines[0]
    assert "the mean of 8 other images of" in lines[5]
    assert run(capsys, *args, "--holdout", 0.25, "--images", 8) == (0, out, "")
    assert run(capsys, *args, "--holdout", 0.25, "--images", 8, "--seed", 1)[1] != out
    assert "  10 images" in run(capsys, *args, "--holdout", 0.25)[1].splitlines()[0]


def test_a_set_against_itself_is_not_told_apart(folder, capsys):
    path = folder / "noise.npy"
    _, out, _ = run(capsys, "score", folder / "flow", "--data", path, "--against", path)
    assert [line.split()[5] for line in out.splitlines()[2:5]] == ["0.5000"] * 3


@pytest.mark.parametrize(
    "area, error, words",
    [(0.2, 0.01, "here it did not: the area is below 0.5, so b gets the higher likelihood."),
     (0.481, 0.01, "here it did not: the area shows no difference from 0.5."),
     (0.47, 0.01, "here it did not: the area is below 0.5, so b gets the higher likelihood."),
     (0.5, 0.0, "here it did not: the area shows no difference from 0.5."),
     (0.6, 0.06, "here it did not: the area shows no difference from 0.5."),
     (1.0, float("nan"), "here it did not: the area shows no difference from 0.5."),
     (0.7, 0.01, "here it did so in part: b gets the lower likelihood in 70.0% of pairs."),
     (0.95, 0.01, "here it did: b gets the lower likelihood in 95.0% of pairs.")],
)  # fmt: skip
def test_verdict(area, error, words):
    assert verdict(Area(area, error), "b") == (
        f"Likelihood alone does not detect foreign images in general (arXiv 1810.09136); {words}"
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--images": "0"}, "score: images must be >= 1, got 0"),
        ({"--n_draws": "0"}, "score: n_draws must be >= 1, got 0"),
        ({"--holdout": "1.5"}, "split: holdout must be in [0, 1), got 1.5"),
        ({"--against": "{0}/none.npy"}, "load_array: path must be a file, got {0}/none.npy"),
        ({"--against": "{0}/wide.npy"}, "load_dataset: {0}/wide.npy must be 8 x 8 with 1 channel"),
        ({"--against": "digits"}, "score: both sets must have one number of grey levels"),
        ({"--out": "{0}/flat.npy"}, "score: out must be a folder, got the file {0}/flat.npy"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(folder, tmp_path, capsys, changes, message):
    flags = {"--data": "{0}/noise.npy", "--against": "{0}/flat.npy", "--out": str(tmp_path / "out")} | changes
    before = sorted(folder.rglob("*"))
    code, out, err = run(
        capsys, "score", folder / "flow", *(text.format(folder) for pair in flags.items() for text in pair)
    )
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {message.format(folder)}")
    assert sorted(folder.rglob("*")) == before and not [*tmp_path.iterdir()]


def test_score_without_matplotlib_says_what_it_left_out(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    args = ["--data", folder / "noise.npy", "--against", folder / "flat.npy", "--out", tmp_path]
    code, out, _ = run(capsys, "score", folder / "flow", *args)
    assert code == 0 and [path.name for path in tmp_path.iterdir()] == ["scores.npz"]
    assert out.endswith("scores.npz; histogram.png needs matplotlib: pip install 'tarflow-fast[report]'\n")


def test_histograms_of_equal_scores(tmp_path):
    pytest.importorskip("matplotlib")
    scores = {name: torch.ones(3) for name in SCORES}
    assert draw_histograms(tmp_path / "h.png", {"a": scores, "b": scores})
    assert [path.name for path in tmp_path.iterdir()] == ["h.png"]
