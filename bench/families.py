"""Families of flows side by side: what each gets out of the same seconds of training, and what sampling then costs.

    python bench/families.py                  digits, 20 seconds a family
    python bench/families.py --full           digits and Fashion-MNIST; writes docs/families.md

The flows are those of the libraries in bench/peers/. A library or a data set that is not there is named and skipped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import warnings
from pathlib import Path

import numpy as np
import torch
from families_check import DRAWS, ESTIMATE
from families_measure import BATCH, MOST_SECONDS, RATE, ROWS, Images, Result, load, measure
from peers import Family, families
from peers.peer import Peer
from report import machine, markdown

from tarflow_fast.data import ImageSet
from tarflow_fast.evaluate import histogram_bits
from tarflow_fast.files import write_atomic

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
SETS = ("digits", "fashion-mnist")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of training, for each family")
    parser.add_argument("--data", nargs="+", default=["digits"], help="data sets, as `tarflow-fast train` names them")
    parser.add_argument("--only", nargs="+", help="libraries to run")
    parser.add_argument("--full", action="store_true", help="digits and Fashion-MNIST, and write the page")
    parser.add_argument("--page", type=Path, help="where to write the page; with --full docs/families.md")
    asked = parser.parse_args()
    if not asked.seconds > 0:
        raise ValueError(f"families: --seconds must be > 0, got {asked.seconds}")
    sets, missing = [], []
    for name in SETS if asked.full else asked.data:
        try:
            sets.append(load(name))
        except (FileNotFoundError, ModuleNotFoundError) as error:
            missing.append(f"The data set {name} was skipped: {error}")
    tables = {images: run(images, asked.seconds, asked.only) for images in sets}
    text = page(tables, asked.seconds, missing, asked.only)
    path = asked.page or (PAGE if asked.full else None)
    if path:
        write_atomic(path, lambda temporary: temporary.write_text(text))
    print(text)


def run(images: Images, seconds: float, only: list[str] | None = None) -> dict[Family, Result]:
    """Every family that is there on one data set."""
    found = {}
    for family in chosen(only):
        if family.build is not None:
            found[family] = run_one(family, images, seconds)[1]
            print(images.name, *row(family, found[family]).values(), sep="  ", flush=True)
    return found


def run_one(family: Family, images: Images, seconds: float) -> tuple[Peer, Result]:
    """One family on one data set: the trained flow, and what the table says of it."""
    torch.manual_seed(0)
    np.random.seed(0)  # normflows draws the length of its series from NumPy
    with warnings.catch_warnings():
        if family.library != "tarflow_fast":
            warnings.simplefilter("ignore", UserWarning)  # what PyTorch says of the library's code
        peer = family.build(images.shape)
        return peer, measure(peer, images, seconds, checked_rows=2 if peer.dims < 256 else 1)


def chosen(only: list[str] | None) -> list[Family]:
    """The families of these libraries, or all. ValueError for a library that is not among them."""
    every = families()
    known = sorted({family.library for family in every})
    for name in only or ():
        if name not in known:
            raise ValueError(f"families: --only must name libraries among {', '.join(known)}, got {name!r}")
    return [family for family in every if not only or family.library in only]


def row(family: Family, result: Result) -> dict[str, str]:
    """One line of the table."""
    trained, checked = result.trained, result.checked
    plain = result.bits is not None
    return {
        "family": family.name,
        "library": family.library,
        "parameters": f"{result.parameters:,}",
        "training s": f"{trained.seconds:.1f}",
        "steps": str(trained.steps),
        "bits/dim": _bits(result) if plain else "refused",
        "1000 samples, s": _seconds(result.sampling, plain),
        "by one sweep, s": _seconds(result.one_sweep, False),
        "1000 log-densities, s": _seconds(result.density, plain),
        "error, nats": f"{checked.single:.1g}" + (f" (estimate +- {checked.spread:.1g})" if checked.spread else ""),
        "round trip": f"{checked.trip:.1g}",
    }


def _bits(result: Result) -> str:
    form = ".3f" if result.bits < 100 else ".3g"  # a flow that overflows on an image or two
    return f"{result.bits:{form}} +- {result.bits_error:{form}}"


def _seconds(value: float | None, expected: bool) -> str:
    if value is None:
        return "not drawn" if expected else "-"
    return f"{value:.3g}"


def page(tables: dict[Images, dict[Family, Result]], seconds: float, missing: list[str], only: list[str] | None) -> str:
    """The page, in Markdown."""
    skipped = [f"{each.library} was skipped: {each.why}." for each in chosen(only) if each.build is None]
    facts = machine().facts()
    libraries = {family.library for table in tables.values() for family in table} - {"tarflow_fast"}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(libraries))
    parts = [
        HEAD.format(
            seconds=f"{seconds:g}",
            rate=RATE,
            batch=BATCH,
            rows=ROWS,
            most=f"{MOST_SECONDS / 10:g}",
            draws=DRAWS,
            bias=ESTIMATE,
        )
    ]
    for images, table in tables.items():
        parts.append(f"## {images.name}\n\n{_about(images)}")
        if table:
            parts.append(markdown([row(family, result) for family, result in table.items()]))
        notes = [
            f"- {family.library}, {family.name}: {note}."
            for family, result in table.items()
            for note in (result.note, _skips(result))
            if note
        ]
        if notes:
            parts.append("\n".join(notes))
    parts += [f"- {line}" for line in (*skipped, *missing)]
    parts.append(
        f"## The machine\n\n{facts['machine']}, torch {facts['torch']}, Python {facts['python']}, "
        f"commit {facts['commit']}; {versions or 'no other library'}."
    )
    return "\n\n".join(parts) + "\n"


def _skips(result: Result) -> str:
    trained = result.trained
    return f"{trained.skipped} of {trained.steps} steps were not finite and changed nothing" if trained.skipped else ""


def _about(images: Images) -> str:
    known = ImageSet(images.train, None, (), images.levels, images.name)
    plain = histogram_bits(known, ImageSet(images.held_out, None, (), images.levels, images.name))
    C, H, W = images.shape
    return (
        f"{len(images.train)} images of {H} x {W} x {C} with {images.levels} levels for training, {len(images.choose)} "
        f"for choosing the weights, {len(images.held_out)} held out. One histogram a pixel, which knows nothing else, "
        f"needs {plain:.3f} bits/dim."
    )


HEAD = """# Families of flows, side by side

