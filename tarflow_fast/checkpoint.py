"""Weights in files: safetensors folders of ours, .pth files of others. Only tensors are read, never a pickle."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tarflow_fast.block import TRANSFORM_KEY, check_transform, transform_in
from tarflow_fast.config import FlowConfig, TarFlowConfig, check_img_size
from tarflow_fast.files import few, load_tensors, save_tensors, write_atomic
from tarflow_fast.net import HEAD_SIZE
from tarflow_fast.solvers.plan import SolverPlan
from tarflow_fast.validate import check_positive_int

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG, WEIGHTS = "config.json", "model.safetensors"
DEQUANTIZER = "dequantizer.safetensors"  # beside them, where the noise of the bytes was learned: data/variational.py
RUN = "model"  # the flow in the folder of a training run
# What config.json calls a flow: the class that opens it, and the class of its arguments.
MODEL_TYPES = {"tarflow": ("TarFlow", TarFlowConfig), "tokenflow": ("TokenFlow", FlowConfig)}
_NAME = re.compile(rf"blocks\.\d+\.{TRANSFORM_KEY}")  # of a transform that the original has not
# Of the flows of others: masks are buffers there, and a Dropout stands between the activation and the second Linear.
_MASK = re.compile(r"(^|[._])mask$")
_BEHIND_DROPOUT = re.compile(r"(blocks\.\d+\.attn_blocks\.\d+\.mlp\.main\.)3(\.(?:weight|bias))")


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
        hint = " (TokenFlow.from_checkpoint opens flows over tokens)" if missing == ["var"] else ""
        raise ValueError(
            f"from_checkpoint: not a TarFlow state_dict, missing {missing or ['blocks.0.attn_blocks.0']}{hint}"
        )
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
        "nvp": tensors["blocks.0.proj_out.weight"].size(0) != D,
        "num_classes": 0 if class_embed is None else class_embed.size(0),
    } | _told_transform(tensors)


def is_token_file(tensors: dict[str, Tensor]) -> bool:
    """Whether a file's tensors are a flow over tokens of others: no `var`, or a Dropout in the MLPs."""
    return "var" not in tensors or any(_BEHIND_DROPOUT.fullmatch(key) for key in tensors)


def infer_tokens(
    tensors: dict[str, Tensor], head_size: int | None = None, orders: Sequence[Sequence[int]] | Tensor | None = None
) -> dict[str, Any]:
    """The constructor's arguments of a `TokenFlow` from the shapes of a state_dict.

    T and C come from `pos_embed`, D from the columns of `proj_in`, K and L from the key numbers, the MLP's width from
    `mlp.main.0`, nvp from the rows of `proj_out`, all of block 0; the others are held to them by `_fill`.

    Raises:
        TypeError, ValueError: a key is missing, the shapes make no flow, head_size or orders do not fit them.
    """
    where, sizes = "from_checkpoint", {}
    needed = {"pos_embed": 2, "proj_in.weight": 2, "proj_out.weight": 2, "attn_blocks.0.mlp.main.0.weight": 2}
    for name, dims in (needed | ({"class_embed": 3} if "blocks.0.class_embed" in tensors else {})).items():
        sizes[name] = tuple(tensors[f"blocks.0.{name}"].shape) if f"blocks.0.{name}" in tensors else None
        if sizes[name] is not None and len(sizes[name]) != dims:
            raise ValueError(f"{where}: blocks.0.{name} must have {dims} dimensions, got shape {sizes[name]}")
    if missing := [f"blocks.0.{name}" for name, size in sizes.items() if size is None]:
        raise ValueError(f"{where}: not a state_dict of a flow over tokens, missing {few(missing)}; got {few(tensors)}")
    (T, C), D = sizes["pos_embed"], sizes["proj_in.weight"][1]
    hidden, outputs = sizes["attn_blocks.0.mlp.main.0.weight"][0], sizes["proj_out.weight"][0]
    if head_size is None and C % HEAD_SIZE:
        raise ValueError(
            f"{where}: head_size must be given, because the shapes do not tell it and {HEAD_SIZE}, the usual one, does "
            f"not divide channels = {C}"
        )
    if hidden == 0 or C == 0 or hidden % C:
        raise ValueError(f"{where}: mlp.main.0.weight must have a multiple of channels = {C} rows, got {hidden}")
    told = _told_transform(tensors)
    if not told and outputs not in (D, 2 * D):
        raise ValueError(
            f"{where}: proj_out.weight must have {D} or {2 * D} rows for tokens of size {D}, got {outputs}"
        )
    config = FlowConfig(
        num_tokens=T,
        token_size=D,
        channels=C,
        num_blocks=_count(r"blocks\.(\d+)\.", tensors),
        layers_per_block=_count(r"blocks\.0\.attn_blocks\.(\d+)\.", tensors),
        head_size=HEAD_SIZE if head_size is None else head_size,
        expansion=hidden // C,
        nvp=bool(told) or outputs == 2 * D,
        num_classes=sizes.get("class_embed", (0,))[0],
        orders=orders,
        **told,
    )
    return config.checked(where).json()


