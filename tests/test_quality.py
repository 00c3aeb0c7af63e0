"""The page of a flow (bench/quality.py): its measures follow their formulas, and the page keeps what people wrote."""

import re
from pathlib import Path

import pytest
import torch

from tarflow_fast import data
from tarflow_fast.model import TarFlow

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def bench(monkeypatch, threads):
    threads(1)
    monkeypatch.syspath_prepend(ROOT / "bench")


def test_nearest_is_that_of_all_distances():
    from quality_parts import nearest

    x, known = torch.randn(7, 1, 3, 2), torch.randn(40, 1, 3, 2)
    known[11] = x[4]
    distance, index = nearest(x, known, rows=3)
    every = torch.cdist(x.flatten(1).double(), known.flatten(1).double()) / 6**0.5
    assert torch.equal(index, every.argmin(1)) and torch.allclose(distance.double(), every.amin(1), atol=1e-6)
    assert index[4] == 11 and distance[4] == 0


def test_the_linear_filter_is_the_best_for_normal_images():
    """On normal images of covariance S it must reach the error trace(S - S (S + sigma^2)^-1 S), the least there is."""
    from quality_parts import linear_filter, mean_square

    root = torch.randn(9, 9) / 3
    known, fresh = ((torch.randn(20_000, 9) @ root.T + 5).view(-1, 1, 3, 3) for _ in range(2))
    covariance, sigma = root @ root.T, 0.5
    least = covariance - covariance @ torch.linalg.solve(covariance + sigma**2 * torch.eye(9), covariance)
    noisy = fresh + sigma * torch.randn_like(fresh)
    error = mean_square(linear_filter(known)(noisy, sigma), fresh)
    assert error == pytest.approx(least.trace().item() / 9, rel=0.02) and error < 0.9 * sigma**2


def test_a_reading():
    from quality_parts import Reading

    reading = Reading(torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 2, 2, 1, 1, 1]))
    assert (reading.share(), reading.share(0), reading.share(1)) == (0.5, 0.25, 1.0)
    assert reading.mistaken_for(0) == (2, 0.5) and reading.mistaken_for(1) is None


def test_the_page_of_digits(tmp_path):
    """The figures are those of a flow that draws legible digits, takes noise off, and copies no image."""
    import quality
    import quality_page

    page = quality.make("digits", count=100)
    told = quality_page.write(page, tmp_path)
    text = (tmp_path / "digits.md").read_text()
    pictures = set(re.findall(r"\]\((\S+\.png)\)", text))
    assert pictures == {path.name for path in tmp_path.glob("*.png")} and len(pictures) == 5
    assert str(sum((tmp_path / name).stat().st_size for name in pictures)) in told
    tables = {}
    for line in re.findall(r"^\| (.*) \|$", text, re.M):
        first, *rest = line.split(" | ")
        tables.setdefault(first, rest)  # 1 is a guidance, and then a class
    accuracy = float(re.search(r"reads\s(\d\.\d+)\sof\sthe\s359\s+test", text)[1])
    assert accuracy > 0.97  # of real digits
    assert 0.9 < float(tables["1"][0]) <= 1 and float(tables["1"][1]) < 0.2  # digits at guidance 1 are legible
    noisy, linear, known, unknown = map(float, tables["0.1"])
    assert noisy == pytest.approx(0.01, rel=0.1) and known < linear < noisy and unknown < linear
    least = float(tables["100 samples"][0])
    assert 0.03 < least < float(tables["100 samples"][2]) < 0.5  # no copy, and no noise
    assert "a fifth of them, which the flow has seen" in " ".join(text.split())


def test_what_people_wrote_is_kept(tmp_path):
    import quality_page
    from quality_page import BEGIN, END, Page

    flow = TarFlow(1, 8, 2, 64, 1, 1)
    images = data.ImageSet(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), None, (), 256, "none")
    page = Page("mine", flow, {}, images, images, True, 0, 10, ["first"])
    quality_page.write(page, tmp_path)
    path = tmp_path / "mine.md"
    assert path.read_text().count("first") == 1 and path.read_text().endswith("## What it cannot do\n")
    path.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    page.text = ["second"]
    quality_page.write(page, tmp_path)
    assert path.read_text() == f"before\n\n{BEGIN}\n\nsecond\n\n{END}\n\nafter\n"
    path.write_text("by hand")
    page.pictures = {"mine-samples.png": b"1"}
    with pytest.raises(ValueError, match=r"quality: .*mine.md must hold the lines <!--"):
        quality_page.write(page, tmp_path)
    page.pictures = {"mine-samples.png": bytes(700_001)}
    path.unlink()
    with pytest.raises(ValueError, match="quality: the pictures of a page must take at most 700000 bytes, got 700001"):
        quality_page.write(page, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_flow_without_a_record_has_no_page(tmp_path):
    import quality

    TarFlow(1, 8, 2, 64, 1, 1).save_pretrained(tmp_path / "flow")
    with pytest.raises(
        ValueError, match=r"quality: flow must be one over images with a train\.json that names its data"
    ):
        quality.make(str(tmp_path / "flow"))


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
def test_the_page_of_a_flow_without_classes(noise, tmp_path):
    """Colour, no labels: no guidance and no classifier. Under uniform noise: samples and likelihoods alone."""
    import json

    import numpy as np
    import quality

    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=images)
    folder = tmp_path / "flow"
    TarFlow(3, 8, 4, 64, 1, 1).save_pretrained(folder)
    config = dict(dataset=str(tmp_path / "images.npz"), img_size=8, in_channels=3, noise_type=noise, noise_std=0.1)
    (folder / "train.json").write_text(json.dumps({"config": {**config, "holdout": 0.2}}))
    page = quality.make(str(folder), count=20)
    kinds = {name.removeprefix("flow-").removesuffix(".png") for name in page.pictures}
    assert kinds == ({"samples"} if noise == "uniform" else {"samples", "temperature", "denoised", "nearest"})
    text = "\n".join(page.text)
    assert not page.seen and "guidance 0" not in text and "classifier" not in text
    if noise == "uniform":
        bits = float(re.search(r"a histogram for each pixel \| (\S+) \|", text)[1])
        assert 8 < bits < 8.5 and "Of 20 samples 0 overflow" in text  # pixels of pure chance cost 8 bits and more
