"""The page of a shipped flow: what it draws, and how well, in pictures and figures.

    python bench/quality.py fashion                   (some minutes; needs the data set that the flow was trained on)
    python bench/quality.py fashion -o /tmp/pages

It writes <out>/<flow>.md and the pictures <out>/<flow>-*.png. On the page it replaces what stands between its two
markers and keeps the rest, which is written by hand. Every figure comes from this run, from one seed, and from the
first images there are: none is chosen.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import quality_parts as parts
import torch
from quality_page import Page, write
from quality_parts import Reading

from tarflow_fast import data
from tarflow_fast.cli.demo import denoised, draw_noise, sweep
from tarflow_fast.data.dequantize import to_unit
from tarflow_fast.data.images import make_grid
from tarflow_fast.data.sheet import Band
from tarflow_fast.evaluate import histogram_bits
from tarflow_fast.flows import SHIPPED, open_flow
from tarflow_fast.model import TarFlow

PAGES = Path(__file__).parents[1] / "docs" / "flows"
GUIDANCE = (0.0, 0.5, 1.0, 2.0, 3.0)
TEMPERATURES = (0.3, 0.5, 1.0, 1.5, 2.0)
PAIRS = 20  # of a sample and its nearest training image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flow", help=f"a shipped flow ({', '.join(SHIPPED)}), or a folder")
    parser.add_argument("-o", "--out", type=Path, default=PAGES, help="folder of the page and its pictures")
    parser.add_argument("--data_root", type=Path, help="where Fashion-MNIST is")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000, help="samples that are measured, at each setting")
    asked = parser.parse_args()
    try:
        page = make(asked.flow, asked.data_root, asked.seed, asked.count)
        print(write(page, asked.out))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


def make(flow: str, data_root: Path | None = None, seed: int = 0, count: int = 1000) -> Page:
    """The page of a flow.

    count: samples that are measured at each setting, and test images.
    Raises ValueError for a flow that is not over images or has no record of its data, FileNotFoundError or
    ModuleNotFoundError where the data set is missing.
    """
    model, record = open_flow(flow)
    config = record.get("config", {})
    if not isinstance(model, TarFlow) or "dataset" not in config:
        raise ValueError(f"quality: flow must be one over images with a train.json that names its data, got {flow}")
    whole = data.load_dataset(config["dataset"], config["img_size"], config["in_channels"], data_root=data_root)
    known, test = whole.split(config.get("holdout", 0.0))
    seen = not len(test)
    if seen:
        known, test = whole.split(0.2)
    page = Page(Path(flow).name, model, record, known, test, seen, seed, count)
    digest = hashlib.sha256(b"".join(value.half().numpy().tobytes() for value in model.state_dict().values()))
    page.say(
        f"Made by `python bench/quality.py {page.name}` with seed {seed}, of the weights {digest.hexdigest()[:12]} "
        "(SHA-256 of their numbers in float16). No sample is chosen: these are the first that the seed gives."
    )
    if seen:
        page.say(
            f"The flow was trained on all images of `{known.source}`. Where this page speaks of test images, it means "
            f"a fifth of them, which the flow has seen, and the training images are the other {len(known)}."
        )
    steps = [samples, bits, training]
    if page.sigma is not None:
        steps = [samples, settings, denoising, neighbours, training]
    for step in steps:
        print(f"{page.name}: {step.__name__}", flush=True)
        step(page)
    return page


def samples(page: Page) -> None:
    """Samples by class, or as they come."""
    columns = 12
    y = page.labels(columns)
    noise = draw_noise(
        page.model, len(y) if y is not None else (4 if page.known.shape[0] > 1 else 10) * columns, page.seed
    )
    x = page.model.reverse(noise, y, guidance=1.0 if page.classes else 0.0, nonfinite="ignore")
    clean = denoised(page.model, x, y, page.sigma)
    page.say("## Samples")
    if page.sigma is None:
        page.say("As they come: this flow was trained under uniform noise, so there is no noise to take off.")
    else:
        told = "At guidance 1, twelve of each class, " if page.classes else "They are "
        page.say(f"{told}denoised with sigma {page.sigma:g}.")
    page.show("samples", "samples", [Band([("", make_grid(clean, columns, **page.layout()))], page.classes)])
    broken = (~x.flatten(1).isfinite().all(1)).sum().item()
    if broken:
        page.say(f"{broken} of these {len(x)} samples overflowed: they hold numbers that are not finite, drawn black.")


def bits(page: Page) -> None:
    """What its likelihoods are worth."""
    shipped = page.record.get("shipped", {})
    drawn = page.model.sample(page.count, seed=page.seed, nonfinite="ignore", batch_size=100)
    broken = (~drawn.flatten(1).isfinite().all(1)).sum().item()
    page.say("## Likelihood")
    rows = [["a histogram for each pixel", f"{histogram_bits(page.known, page.test):.4f}"]]
    if "heldout_bits_per_dim" in shipped:
        told = f"{shipped['heldout_bits_per_dim']:.4f} +- {shipped['standard_error']:.4f}"
        rows.append([f"this flow, {shipped['heldout_images']} images, {shipped['n_draws']} draws of the noise", told])
    page.table(["bits/dim of images it was not trained on", ""], rows)
    page.say(
        f"Of {page.count} samples {broken} overflow: some of their numbers are not finite. `sample` warns of them."
    )


def training(page: Page) -> None:
    """The curve that bench/ship.py put beside the page."""
    if "shipped" in page.record:
        page.say("## Training", f"![loss and held-out bits/dim over the steps of training]({page.name}-curve.png)")


def settings(page: Page) -> None:
    """The same noise at several guidances and attention temperatures; with classes, how each is read."""
    if page.classes:
        page.say("## Guidance", "The same noise, two images of each class, denoised. 0 is the flow's own distribution.")
        names = {f"guidance {g:g}": dict(guidance=g) for g in GUIDANCE}
        page.show("guidance", "the same noise at guidance 0 to 3", [_swept(page, names)])
        reading(page)
    weight = 1.0 if page.classes else 2.0
    names = {
        f"attn_temp {t:g}": dict(guidance=weight, attn_temp=t) if page.classes or t != 1 else {} for t in TEMPERATURES
    }
    page.say(
        "## Attention temperature",
        f"The same noise at guidance {weight:g}, where the unguided pass divides its attention logits by `attn_temp`. "
        + ("1 is what the rows above show." if page.classes else "At 1 both passes agree, and nothing is guided."),
    )
    page.show("temperature", "the same noise at several attention temperatures", [_swept(page, names)])


def _swept(page: Page, names: dict[str, dict[str, float]]) -> Band:
    y = page.labels(2)
    noise = draw_noise(page.model, 10 if y is None else len(y), page.seed)
    return sweep(page.model, noise, y, page.classes, names, page.sigma, "", page.layout())


def reading(page: Page) -> None:
    """How a classifier that never saw a sample reads samples."""
    read = parts.learn_to_read(page.known.images, page.known.labels)
    real = Reading(page.test.labels, read(page.test.images))
    y = page.labels(max(1, page.count // len(page.classes)))
    ink = to_unit(page.known.images, page.known.levels).flatten(1).mean(1)
    emptiest = torch.stack([ink[page.known.labels == label].quantile(0.001) for label in range(len(page.classes))])
    readings, rows = {}, []
    for weight in GUIDANCE:
        print(f"{page.name}: {len(y)} samples at guidance {weight:g}", flush=True)
        x = page.draw(len(y), y, page.seed + 1, guidance=weight)
        readings[weight] = Reading(y, read(_bytes_like(page, x)))
        empty = (x.flatten(1).mean(1) < emptiest[y]).double().mean().item()
        rows.append([f"{weight:g}", f"{readings[weight].share():.3f}", f"{empty:.3f}"])
    page.say(
        "### Read by a classifier",
        "A support vector machine on principal components (scikit-learn), which was trained on the "
        f"{len(page.known)} real training images and on nothing else, reads {real.share():.3f} of the {len(page.test)} "
        f"test images as what they are. Of denoised samples, {len(y) // len(page.classes)} of each class, it reads as "
        "the class that was asked for:",
    )
    page.table(["guidance", "read as asked", "nearly empty"], rows)
    page.say(
        "Nearly empty is a sample that has less ink than 999 of 1000 training images of its class. By class, at "
        "guidance 1:"
    )
    rows = []
    for label, name in enumerate(page.classes):
        taken = readings[1.0].mistaken_for(label)
        told = "" if taken is None else f"{page.classes[taken[0]]}, {taken[1]:.2f}"
        rows.append([name, f"{real.share(label):.3f}", f"{readings[1.0].share(label):.3f}", told])
    page.table(["class", "test images read right", "samples read as asked", "else mostly read as"], rows)


def _bytes_like(page: Page, x: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as bytes with as many levels as the data's."""
    top = page.known.levels - 1
    return ((x.nan_to_num(-1, -1, -1) + 1) / 2 * top).round().clamp(0, top).to(torch.uint8)


