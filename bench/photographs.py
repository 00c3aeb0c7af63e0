"""A small flow of photographs, because digits do not show what a precision does to natural images.

It is trained the first time it is needed, on 32 x 32 crops of the two photographs that scikit-learn ships.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tarflow_fast import TarFlow

FOLDER = Path(__file__).parent / ".cache" / "photographs"
SIDE = 32
NOISE_STD = 0.05


def photograph_flow() -> TarFlow:
    """T = 64 tokens of 4 x 4 x 3, four blocks of two layers, C = 128. The first call trains it for some minutes."""
    from tarflow_fast.data import load_photographs
    from tarflow_fast.training import TrainConfig, train

    if not (FOLDER / "run" / "model" / "model.safetensors").exists():
        train(
            TrainConfig(
                out=FOLDER / "run", img_size=SIDE, in_channels=3, patch_size=4,
                channels=128, num_blocks=4, layers_per_block=2, noise_type="gaussian", noise_std=NOISE_STD,
                batch_size=64, epochs=40, lr=1e-3, seed=0, resume="none",
            ),
            load_photographs(SIDE, names=("china", "flower")),
        )  # fmt: skip
    return TarFlow.from_pretrained(FOLDER / "run" / "model", dtype=torch.float32)
