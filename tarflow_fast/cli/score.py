"""The command `score`: whether a flow tells foreign images from its own, by likelihood and by two better scores."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from tarflow_fast.data import ImageSet
    from tarflow_fast.evaluate import Bits
    from tarflow_fast.ood import Area, Comparison


@dataclass(frozen=True)
class Score:
    """Scores images of a data set and of a foreign one under a flow, and tells how well each score sets them apart."""

    model: Positional[Annotated[str, arg(metavar="FLOW")]]
    """digits (the shipped flow), a folder, or a checkpoint file."""
    data: str
    """The data the flow knows, as `evaluate --dataset`."""
    against: str
    """The other data, named likewise; its own test part where it has one, or all of it."""
    data_root: Path | None = None
    """As for train."""
    strict: bool = False
    """As for train."""
    holdout: float = 0.0
    """Of --data, measures on this share only, the one that `train --holdout` keeps away."""
    images: int | None = None
    """Scores this many of each set, drawn with the seed; left out: all."""
    n_draws: int = 1
    """Dequantisation draws an image."""
    batch_size: int = 64
    """Rows together."""
    seed: int = 0
    """Of the draws, and of the images."""
    out: Path | None = None
    """Folder for scores.npz and, where matplotlib is installed, histogram.png; left out: writes nothing."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    in_channels: Annotated[int | None, arg(aliases=["--channel_size"])] = None
    """Of a checkpoint file's images: 3, or this."""
    img_size: tuple[int, int] | None = None
    """Height and width of a checkpoint file's images, where they are not square."""
    key: str | None = None
    """The part of a checkpoint file that is the flow, where it holds several ("state_dict", "ema")."""

    def run(self) -> int:
        from tarflow_fast.cli.parts import note_on_training, part_to_measure
        from tarflow_fast.data import load_dataset
        from tarflow_fast.evaluate import evaluate
        from tarflow_fast.flows import open_dequantizer, open_flow
        from tarflow_fast.model import TarFlow
        from tarflow_fast.ood import check_levels, compare
        from tarflow_fast.validate import check_positive_int, find_device

        for name in ("batch_size", "n_draws", "images"):
            if getattr(self, name) is not None:
                check_positive_int("score", name, getattr(self, name))
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise ValueError(f"score: out must be a folder, got the file {self.out}")
        device = find_device("score", self.device)
        model, record = open_flow(
            self.model, device=device, in_channels=self.in_channels, img_size=self.img_size, key=self.key
        )
        if not isinstance(model, TarFlow):
            raise ValueError(f"score: the flow must be one over images, {self.model} is a flow over tokens")
        dequantizer = open_dequantizer(self.model, device=device)
        shape = model.config["img_size"], model.config["in_channels"]
        own, other = (
            load_dataset(name, *shape, data_root=self.data_root, strict=self.strict)
            for name in (self.data, self.against)
        )
        check_levels("score", own, other)
        known, own, which = part_to_measure(own, self.holdout)
        _, other, other_which = part_to_measure(other, 0.0)
        apart = known is not own
        own, other = self._few(own), self._few(other)

        def measure(images: ImageSet) -> Bits:
            return evaluate(
                model, images, conditional=False, n_draws=self.n_draws, seed=self.seed, batch_size=self.batch_size,
                progress=sys.stderr.isatty(), dequantizer=dequantizer,
            )  # fmt: skip

        own_bits, other_bits = measure(own), measure(other)
        # As many of the known images as of the measured ones are enough: it is a mean, and they may be 60,000.
        reference = measure(_some(known, len(own), self.seed)) if apart else own_bits
        found = compare(own_bits.bits, other_bits.bits, own, other, reference.bits)
        note = note_on_training(record, self.data, self.holdout)
        if note:
            print(note)
        sets = [(f"{self.data}, {which}", own_bits), (f"{self.against}, {other_which}", other_bits)]
        print(_table(sets, found.areas))
        print(
            f"typicality is measured from {found.reference_mean:.4f} bits/dim, the mean of {len(reference.bits)} "
            f"{'other' if apart else 'of these'} images of {self.data}"
        )
        print(verdict(found.areas["likelihood"], self.against))
        if self.out is not None:
            print(self._write(found))
        return 0

    def _few(self, images: ImageSet) -> ImageSet:
        return images if self.images is None else _some(images, self.images, self.seed)

    def _write(self, found: Comparison) -> str:
        import numpy as np

        from tarflow_fast.files import write_atomic
        from tarflow_fast.ood import draw_histograms

        arrays = {f"{side}_{name}": scores.numpy() for side, each in (("data", found.own), ("against", found.other))
                  for name, scores in each.items()}  # fmt: skip
        arrays["reference_mean"] = np.array(found.reference_mean)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:  # given a name, numpy would append .npz to it
                np.savez(file, **arrays)

        self.out.mkdir(parents=True, exist_ok=True)
        write_atomic(self.out / "scores.npz", write)
        drawn = draw_histograms(self.out / "histogram.png", {self.data: found.own, self.against: found.other})
        if drawn:
            return f"{self.out}: scores.npz, histogram.png"
        return f"{self.out}: scores.npz; histogram.png needs matplotlib: pip install 'tarflow-fast[report]'"


def _some(images: ImageSet, count: int, seed: int) -> ImageSet:
    """`count` images of a set, in their order, or the set where it has no more."""
    import torch

    from tarflow_fast.data import generator

    if len(images) <= count:
        return images
    return images.subset(torch.randperm(len(images), generator=generator(seed, "score"))[:count].sort().values)


def _table(sets: list[tuple[str, Bits]], areas: dict[str, Area]) -> str:
    width = max(len(name) for name, _ in sets)
    lines = [
        f"{name:{width}}  {len(bits.bits)} images  bits/dim {bits.mean:.4f} +- {bits.standard_error:.4f}"
        for name, bits in sets
    ]
    lines += [f"area under the ROC, {name:10}  {area.value:.4f} +- {area.standard_error:.4f}"
              for name, area in areas.items()]  # fmt: skip
    return "\n".join(lines)


def verdict(area: Area, against: str) -> str:
    """One sentence on whether likelihood told the sets apart: an area of at least 0.9 counts as that.

    An area within two standard errors of 0.5, or one of a single image, shows neither direction.
    """
    if not abs(area.value - 0.5) > 2 * area.standard_error:  # also where the standard error is NaN
        here = "here it did not: the area shows no difference from 0.5"
    elif area.value < 0.5:
        here = f"here it did not: the area is below 0.5, so {against} gets the higher likelihood"
    elif area.value < 0.9:
        here = f"here it did so in part: {against} gets the lower likelihood in {area.value:.1%} of pairs"
    else:
        here = f"here it did: {against} gets the lower likelihood in {area.value:.1%} of pairs"
    return f"Likelihood alone does not detect foreign images in general (arXiv 1810.09136); {here}."
