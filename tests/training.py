"""Small training runs and folders of pictures, for the tests of data, training, the command line and the demo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import tarflow_fast
from tarflow_fast.training.config import TrainConfig
from tarflow_fast.training.parallel import Workers
from tarflow_fast.training.trainer import Trainer

ALONE = Workers(0, 1, torch.device("cpu"))
ROOT = Path(tarflow_fast.__file__).parents[1]
TINY = dict(
    patch_size=4, channels=64, num_blocks=2, layers_per_block=1, batch_size=32, epochs=1.0, log_every=1,
    checkpoint_every=0, sample_every=0, device="cpu",
)  # fmt: skip


def tiny(out, **changes) -> TrainConfig:
    """The settings of a run on digits with 4 tokens of 16 numbers, and two blocks of one layer.

    A step takes milliseconds, and an epoch has 57 steps.
    """
    return TrainConfig(out=Path(out), **{**TINY, **changes})


def tiny_flags(out, **changes) -> list[str]:
    """The same settings as arguments of the command line."""
    values = {**TINY, "out": out, **changes}
    flags = ["train"]
    for name, value in values.items():
        flags += [f"--{'' if value else 'no_'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def command(*args, **env):
    """(arguments, keyword arguments) for subprocess to run `python -m ...` on one thread.

    It works whether the package is installed or not.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env}
    return [sys.executable, "-m", *map(str, args)], {"env": env, "text": True, "stdout": subprocess.PIPE, "stderr": -2}


def metrics(out, *names):
    """The values of these names in metrics.jsonl, one tuple for each line."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[name] for name in names) for line in lines]


def write_image(path, pixels, **save):
    """Writes pixels, an array of (height, width) or (height, width, 3) numbers, into a file, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path, **save)
    return path


def trainer_of(config, me=ALONE) -> Trainer:
    torch.manual_seed(0)
    return Trainer(config.resolved(), me)
