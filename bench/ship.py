"""Makes a shipped flow of training runs: 16-bit weights, what was measured on them, and a model card.

    python bench/ship.py fashion runs/fashion
    python bench/ship.py fashion-likelihood runs/first runs/second     (the second went on from the first: --start)

It writes tarflow_fast/assets/<name>/ (config.json, model.safetensors, train.json, README.md) and docs/flows/<name>.png,
the training curve of the last run. Every figure of the card is read from the runs' files or measured here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from pathlib import Path

import torch

from tarflow_fast import data
from tarflow_fast.evaluate import evaluate
from tarflow_fast.info import info
from tarflow_fast.model import TarFlow
from tarflow_fast.training.config import from_file
from tarflow_fast.training.report import lines_of

ROOT = Path(__file__).parents[1]
LIMIT = 8_000_000  # bytes of a shipped flow
DATA = {
    "fashion-mnist": (
        "The 60,000 training images of Fashion-MNIST (H. Xiao, K. Rasul and R. Vollgraf, arXiv 1708.07747), which are "
        "under the MIT licence."
    ),
    "photographs": (
        "Crops, at half size, of pictures that scikit-image and scikit-learn carry: astronaut (NASA, public domain), "
        "coffee and rocket (CC0), and china (CC BY 2.0). The pictures chelsea and flower are held out whole."
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="what the flow is called: fashion, fashion-likelihood, photographs")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of the runs, in order")
    parser.add_argument("--draws", type=int, default=8, help="dequantisation draws of the held-out bits/dim")
    parser.add_argument("--data_root", type=Path)
    asked = parser.parse_args()
    ship(asked.name, asked.runs, asked.draws, asked.data_root)


def ship(name: str, runs: list[Path], draws: int, data_root: Path | None) -> None:
    """Writes the folder of the flow that the last run ended with."""
    records = [json.loads((run / "model" / "train.json").read_text()) for run in runs]
    record, config = records[-1], records[-1]["config"]
    model = TarFlow.from_pretrained(runs[-1] / "model").half()
    folder = ROOT / "tarflow_fast" / "assets" / name
    model.save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    if size > LIMIT:
        raise ValueError(f"ship: the weights must take at most {LIMIT} bytes, got {size}")
    whole = data.load_dataset(config["dataset"], config["img_size"], config["in_channels"], data_root=data_root)
    held_out = whole.split(config["holdout"])[1]
    bits = evaluate(
        TarFlow.from_pretrained(folder, dtype=torch.float32),
        held_out,
        n_draws=draws,
        batch_size=100,
        progress=sys.stderr.isatty(),
    )
    record["shipped"] = {
        "heldout_bits_per_dim": bits.mean, "standard_error": bits.standard_error, "heldout_images": len(held_out),
        "n_draws": draws, "hours": sum(map(hours, runs)), "machine": machine(), "bytes": size,
        "commands": [command(run) for run in runs],
    }  # fmt: skip
    (folder / "train.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(card(name, model, record))
    (ROOT / "docs" / "flows").mkdir(exist_ok=True)
    shutil.copyfile(runs[-1] / "curve.png", ROOT / "docs" / "flows" / f"{name}-curve.png")
    print(f"{folder}: {size} bytes, held out {bits.mean:.4f} +- {bits.standard_error:.4f} bits/dim")


def command(run: Path) -> str:
    """The command line of a run, by the defaults of today."""
    return f"{from_file(run / 'model' / 'train.json').command()} --out runs/{run.name}"


def hours(run: Path) -> float:
    """Time spent on steps, from metrics.jsonl."""
    batch_size = json.loads((run / "model" / "train.json").read_text())["config"]["batch_size"]
    total, before = 0.0, 0
    for line in map(json.loads, lines_of(run / "metrics.jsonl")):
        total += (line["step"] - before) * batch_size / line["images_per_second"]
        before = line["step"]
    return total / 3600


def machine() -> str:
    """The CPU that this runs on, in words."""
    cpu = info()["cpu"]
    dots = "AVX-512 BF16" if "avx512_bf16" in cpu["features"] else "AVX2"
    return f"{cpu['model']}, {cpu['cores']} cores of a virtual machine, {dots}"


def card(name: str, model: TarFlow, record: dict) -> str:
    """The model card, in Markdown."""
    config, shipped = record["config"], record["shipped"]
    uniform = config["noise_type"] == "uniform"
    parameters = sum(each.numel() for each in model.parameters()) / 1e6
    height, width = data.image_size(model.img_size)
    kind = f"with {model.num_classes} classes" if model.num_classes else "without classes"
    noise = "uniform noise of one level" if uniform else f"Gaussian noise of standard deviation {config['noise_std']:g}"
    commands = "\n".join(shipped["commands"])
    measured = f"{shipped['heldout_images']} images, {shipped['n_draws']} draws, these weights"
    gaussian = (
        "This flow was trained on images with Gaussian noise, so its bits/dim, which are measured with "
        f"uniform noise, say little about it. Samples gain from `denoise(x, y, noise_std={config['noise_std']:g})`."
    )
    what = (
        f"A TarFlow of {parameters:.2f} M parameters for images of {height} x {width} x {model.in_channels}, {kind}, "
        f"stored in float16: {model.num_tokens} tokens of {model.token_size} numbers, {config['num_blocks']} blocks of "
        f"{config['layers_per_block']} layers, {config['channels']} channels. It was trained on images in [-1, 1] with "
        f"{noise}."
    )
    return f"""# The flow `{name}`

{_wrapped(what)}

```python
from tarflow_fast.flows import open_flow

model, record = open_flow("{name}")
images = model.sample(16{", y=3, guidance=1.0" if model.num_classes else ""}, seed=0)
```

| | |
| --- | --- |
| data | {record["data"]["images"]} images, `{config["dataset"]}` |
| held-out bits/dim | {shipped["heldout_bits_per_dim"]:.4f} +- {shipped["standard_error"]:.4f}, {measured} |
| training | {shipped["hours"]:.1f} hours, {shipped["machine"]} |
| weights | {shipped["bytes"] / 1e6:.1f} MB, under this project's licence (MIT) |

Training commands:

```
{commands}
```
{"" if uniform else chr(10) + _wrapped(gaussian) + chr(10)}
{_wrapped("Data: " + DATA[config["dataset"]])}
"""


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False))


if __name__ == "__main__":
    main()