def denoising(page: Page) -> None:
    """Noise on test images, taken off by the flow's score, beside the best linear filter."""
    few = 10 if page.known.shape[0] == 1 else 5  # noise in colour takes the most bytes of all
    chosen = page.test.subset(_spread(page, min(page.count // 2, len(page.test))))
    real, labels = to_unit(chosen.images, chosen.levels), chosen.labels if page.classes else None
    linear = parts.linear_filter(to_unit(page.known.images, page.known.levels))
    grids, names, rows = [real[:few]], ["test image"], []
    for sigma in (page.sigma / 2, page.sigma, 2 * page.sigma):
        generator = data.generator(page.seed, "noise of a page")
        noisy = real + sigma * torch.randn(real.shape, generator=generator)
        step = min(sigma, page.sigma)
        clean = page.model.denoise(noisy, labels, noise_std=step)
        errors = [noisy, linear(noisy, sigma), clean]
        if labels is not None:
            errors.append(page.model.denoise(noisy, noise_std=step))
        rows.append([f"{sigma:g}", *(f"{parts.mean_square(each, real):.5f}" for each in errors)])
        grids += [noisy[:few], clean[:few]]
        names += [f"sigma {sigma:g}", "denoised"]
    page.say(
        "## Denoising",
        "Test images, the same with noise of three levels, and x + s^2 grad log p(x), where s is the level of the "
        f"noise but at most {page.sigma:g}: the score is that of images with the noise of training, and a longer step "
        "overshoots.",
    )
    page.show(
        "denoised",
        "test images, noisy and denoised",
        [Band([("", make_grid(torch.cat(grids), few, **page.layout()))], names)],
    )
    page.say(
        f"Mean squared errors over {len(real)} test images in [-1, 1]. The linear filter is the best there is for "
        "images of the training images' mean and covariance:"
    )
    told = ["this flow, told the class", "not told"] if labels is not None else ["this flow"]
    page.table(["sigma", "noisy", "linear filter", *told], rows)


def _spread(page: Page, count: int) -> torch.Tensor:
    """Indices of test images: the first of each class, then the second, and so on; or, without labels, shuffled."""
    labels = page.test.labels
    if labels is None:
        generator = data.generator(page.seed, "test images of a page")
        return torch.randperm(len(page.test), generator=generator)[:count]
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        rank[labels == label] = torch.arange((labels == label).sum())
    return (rank * (labels.max() + 1) + labels).argsort()[:count]


def neighbours(page: Page) -> None:
    """Samples beside the nearest training images, and as far from them as test images are."""
    known = to_unit(page.known.images, page.known.levels)
    y = page.labels(max(2, page.count // max(1, len(page.classes))))
    x = page.draw(len(y) if y is not None else page.count, y, page.seed + 1, guidance=1.0 if page.classes else 0.0)
    test = page.test.subset(_spread(page, min(page.count, len(page.test))))
    others = to_unit(test.images, test.levels)
    bands, rows = [], []
    shown = _first(y, len(x)), torch.arange(min(PAIRS, len(others)))
    for name, images, at in (("sample", x, shown[0]), ("test image", others, shown[1])):
        distance, index = parts.nearest(images, known)
        panels = [
            (f"{distance[i]:.3f}", make_grid(torch.stack([images[i], known[index[i]]]), 1, **page.layout())) for i in at
        ]
        bands.append(Band(panels, [name, "nearest"]))
        low, middle, high = distance.quantile(torch.tensor([0.01, 0.5, 0.99])).tolist()
        rows.append([f"{len(images)} {name}s", f"{distance.min():.3f}", *(f"{v:.3f}" for v in (low, middle, high))])
    page.say(
        "## Nearest training images",
        "Samples (denoised"
        + (", at guidance 1" if page.classes else "")
        + f") above the nearest of {len(known)} training images; below them, test images the same way. Distances are "
        "root mean squares over pixels, in [-1, 1]. A copy would have a distance near 0.",
    )
    page.show("nearest", "samples and test images above their nearest training images", bands, gap=10)
    page.table(["distance to the nearest training image", "least", "1 %", "median", "99 %"], rows)


def _first(y: torch.Tensor | None, count: int) -> torch.Tensor:
    """Indices of the samples that are shown: two of each class, or the first."""
    if y is None:
        return torch.arange(min(PAIRS, count))
    return torch.cat([(y == label).nonzero().flatten()[:2] for label in y.unique()])


if __name__ == "__main__":
    main()
