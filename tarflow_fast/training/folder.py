"""The folder of a run: what is written there, and what an earlier run or a killed process left there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tarflow_fast.checkpoint import DEQUANTIZER
from tarflow_fast.solvers.plan import PLAN
from tarflow_fast.training.config import TrainConfig

CHECKPOINT = "checkpoint.safetensors"
FLOWS = ("model", "best")
_FLOW = ("model.safetensors", "config.json", "train.json", DEQUANTIZER, PLAN)
# Subfolder -> names of the files in it, the checkpoint first. Whatever else is there is the user's, and is left alone.
_WRITTEN: dict[str, tuple[str, ...]] = {
    "": (CHECKPOINT, "metrics.jsonl", "curve.png"),
    **dict.fromkeys(FLOWS, _FLOW),
    "samples": ("step_*.png",),
    "tensorboard": ("events.out.tfevents.*",),
}


def grid_path(out: Path, step: int) -> Path:
    """The grid of samples after so many steps."""
    return out / "samples" / f"step_{step:07d}.png"


def holds_flow(out: Path) -> bool:
    """Whether model/ of a folder holds a flow, or a part of one."""
    return any((out / "model" / name).exists() for name in _FLOW[:2])


def remove_leftovers(out: Path) -> None:
    """Removes the temporary files of a process that was killed while it wrote."""
    for path in _files(out, prefix=".", suffix=".*"):
        path.unlink(missing_ok=True)


def clear(out: Path) -> None:
    """Removes all that an earlier run wrote.

    The checkpoint goes first: if the process is killed in between, the next start is a fresh one, and goes on clearing.
    """
    for path in _files(out):
        path.unlink(missing_ok=True)
    for place in filter(None, _WRITTEN):
        with suppress(OSError):  # the user's own files are in it, or it is not there
            (out / place).rmdir()


def clear_strangers(out: Path, config: TrainConfig, steps: int) -> None:
    """Removes what does not belong to a run that goes on, in this folder, from a checkpoint that lay elsewhere.

    That is everything where the folder is another run's, and else the flows of steps that are still to come.
    """
    records = {place: _record(out / place / "train.json") for place in FLOWS if (out / place / "train.json").exists()}
    if any(record is None or config.difference(record["config"]) for record in records.values()):
        clear(out)
        return
    for place, record in records.items():
        if record["result"]["steps"] > steps:
            for name in _FLOW:
                (out / place / name).unlink(missing_ok=True)


def _files(out: Path, prefix: str = "", suffix: str = "") -> Iterator[Path]:
    for place, names in _WRITTEN.items():
        for name in names:
            yield from sorted((out / place).glob(f"{prefix}{name}{suffix}"))


def _record(path: Path) -> dict | None:
    """What a train.json says; None where it cannot be read."""
    try:
        record = json.loads(path.read_text())
        return record if {"config", "result"} <= set(record) else None
    except (ValueError, TypeError):
        return None
