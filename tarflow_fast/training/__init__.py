"""Training: `fit(model, data)`, and `train(TrainConfig(...))`, which is `tarflow-fast train`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tarflow_fast.training.config import TrainConfig
    from tarflow_fast.training.run import Run, fit, train

__all__ = ["Run", "TrainConfig", "fit", "train"]


def __getattr__(name: str) -> object:
    # Loaded when asked for: the command line reads config.py, which should not wait for torch.
    import importlib

    if name in __all__:
        home = "config" if name == "TrainConfig" else "run"
        return getattr(importlib.import_module(f"tarflow_fast.training.{home}"), name)
    raise AttributeError(f"module 'tarflow_fast.training' has no attribute {name!r}")
