"""Everything a training run needs to go on exactly: one safetensors file, written whole or not at all.

The file holds tensors and one JSON header, nothing that executes: `model.*`, `ema.*`, `optimizer.<parameter>.*`,
`rng.*`, `report.*`, where noise is learned `dequantizer.*` and `dequantizer_ema.*`, and {"format", "step", "config"}.
What is drawn, dropped labels and data order are functions of (seed, step), and the learning rate of (config, step), so
the step is all their state. Equal runs write equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

FORMAT = 1


class Ema:
    """Averaged weights: ema <- ema + (1 - d) (weights - ema), d = min(decay, (1 + step) / (10 + step)).

    The ramp lets the average follow the fast first steps. Buffers (the prior) are copied. `model` is a whole model that
    can be sampled and saved. decay 0 keeps it equal to the weights.
    """

    def __init__(self, averaged: nn.Module, decay: float) -> None:
        self.model = averaged.eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after step number `step` (0 for the first)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1.0 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without the constant attention masks."""
    return {name: value for name, value in model.state_dict().items() if not name.endswith("attn_mask")}


def save_state(
    path: Path,
    model: nn.Module,
    ema: Ema,
    optimizer: torch.optim.Optimizer,
    step: int,
    config: dict[str, Any],
    losses: Sequence[float] = (),
    more: dict[str, nn.Module] | None = None,
) -> None:
    """Writes the state after `step` steps to path, by way of a temporary file, fsync and rename.

    more: what is trained beside the model, by name.
    losses: of the steps that no line of metrics.jsonl tells yet, so that its next line will be the same after all.
    """
    from safetensors.torch import save_file

    from tarflow_fast.files import write_atomic

    tensors = {f"model.{name}": value for name, value in _weights(model).items()}
    tensors |= {f"ema.{name}": value for name, value in _weights(ema.model).items()}
    for kind, module in (more or {}).items():
        tensors |= {f"{kind}.{name}": value for name, value in _weights(module).items()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in entry.items()}
    tensors["report.losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors["rng.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # one metadata entry: the order of several is not fixed, and equal states are to give equal bytes
    header = json.dumps({"format": FORMAT, "step": step, "config": config}, sort_keys=True)
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata={"training": header}))


def read_state(path: Path) -> tuple[dict[str, torch.Tensor], int, dict[str, Any]]:
    """(tensors, step, config) of a file of `save_state`. Raises FileNotFoundError, or ValueError naming the file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"train: there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("training", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"train: cannot read the checkpoint {path}: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"train: {path} is no training checkpoint of format {FORMAT}")
    return tensors, int(header["step"]), header["config"]


def load_state(
    tensors: dict[str, torch.Tensor],
    path: Path,
    model: nn.Module,
    ema: Ema,
    optimizer: torch.optim.Optimizer,
    more: dict[str, nn.Module] | None = None,
) -> list[float]:
    """Puts the tensors of `read_state` back, and returns the losses that `save_state` was given.

    Raises ValueError naming path, before any tensor is put back, if they do not fit.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {"model": {}, "ema": {}, "optimizer": {}, "rng": {}, "report": {}}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        groups.setdefault(kind, {})[rest] = value
    modules = {"model": model, "ema": ema.model} | (more or {})
    for kind, module in modules.items():
        expected = {name: tuple(value.shape) for name, value in _weights(module).items()}
        got = {name: tuple(value.shape) for name, value in groups.get(kind, {}).items()}
        if expected != got:
            name = sorted(n for n in expected.keys() | got.keys() if expected.get(n) != got.get(n))[0]
            shapes = f"expected {expected.get(name)}, got {got.get(name)}"
            raise ValueError(f"train: {path} does not fit: {kind}.{name} {shapes}")
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in groups["optimizer"].items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    for kind, module in modules.items():
        module.load_state_dict(groups[kind])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(groups["rng"]["torch"])
    if torch.cuda.is_available() and "cuda" in groups["rng"]:
        torch.cuda.set_rng_state(groups["rng"]["cuda"])
    return groups["report"]["losses"].tolist() if "losses" in groups["report"] else []
