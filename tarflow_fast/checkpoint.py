"""Weights in files: safetensors folders of ours, .pth files of the original. Only tensors are read, never a pickle."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tarflow_fast.config import TarFlowConfig, check_img_size
from tarflow_fast.files import load_tensors, save_tensors, write_atomic
from tarflow_fast.validate import check_positive_int

if TYPE_CHECKING:
    from tarflow_fast.model import TarFlow

CONFIG, WEIGHTS = "config.json", "model.safetensors"
RUN = "model"  # the flow in the folder of a training run
_CONFIG_KEYS = tuple(field.name for field in fields(TarFlowConfig))


def infer_config(
    tensors: dict[str, Tensor], in_channels: int = 3, img_size: int | tuple[int, int] | None = None
) -> dict[str, Any]:
    """The constructor's arguments from the shapes of a state_dict.

    T and D come from `var`, K and L from the key numbers, C from `pos_embed`, nvp from the rows of `proj_out`; the
    patch size is sqrt(D / in_channels), and the image is square unless img_size says otherwise.

    Raises:
        ValueError: a key is missing, or the shapes do not fit in_channels and img_size.
    """
    blocks = {int(m[1]) for key in tensors if (m := re.match(r"blocks\.(\d+)\.", key))}
    layers = {int(m[1]) for key in tensors if (m := re.match(r"blocks\.0\.attn_blocks\.(\d+)\.", key))}
    needed = ("var", "blocks.0.pos_embed", "blocks.0.proj_out.weight")
    missing = [key for key in needed if key not in tensors]
    if missing or not layers:
        raise ValueError(f"from_checkpoint: not a TarFlow state_dict, missing {missing or ['blocks.0.attn_blocks.0']}")
    if tensors["var"].ndim != 2:
        raise ValueError(f"from_checkpoint: var must have shape (T, D), got {tuple(tensors['var'].shape)}")
    T, D = tensors["var"].shape
    in_channels = check_positive_int("from_checkpoint", "in_channels", in_channels)
    patch_size = math.isqrt(D // in_channels)
    if in_channels * patch_size**2 != D or patch_size == 0:
        raise ValueError(
            f"from_checkpoint: in_channels * p**2 must make token size {D}, got in_channels = {in_channels}"
        )
    if img_size is None:
        img_size = math.isqrt(T) * patch_size
    height, width = check_img_size("from_checkpoint", img_size)
    if (height // patch_size) * (width // patch_size) != T:
        raise ValueError(
            f"from_checkpoint: img_size must give {T} patches of {patch_size} x {patch_size} pixels "
            f"(pass img_size=(height, width) for images that are not square), got {img_size}"
        )
    class_embed = tensors.get("blocks.0.class_embed")
    return {
        "in_channels": in_channels,
        "img_size": img_size,
        "patch_size": patch_size,
        "channels": tensors["blocks.0.pos_embed"].size(1),
        "num_blocks": len(blocks),
        "layers_per_block": len(layers),
        "nvp": tensors["blocks.0.proj_out.weight"].size(0) == 2 * D,
        "num_classes": 0 if class_embed is None else class_embed.size(0),
    }


def _fill(
    cls: type[TarFlow], where: str, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype | None, device: Any
) -> TarFlow:
    """A model of `config` that owns the tensors, strict; built on the meta device, so that memory is allocated once."""
    dtypes = {value.dtype for value in tensors.values()}
    if dtype is None and len(dtypes) != 1:
        raise ValueError(f"{where}: tensors must share one dtype (or pass dtype=), got {sorted(map(str, dtypes))}")
    with torch.device("meta"):
        model = cls(**config)
    tensors = {key: value.to(device=device, dtype=dtype) for key, value in tensors.items()}
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{where}: the weights do not fit the model: {error}") from error
    return model.eval()


class CheckpointMixin:
    """Methods of `TarFlow` that read and write files."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`, each whole or not at all.

        Attention masks are left out of the file (`torch.save(model.state_dict())` has them, for the original).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: value for key, value in self.state_dict().items() if not key.endswith(".attn_mask")}
        save_tensors(folder / WEIGHTS, tensors)
        text = json.dumps({"model_type": "tarflow", **self.config}, indent=2) + "\n"
        write_atomic(folder / CONFIG, lambda temporary: temporary.write_text(text))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None, device: Any = None) -> TarFlow:
        """A model from a folder written by `save_pretrained`, strict, in eval mode.

        Args:
            folder: a local folder, or that of a training run, with model/ in it; any other name is taken for a Hugging
                Face Hub id (needs the `hub` extra).
            dtype: of the parameters; None keeps the file's.
            device: where to put them; None for the CPU.

        Raises:
            FileNotFoundError: config.json or model.safetensors is missing.
            ValueError: a damaged file, unknown or missing configuration keys, weights that do not fit.
        """
        folder = Path(folder).expanduser()
        if not folder.exists():
            folder = _download(str(folder))
        if not (folder / CONFIG).exists() and (folder / RUN / CONFIG).is_file():
            folder = folder / RUN
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"from_pretrained: folder must hold {CONFIG} and {WEIGHTS}, got {folder}")
        try:
            config = json.loads((folder / CONFIG).read_text())
            config.pop("model_type", None)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"from_pretrained: {folder / CONFIG} is not a JSON object: {error}") from error
        if set(config) != set(_CONFIG_KEYS):
            wrong = sorted(set(config) ^ set(_CONFIG_KEYS))
            raise ValueError(f"from_pretrained: {CONFIG} must have the keys {list(_CONFIG_KEYS)}, differing in {wrong}")
        return _fill(cls, "from_pretrained", config, load_tensors(folder / WEIGHTS), dtype, device)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        in_channels: int = 3,
        img_size: int | tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        key: str | None = None,
    ) -> TarFlow:
        """A model from a state_dict file of the original (.pth) or of ours, its architecture read off the shapes.

        Args:
            path: .pth, .pt, .bin or .safetensors; prefixes of DDP and torch.compile are stripped.
            in_channels: channels of the images, which the shapes do not tell.
            img_size: (height, width) where the images are not square.
            dtype, device: as in `from_pretrained`.
            key: where the file holds more than a state_dict, the entry that is it ("model", "ema"); None: the only one.

        Raises:
            TypeError: in_channels or img_size is no int.
            FileNotFoundError, ValueError, RuntimeError: see `load_tensors` and `infer_config`.
        """
        tensors = load_tensors(path, key)
        tensors = {key: value for key, value in tensors.items() if not key.endswith(".attn_mask")}
        config = infer_config(tensors, in_channels, img_size)
        return _fill(cls, "from_checkpoint", config, tensors, dtype, device)


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"from_pretrained: folder must exist, got {name!r} (a Hub id needs: pip install 'tarflow-fast[hub]')"
        ) from error
    return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
