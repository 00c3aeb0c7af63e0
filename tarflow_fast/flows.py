"""Finding a flow by name: the shipped digits, a folder of `save_pretrained`, or a checkpoint file of the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from tarflow_fast.model import TarFlow

SHIPPED = {"digits": Path(__file__).parent / "assets" / "digits"}


def open_flow(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    in_channels: int | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> tuple[TarFlow, dict[str, Any]]:
    """(flow in eval mode, its training record or {}).

    name: "digits"; a folder with config.json and model.safetensors (or a run's folder, with model/ in it); or a .pth,
    .pt or .safetensors file of the original's state_dict, whose shapes leave in_channels (default 3) and img_size open.
    dtype: None means float32, whatever the file holds.  Raises FileNotFoundError, ValueError as the loaders do.
    """
    import torch

    from tarflow_fast.checkpoint import CONFIG, RUN
    from tarflow_fast.model import TarFlow

    dtype = torch.float32 if dtype is None else dtype
    path = Path(SHIPPED.get(str(name), name)).expanduser()
    if (path / RUN / CONFIG).is_file():
        path = path / RUN
    if path.is_file():
        channels = 3 if in_channels is None else in_channels
        return TarFlow.from_checkpoint(path, channels, img_size, dtype=dtype, device=device), {}
    model = TarFlow.from_pretrained(path, dtype=dtype, device=device)
    record = path / "train.json"
    if not record.is_file():
        return model, {}
    try:
        return model, json.loads(record.read_text())
    except ValueError as error:
        raise ValueError(f"open_flow: {record} is not JSON: {error}") from error


def training_noise(record: dict[str, Any]) -> float | None:
    """The standard deviation of the Gaussian noise a flow was trained with, which `denoise` needs; None if unknown."""
    config = record.get("config", {})
    return config.get("noise_std") if config.get("noise_type") == "gaussian" else None
