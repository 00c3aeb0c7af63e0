"""The command `sample`: draws from a flow and writes a picture, numbers, or both."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sample:
    """Draws from a flow: images as one PNG grid, tokens as numbers (--save)."""

    model: str = "digits"
    """digits (the shipped flow), a folder (config.json, model.safetensors), or a checkpoint file (.pth, .ckpt)."""
    out: Path | None = None
    """The picture; left out: samples.png."""
    save: Path | None = None
    """Writes numbers, (n, C, H, W) in [-1, 1] or (n, T, D): .npy, .safetensors, or .npz (x, as drawn, and log_prob)."""
    n: int = 100
    """How many."""
    labels: Annotated[tuple[int, ...], arg(aliases=["--class", "--label"])] = ()
    """Classes to draw, in equal shares; -1 draws without a class. Left out: every class the flow knows."""
    guidance: Annotated[float, arg(aliases=["--cfg"])] = 0.0
    """How strongly the class is insisted on (or, without classes, how strongly attn_temp acts)."""
    guide_what: Literal["a", "b", "ab"] = "ab"
    """What guidance acts on: log-scale, shift, or both."""
    attn_temp: float = 1.0
    """Temperature of the attention in the unguided pass."""
    annealed_guidance: bool = False
    """Guidance grows along the tokens."""
    denoise: bool = True
    """Takes off the noise the flow was trained with, where that noise is known."""
    noise_std: float | None = None
    """That noise's standard deviation; left out: from the flow's train.json."""
    seed: int = 0
    """Of the noise; the same images on every device."""
    batch_size: int | None = None
    """Drawn together; left out: all, or 4096 where log_prob is wanted."""
    nrow: int | None = None
    """Images in a row of the picture; left out: a row a class, or a square."""
    scale: int | None = None
    """Screen pixels a pixel; left out: at least 40 an image."""
    precision: Literal["fp32", "bf16", "int8"] | None = None
    """What the engine computes the samples in (int8: on CPUs); left out: that of dtype."""
    solver: Literal["auto", "sequential", "windows"] = "auto"
    """Tokens one after another, or many in a pass until each satisfies its equation; auto: as `calibrate` found."""
    tolerance: float | None = None
    """Of windows: how far a token may be from its equation; left out: 0.001. 0: not a bit."""
    window: int | None = None
    """Of windows: tokens in a pass; left out: 16."""
    draft: Literal["bf16", "int8"] | None = None
    """Of windows: a cheaper precision for first values; left out: they are guessed."""
    nonfinite: Literal["warn", "raise", "ignore"] = "warn"
    """What to do when an image overflows."""
    backend: Literal["auto", "torch", "cpu", "triton", "cuda"] = "auto"
    """Which kernels."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1, ..."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Of the weights and the computation."""
    in_channels: Annotated[int | None, arg(aliases=["--channel_size"])] = None
    """Of a checkpoint file's images, which its shapes do not tell: 3, or this."""
    img_size: tuple[int, int] | None = None
    """Height and width of a checkpoint file's images, where they are not square."""
    head_size: int | None = None
    """Of a checkpoint file over tokens, which its shapes do not tell: 64, or this."""
    key: str | None = None
    """The part of a checkpoint file that is the flow, where it holds several ("state_dict", "ema")."""

    def run(self) -> int:
        import torch

        from tarflow_fast.flows import open_flow, training_noise
        from tarflow_fast.model import TarFlow
        from tarflow_fast.validate import check_positive_int, find_device

        for name in ("n", "batch_size", "nrow", "scale"):
            if getattr(self, name) is not None:
                check_positive_int("sample", name, getattr(self, name))
        for path in (self.out, self.save):
            if path is not None and path.is_dir():
                raise ValueError(f"sample: {path} is a folder, name a file in it")
        if self.out is not None and self.out.suffix not in ("", ".png"):
            raise ValueError(f"sample: out must end in .png, got {self.out}")
        if self.save is not None and self.save.suffix not in (".npz", ".npy", ".safetensors"):
            raise ValueError(f"sample: save must end in .npz, .npy or .safetensors, got {self.save}")
        device = find_device("sample", self.device)
        model, record = open_flow(
            self.model, dtype=getattr(torch, self.dtype), device=device, in_channels=self.in_channels,
            img_size=self.img_size, head_size=self.head_size, key=self.key,
        )  # fmt: skip
        images = isinstance(model, TarFlow)
        if not images:
            self._check_no_picture()
        model.backend = self.backend
        noise_std = training_noise(record) if self.noise_std is None else self.noise_std
        y, rows = None, None
        if self.labels or model.num_classes:
            labels = torch.tensor(self.labels or range(model.num_classes))
            y = labels[torch.arange(self.n) * len(labels) // self.n].to(device)
            rows = self.n // len(labels) if self.n % len(labels) == 0 else None
        draw = {
            "guidance": self.guidance, "guide_what": self.guide_what, "attn_temp": self.attn_temp,
            "annealed_guidance": self.annealed_guidance, "seed": self.seed, "progress": sys.stderr.isatty(),
            "nonfinite": self.nonfinite, "precision": self.precision, "solver": self.solver,
            "tolerance": self.tolerance, "window": self.window, "draft": self.draft,
        }  # fmt: skip
        if images and (self.save is None or self.save.suffix != ".npz"):
            x, drawn = model.sample(self.n, y, batch_size=self.batch_size, **draw), {}
        else:
            together = {} if self.batch_size is None else {"batch_size": self.batch_size}
            x, log_prob = model.sample_and_log_prob(self.n, y, **together, **draw)
            drawn = {"x": x, "log_prob": log_prob}
        if images:
            if noise_std and self.denoise:
                x = model.denoise(x, y, noise_std=noise_std, batch_size=self.batch_size, nonfinite=self.nonfinite)
            drawn = drawn or {"images": x}
        if self.save is not None:
            drawn = _save_numbers(drawn, self.save)
        if images:
            done = f"denoised (sigma {noise_std:g})" if noise_std and self.denoise else "not denoised"
            print(self._save_picture(x, rows) + f", {done}")
        if self.save is not None:
            print(f"{self.save}: {', '.join(drawn)}")
        return 0

    def _check_no_picture(self) -> None:
        if self.save is None:
            raise ValueError(f"sample: {self.model} is a flow over tokens and has no picture: name a file with --save")
        for name in ("out", "nrow", "scale", "noise_std"):
            if getattr(self, name) is not None:
                raise ValueError(f"sample: {name} is for images, and {self.model} is a flow over tokens")

    def _save_picture(self, x: torch.Tensor, rows: int | None) -> str:
        import math

        from tarflow_fast.data.images import save_grid

        out = Path("samples.png") if self.out is None else self.out
        nrow = self.nrow or (rows if rows and rows <= 32 else math.ceil(math.sqrt(self.n)))
        save_grid(x, out, nrow=nrow, scale=self.scale or max(1, math.ceil(40 / x.shape[-1])))
        return f"{out}: {self.n} images {x.shape[-2]}x{x.shape[-1]}, {nrow} in a row"


def _save_numbers(tensors: dict[str, torch.Tensor], path: Path) -> list[str]:
    """Writes tensors to a .npz or .safetensors file, the first alone to a .npy; tells what was written."""
    from tarflow_fast.files import save_tensors, write_atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        tensors = dict([*tensors.items()][:1])
    if path.suffix != ".safetensors":  # NumPy knows no bfloat16
        tensors = {name: value.float() if value.dtype.itemsize == 2 else value for name, value in tensors.items()}
    told = [f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" for value in tensors.values()]
    told = [f"{name} {what}" for name, what in zip(tensors, told, strict=True)] if len(told) > 1 else told
    if path.suffix == ".safetensors":
        save_tensors(path, tensors)
        return told
    import numpy as np

    arrays = {name: value.cpu().numpy() for name, value in tensors.items()}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, numpy would append .npy or .npz to it
            np.savez(file, **arrays) if path.suffix == ".npz" else np.save(file, *arrays.values())

    write_atomic(path, write)
    return told
