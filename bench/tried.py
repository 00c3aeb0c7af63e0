"""What was tried for the likelihood flow, and what more time would give: a table and a curve, from the runs' files.

    python bench/tried.py runs/likelihood runs/likelihood2 --others runs/pixel

The runs are one chain, each going on from the one before; --others were separate tries. It writes
docs/flows/fashion-likelihood-tried.md and docs/flows/fashion-likelihood-tried.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ship import hours

from tarflow_fast.training.report import lines_of

OUT = Path(__file__).parents[1] / "docs" / "flows"
NAME = "fashion-likelihood-tried"
HEAD = (
    "| run | patch | C | blocks x layers | batch | highest rate | from | images | hours | bits/dim, last batches "
    "| best held out |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--others", nargs="*", type=Path, default=[])
    asked = parser.parse_args()
    curve = chained(asked.runs)
    draw(curve, OUT / f"{NAME}.png")
    (OUT / f"{NAME}.md").write_text(page(asked.runs, asked.others, curve))


def lines(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(text) for text in lines_of(run / "metrics.jsonl")]


def settings(run: Path) -> dict[str, object]:
    """The settings of a run."""
    return json.loads((run / "model" / "train.json").read_text())["config"]


def chained(runs: list[Path]) -> list[tuple[float, float]]:
    """(images seen by the chain so far, held-out bits/dim of the averaged weights)."""
    points, before = [], 0
    for run in runs:
        batch_size, found = settings(run)["batch_size"], lines(run)
        points += [
            (before + line["step"] * batch_size, line["heldout_bits_per_dim"])
            for line in found
            if "heldout_bits_per_dim" in line
        ]
        before += found[-1]["step"] * batch_size
    return points


def page(runs: list[Path], others: list[Path], curve: list[tuple[float, float]]) -> str:
    """The page, in Markdown."""
    rows = []
    for run in [*runs, *others]:
        config, found = settings(run), lines(run)
        held_out = [line["heldout_bits_per_dim"] for line in found if "heldout_bits_per_dim" in line]
        recent = found[-5:]
        rows.append(
            f"| {run.name} | {config['patch_size']} | {config['channels']} | {config['num_blocks']} x "
            f"{config['layers_per_block']} | {config['batch_size']} | {config['lr']:g} | {config.get('start') or ''} | "
            f"{found[-1]['step'] * config['batch_size']} | {hours(run):.2f} | "
            f"{sum(line['bits_per_dim'] for line in recent) / len(recent):.2f} | "
            f"{f'{min(held_out):.3f}' if held_out else ''} |"
        )
    half = min((images for images, _ in curve), key=lambda images: abs(images - curve[-1][0] / 2))
    gained = dict(curve)[half] - curve[-1][1]
    table = "\n".join(rows)
    return f"""# What was tried for `fashion-likelihood`

`bench/tried.py` wrote this page from the runs' files. Every run is on one core of a CPU, on Fashion-MNIST
without labels under uniform noise, with bf16 products.

{HEAD}
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}

Bits/dim of the last batches are means over the last five lines that were logged, one batch each. Those held out are of
the averaged weights on 500 or fewer test images, one draw.

![held-out bits/dim over the images seen](fashion-likelihood-tried.png)

From {half:,.0f} to {curve[-1][0]:,.0f} images the held-out bits/dim fell by {gained:.3f}, to {curve[-1][1]:.3f}. In
that time the learning rate fell to nothing, so another doubling at a constant rate would give less.
"""


def draw(curve: list[tuple[float, float]], path: Path) -> None:
    """The curve, over a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", xlabel="images seen", ylabel="held-out bits/dim")
    axes.plot(*zip(*curve, strict=True), marker=".")
    axes.grid(True, which="both", alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
