"""A small flow of photographs, because digits do not show what a precision does to natural images.

It is trained the first time it is needed, on 32 x 32 crops of the two photographs that scikit-learn ships (CC BY 2.0,
see its documentation).
"""

from __future__ import annotations

from pathlib import Path

import torch

from tarflow_fast import TarFlow

FOLDER = Path(__file__).parent / ".cache" / "photographs"
SIDE, STRIDE = 32, 16
NOISE_STD = 0.05


def crops(folder: Path) -> None:
    """Write overlapping crops of both photographs, at half size, as PNG files."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        image = Image.fromarray(pixels)
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for top in range(0, image.height - SIDE + 1, STRIDE):
            for left in range(0, image.width - SIDE + 1, STRIDE):
                image.crop((left, top, left + SIDE, top + SIDE)).save(folder / name / f"{top:03d}_{left:03d}.png")


def photograph_flow() -> TarFlow:
    """T = 64 tokens of 4 x 4 x 3, four blocks of two layers, C = 128. The first call trains it for some minutes."""
    from tarflow_fast.training.config import TrainConfig
    from tarflow_fast.training.run import train

    if not (FOLDER / "run" / "model" / "model.safetensors").exists():
        crops(FOLDER / "crops")
        train(
            TrainConfig(
                dataset=str(FOLDER / "crops"), out=FOLDER / "run", img_size=SIDE, in_channels=3, patch_size=4,
                channels=128, num_blocks=4, layers_per_block=2, noise_type="gaussian", noise_std=NOISE_STD,
                batch_size=64, epochs=40, lr=1e-3, seed=0, resume="none",
            )
        )  # fmt: skip
    return TarFlow.from_pretrained(FOLDER / "run" / "model", dtype=torch.float32)