`python bench/families.py --full` writes this page. It asks what each family of flows gets out of {seconds} seconds of
training on this machine, and what its samples and log-densities then cost. No flow here is tuned, and none has its
published size or training time. The table compares small flows under one short budget, and not the families at their
best.

- **The same for all.** The images are uniformly dequantised, shifted and scaled by one mean and one standard deviation.
  AdamW runs with batches of {batch} and a learning rate of {rate:g}, which falls by a cosine over the seconds. Ten
  times it measures the images that choose the weights, which is part of the seconds. The best weights are kept.
- **bits/dim** is the mean over held-out images under one draw of noise, with its standard error.
- **1000 samples** are drawn in one call, after calls for 1, 10 and 100. Where one of those takes more than {most} s,
  the 1000 are not drawn. "By one sweep" is the same flow after `tarflow_fast.made.accelerate`
  ([masked flows](masked_flows.md)).
- **1000 log-densities** are one call on {rows} rows without gradients, the median of three.
- **Checked first.** Before anything is timed, the trained flow's log-density is compared in float64 with the logarithm
  of the determinant of its Jacobian, which autograd computes. Its inverse is compared with where it started. "Error" is
  that of the library in float32. A flow whose log-density or inverse is wrong is refused and has no figures. The reason
  stands below the table.
- **Estimates.** A residual flow estimates its log-density. There the mean of {draws} estimates must be within four
  standard errors and {bias:g} bits/dim of the truth."""

if __name__ == "__main__":
    main()
