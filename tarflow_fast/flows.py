"""Finding a flow by name: a shipped one, a folder of `save_pretrained`, or a checkpoint file of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from tarflow_fast.data import VariationalDequantizer
    from tarflow_fast.flow import TokenFlow

# the flows that ship in the package, by name
SHIPPED = {config.parent.name: config.parent for config in sorted(Path(__file__).parent.glob("assets/*/config.json"))}


def open_flow(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    in_channels: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    head_size: int | None = None,
    key: str | None = None,
) -> tuple[TokenFlow, dict[str, Any]]:
    """(flow in eval mode, a `TarFlow` where it is one over images, its training record or {}).

    name: of a shipped flow, one of `SHIPPED`; a folder with config.json and model.safetensors (or a run's folder, with
    model/ in it); or a .pth, .ckpt, .pt or .safetensors file of a state_dict. Its shapes leave in_channels
    (default 3) and img_size open, if it is the original's, and head_size (default 64), if it is a flow over tokens: one
    without `var`, or with a Dropout in its MLPs. key: the part of the file that is the flow, where it holds several.
    dtype: None means float32, whatever the file holds.  Raises FileNotFoundError, ValueError as the loaders do.
    """
    import torch

    from tarflow_fast.checkpoint import is_token_file, read_config
    from tarflow_fast.files import load_tensors
    from tarflow_fast.flow import TokenFlow
    from tarflow_fast.model import TarFlow

    dtype = torch.float32 if dtype is None else dtype
    path = Path(SHIPPED.get(str(name), name)).expanduser()
    if len(path.parts) < 2 and not path.exists():  # a Hub id is owner/name
        raise FileNotFoundError(
            f"open_flow: name must be a flow that ships ({', '.join(SHIPPED)}), a folder, a file or a Hub id, "
            f"got {str(name)!r}"
        )
    if path.is_file():
        tensors = load_tensors(path, key)
        over_tokens = is_token_file(tensors)
        asked = {"in_channels": in_channels, "img_size": img_size} if over_tokens else {"head_size": head_size}
        for argument, value in asked.items():
            if value is not None:
                kinds = ("tokens", "images") if over_tokens else ("images", "tokens")
                raise ValueError(f"open_flow: {argument} is of flows over {kinds[1]}, {path} holds one over {kinds[0]}")
        if over_tokens:
            return TokenFlow._from_tensors(tensors, head_size, None, dtype, device), {}
        channels = 3 if in_channels is None else in_channels
        return TarFlow._from_tensors(tensors, channels, img_size, dtype, device), {}
    path, kind, _ = read_config(path)
    model = (TokenFlow if kind == TokenFlow._model_type else TarFlow).from_pretrained(path, dtype=dtype, device=device)
    record = path / "train.json"
    if not record.is_file():
        return model, {}
    try:
        return model, json.loads(record.read_text())
    except ValueError as error:
        raise ValueError(f"open_flow: {record} is not JSON: {error}") from error


def open_dequantizer(name: str | Path, *, device: Any = None) -> VariationalDequantizer | None:
    """The dequantiser that was trained with a flow and lies in its folder; None where there is none.

    name, device: as in `open_flow`.  Raises ValueError for a damaged file, FileNotFoundError as `open_flow`.
    """
    from tarflow_fast.checkpoint import DEQUANTIZER, read_config
    from tarflow_fast.data import VariationalDequantizer

    path = Path(SHIPPED.get(str(name), name)).expanduser()
    if path.is_file():
        return None
    folder, *_ = read_config(path)
    return VariationalDequantizer.load(folder, device) if (folder / DEQUANTIZER).is_file() else None


def training_noise(record: dict[str, Any]) -> float | None:
    """The standard deviation of the Gaussian noise a flow was trained with, which `denoise` needs; None if unknown."""
    config = record.get("config", {})
    return config.get("noise_std") if config.get("noise_type") == "gaussian" else None