def _told_transform(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The constructor's argument for a transform that the original has not, whose name stands beside the weights."""
    name = transform_in(tensors, "blocks.0.") if f"blocks.0.{TRANSFORM_KEY}" in tensors else None
    return {} if name is None else {"transform": name}


def _count(pattern: str, tensors: dict[str, Tensor]) -> int:
    return len({int(found[1]) for key in tensors if (found := re.match(pattern, key))})


def _usual(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a flow over tokens under the names of ours, with the variance 1 where a file has none."""
    names = {key: _BEHIND_DROPOUT.sub(r"\g<1>2\2", key) for key in tensors}
    tensors = {key if names[key] in tensors else names[key]: value for key, value in tensors.items()}
    pos_embed, proj_in = tensors["blocks.0.pos_embed"], tensors["blocks.0.proj_in.weight"]
    return {"var": torch.ones(pos_embed.size(0), proj_in.size(1), dtype=pos_embed.dtype)} | tensors


def _without_masks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if not _MASK.search(key)}


def _without_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if not _NAME.fullmatch(key)}


def _fill(
    cls: type, where: str, config: dict, tensors: dict[str, Tensor], dtype: torch.dtype | None, device: Any
) -> Any:
    """A model of `config` that owns the tensors, strict; built on the meta device, so that memory is allocated once."""
    with torch.device("meta"):
        model = cls(**config)
    for k, block in enumerate(model.blocks):
        check_transform(where, block.transform, tensors, f"blocks.{k}.")
    tensors = _without_names(tensors)
    wanted = _without_names(_without_masks(model.state_dict()))
    wrong = {
        "Missing keys": [key for key in wanted if key not in tensors],
        "foreign keys": [key for key in tensors if key not in wanted],
        "size mismatch": [
            f"{key} is {tuple(tensors[key].shape)}, expected {tuple(wanted[key].shape)}"
            for key in wanted
            if key in tensors and tensors[key].shape != wanted[key].shape
        ],
    }
    if any(wrong.values()):
        told = "; ".join(f"{what} ({len(names)}): {few(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"{where}: the weights do not fit the model: {told}")
    dtypes = {value.dtype for value in tensors.values()}
    if (dtype is None and len(dtypes) != 1) or not all(kind.is_floating_point for kind in dtypes):
        got = sorted(map(str, dtypes))
        raise ValueError(f"{where}: tensors must share one floating dtype (or pass dtype=), got {got}")
    tensors = {key: value.to(device=device, dtype=dtype) for key, value in tensors.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


def read_config(folder: str | Path) -> tuple[Path, str | None, dict[str, Any]]:
    """Where config.json lies, its model_type, and the rest of it.

    folder: as in `from_pretrained`.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is not a JSON object, or not of a flow.
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
        kind = config.pop("model_type", None)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"from_pretrained: {folder / CONFIG} is not a JSON object: {error}") from error
    if kind is not None and (not isinstance(kind, str) or kind not in MODEL_TYPES):
        expected = " or ".join(map(repr, MODEL_TYPES))
        raise ValueError(f"from_pretrained: model_type in {folder / CONFIG} must be {expected}, got {kind!r}")
    return folder, kind, config


class CheckpointMixin:
    """Methods of `TokenFlow` that read and write files."""

    _model_type: ClassVar[str] = "tokenflow"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`, each whole or not at all.

        Attention masks are left out of the file (`torch.save(model.state_dict())` has them, for the original).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / WEIGHTS, _without_masks(self.state_dict()))
        text = json.dumps({"model_type": self._model_type, **self.config}, indent=2) + "\n"
        write_atomic(folder / CONFIG, lambda temporary: temporary.write_text(text))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None, device: Any = None) -> Self:
        """A model from a folder written by `save_pretrained`, strict, in eval mode.

        Args:
            folder: a local folder, or that of a training run, with model/ in it; any other name is taken for a Hugging
                Face Hub id (needs the `hub` extra).
            dtype: of the parameters; None keeps the file's.
            device: where to put them; None for the CPU.

        Raises:
            FileNotFoundError: config.json or model.safetensors is missing.
            ValueError: a damaged file, a flow of the other kind (`TarFlow` over images, `TokenFlow` over tokens),
                unknown or missing configuration keys, orders that are no permutations, weights that do not fit.
        """
        folder, kind, config = read_config(folder)
        if kind not in (None, cls._model_type):
            raise ValueError(
                f"from_pretrained: {folder} must hold a {cls._model_type!r} flow, got {kind!r}: open it with "
                f"{MODEL_TYPES[kind][0]}.from_pretrained"
            )
        keys = [field.name for field in fields(MODEL_TYPES[cls._model_type][1]) if field.name != TRANSFORM_KEY]
        if wrong := sorted({*config} - {TRANSFORM_KEY} ^ {*keys}):
            raise ValueError(f"from_pretrained: {CONFIG} must have the keys {keys}, differing in {wrong}")
        model = _fill(cls, "from_pretrained", config, load_tensors(folder / WEIGHTS), dtype, device)
        model.solver_plan = SolverPlan.load(folder, len(model.blocks))
        return model

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        head_size: int | None = None,
        orders: Sequence[Sequence[int]] | Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        key: str | None = None,
    ) -> Self:
        """A flow over tokens from a file of its state_dict, its architecture read off the shapes.

        It reads our own state_dicts and those of single-system flows of transferable-samplers (SBG, arXiv 2502.18462),
        whose network this is: their masks are left out, their MLPs have a Dropout that shifts a number in the names,
        and where there is no `var` it is 1.

        Args:
            path: .pth, .pt, .ckpt, .bin or .safetensors; what DDP, torch.compile, Lightning or an average put before
                the names is taken off.
            head_size: E, which the shapes do not tell; None: 64, where it divides the channels.
            orders: as in the constructor, which the shapes do not tell; None: as they are and in reverse, in turn.
            dtype, device: as in `from_pretrained`.
            key: where the file holds more than one flow, or other tensors beside it, the part to take: an entry of
                the file ("state_dict", "ema"), or what stands before the names ("net"). None: the only one.

        Raises:
            TypeError, ValueError: the file holds no such flow, or more than one; head_size or orders do not fit it.
            FileNotFoundError, RuntimeError: see `load_tensors`.
        """
        return cls._from_tensors(load_tensors(path, key), head_size, orders, dtype, device)

    @classmethod
    def _from_tensors(
        cls, tensors: dict[str, Tensor], head_size: int | None, orders: Any, dtype: torch.dtype | None, device: Any
    ) -> Self:
        tensors = _without_masks(tensors)
        config = infer_tokens(tensors, head_size, orders)
        return _fill(cls, "from_checkpoint", config, _usual(tensors), dtype, device)


class ImageCheckpointMixin(CheckpointMixin):
    """Those of `TarFlow`."""

    _model_type: ClassVar[str] = "tarflow"

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        in_channels: int = 3,
        img_size: int | tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        key: str | None = None,
    ) -> Self:
        """A model from a state_dict file of the original (.pth) or of ours, its architecture read off the shapes.

        Args:
            path: .pth, .pt, .ckpt, .bin or .safetensors; what DDP, torch.compile, Lightning or an average put before
                the names is taken off.
            in_channels: channels of the images, which the shapes do not tell.
            img_size: (height, width) where the images are not square.
            dtype, device: as in `from_pretrained`.
            key: where the file holds more than a state_dict, the entry that is it ("model", "ema"); None: the only one.

        Raises:
            TypeError: in_channels or img_size is no int.
            FileNotFoundError, ValueError, RuntimeError: see `load_tensors` and `infer_config`.
        """
        return cls._from_tensors(load_tensors(path, key), in_channels, img_size, dtype, device)

    @classmethod
    def _from_tensors(
        cls, tensors: dict[str, Tensor], in_channels: Any, img_size: Any, dtype: torch.dtype | None, device: Any
    ) -> Self:
        tensors = _without_masks(tensors)
        config = infer_config(tensors, in_channels, img_size)
        return _fill(cls, "from_checkpoint", config, tensors, dtype, device)


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"from_pretrained: folder must exist, got {name!r} (a Hub id needs: pip install 'tarflow-fast[hub]')"
        ) from error
    return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, DEQUANTIZER]))
