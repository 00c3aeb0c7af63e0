"""The command line tool: demo, train, sample, evaluate, info, verify. Loads torch only inside a command.

Flags may be written with underscores or dashes. Exit codes: 0 done; 1 a check failed; 2 bad input; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg, subcommand

from tarflow_fast.training.config import TrainConfig, from_file

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Demo:
    """Draws 100 handwritten digits with the shipped flow, checks them against plain PyTorch, and times both."""

    out: Path = Path("demo")
    """Folder for samples.png."""
    train: bool = False
    """Train the flow afresh first (about two minutes on two cores) instead of loading the shipped one."""
    seed: int = 0
    """Of the noise, and of the training."""
    guidance: float = 1.0
    """How strongly the class is insisted on."""
    repeats: int = 7
    """Timed turns of each implementation."""

    def run(self) -> int:
        from tarflow_fast.cli.demo import demo

        report, ok = demo(self.out, train=self.train, seed=self.seed, guidance=self.guidance, repeats=self.repeats)
        print(report)
        return 0 if ok else 1


@dataclass(frozen=True)
class Sample:
    """Draws images from a flow and writes them as one PNG grid."""

    model: str = "digits"
    """digits (the shipped flow), a folder (config.json, model.safetensors), or the original's checkpoint (.pth)."""
    out: Path = Path("samples.png")
    """The picture."""
    save: Path | None = None
    """Also writes the images as numbers in [-1, 1], (n, C, H, W): a .npy or .safetensors file."""
    n: int = 100
    """How many images."""
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
    """Images drawn together; left out: all."""
    nrow: int | None = None
    """Images in a row of the picture; left out: a row a class, or a square."""
    scale: int | None = None
    """Screen pixels a pixel; left out: at least 40 an image."""
    precision: Literal["fp32", "bf16", "int8"] | None = None
    """What the engine computes the samples in (int8: on CPUs); left out: that of dtype."""
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

    def run(self) -> int:
        import math

        import torch

        from tarflow_fast.data.images import save_grid
        from tarflow_fast.flows import open_flow, training_noise
        from tarflow_fast.validate import check_positive_int, find_device

        for name in ("n", "nrow", "scale"):
            if getattr(self, name) is not None:
                check_positive_int("sample", name, getattr(self, name))
        for path in (self.out, self.save):
            if path is not None and path.is_dir():
                raise ValueError(f"sample: {path} is a folder, name a file in it")
        if self.out.suffix not in ("", ".png"):
            raise ValueError(f"sample: out must end in .png, got {self.out}")
        if self.save is not None and self.save.suffix not in (".npy", ".safetensors"):
            raise ValueError(f"sample: save must end in .npy or .safetensors, got {self.save}")
        device = find_device("sample", self.device)
        model, record = open_flow(
            self.model, dtype=getattr(torch, self.dtype), device=device,
            in_channels=self.in_channels, img_size=self.img_size,
        )  # fmt: skip
        model.backend = self.backend
        noise_std = training_noise(record) if self.noise_std is None else self.noise_std
        y, rows = None, None
        if self.labels or model.num_classes:
            labels = torch.tensor(self.labels or range(model.num_classes))
            y = labels[torch.arange(self.n) * len(labels) // self.n].to(device)
            rows = self.n // len(labels) if self.n % len(labels) == 0 else None
        x = model.sample(
            self.n, y, guidance=self.guidance, guide_what=self.guide_what, attn_temp=self.attn_temp,
            annealed_guidance=self.annealed_guidance, seed=self.seed, batch_size=self.batch_size,
            progress=sys.stderr.isatty(), nonfinite=self.nonfinite, precision=self.precision,
        )  # fmt: skip
        if noise_std and self.denoise:
            x = model.denoise(x, y, noise_std=noise_std, batch_size=self.batch_size, nonfinite=self.nonfinite)
        nrow = self.nrow or (rows if rows and rows <= 32 else math.ceil(math.sqrt(self.n)))
        scale = self.scale or max(1, math.ceil(40 / x.shape[-1]))
        if self.save is not None:
            _save_numbers(x, self.save)
        save_grid(x, self.out, nrow=nrow, scale=scale)
        done = f"denoised (sigma {noise_std:g})" if noise_std and self.denoise else "not denoised"
        print(f"{self.out}: {self.n} images {x.shape[-2]}x{x.shape[-1]}, {nrow} in a row, {done}")
        if self.save is not None:
            print(f"{self.save}: {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}")
        return 0


@dataclass(frozen=True)
class Evaluate:
    """Measures a flow's bits per dimension on a set of images (uniform dequantisation)."""

    model: str = "digits"
    """digits (the shipped flow), a folder, or the original's checkpoint file."""
    dataset: str = "digits"
    """digits, or a folder of images."""
    holdout: float = 0.0
    """Measures on this share of the images only, the one that `train --holdout` keeps away from training."""
    unconditional: bool = False
    """Does not tell the flow the labels."""
    n_draws: int = 1
    """Dequantisation draws an image."""
    batch_size: int = 64
    """Images together."""
    seed: int = 0
    """Of the draws."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    in_channels: Annotated[int | None, arg(aliases=["--channel_size"])] = None
    """Of a checkpoint file's images: 3, or this."""
    img_size: tuple[int, int] | None = None
    """Height and width of a checkpoint file's images, where they are not square."""

    def run(self) -> int:
        from tarflow_fast.data import ImageFiles, load_dataset
        from tarflow_fast.evaluate import evaluate, histogram_bits
        from tarflow_fast.flows import open_flow
        from tarflow_fast.validate import find_device

        device = find_device("evaluate", self.device)
        model, record = open_flow(self.model, device=device, in_channels=self.in_channels, img_size=self.img_size)
        whole = load_dataset(self.dataset, model.config["img_size"], model.config["in_channels"])
        known, part = whole.split(self.holdout) if self.holdout else (whole, whole)
        bits = evaluate(
            model, part, conditional=not self.unconditional, n_draws=self.n_draws, seed=self.seed,
            batch_size=self.batch_size, progress=sys.stderr.isatty(),
        )  # fmt: skip
        trained = record.get("config", {})
        if trained.get("dataset") == self.dataset and trained.get("holdout", 0.0) != self.holdout:
            print(f"note: the flow was trained with --holdout {trained.get('holdout', 0.0):g} of these images")
        name = f"{self.dataset}, held out {self.holdout:g}" if self.holdout else f"{self.dataset}, all"
        print(f"{name}: {len(part)} images, {part.levels} levels")
        print(f"bits/dim {bits.mean:.4f} +- {bits.standard_error:.4f} (standard error over images)")
        if not isinstance(whole.images, ImageFiles):
            print(f"a histogram a pixel: {histogram_bits(known, part):.4f}")
        return 0


@dataclass(frozen=True)
class Info:
    """Tells versions, CPU, GPU, and which kernels are available, or why not; of a flow, which path each block takes."""

    model: Positional[Annotated[str | None, arg(metavar="MODEL")]] = None
    """Also lists the blocks of this flow: digits, a folder, or the original's checkpoint file."""
    json: bool = False
    """As JSON."""
    device: str = "auto"
    """Where the flow would run: auto, cpu, cuda, ..."""
    in_channels: Annotated[int | None, arg(aliases=["--channel_size"])] = None
    """Of a checkpoint file's images: 3, or this."""
    img_size: tuple[int, int] | None = None
    """Height and width of a checkpoint file's images, where they are not square."""

    def run(self) -> int:
        from tarflow_fast import info
        from tarflow_fast.flows import open_flow
        from tarflow_fast.validate import find_device

        model = None
        if self.model is not None:
            device = find_device("info", self.device)
            model, _ = open_flow(self.model, device=device, in_channels=self.in_channels, img_size=self.img_size)
        if self.json:
            print(json.dumps(info.info() | ({"blocks": info.blocks(model)} if model else {}), indent=2))
        else:
            print(info.format_info() + (f"\n\n{info.format_blocks(model)}" if model else ""))
        return 0


@dataclass(frozen=True)
class Verify:
    """Runs every op and a small flow on this machine against the reference, and tells the worst errors."""

    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def run(self) -> int:
        from tarflow_fast import verify
        from tarflow_fast.validate import find_device

        rows, ok = verify.run(str(find_device("verify", self.device)))
        print(_table(rows))
        print("all within their limits" if ok else "NOT all within their limits")
        return 0 if ok else 1


def _table(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys as a markdown table."""
    names = list(rows[0])
    cells = [[f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *cells])


def _train(config: TrainConfig) -> int:
    from tarflow_fast.training.run import train

    train(config)
    return 0


def _save_numbers(x: torch.Tensor, path: Path) -> None:
    from tarflow_fast.files import save_tensors, write_atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_tensors(path, {"images": x})
        return
    import numpy as np

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, numpy would append .npy to it
            np.save(file, x.float().cpu().numpy() if x.dtype.itemsize == 2 else x.cpu().numpy())

    write_atomic(path, write)


def _parse(args: list[str]) -> object:
    defaults = TrainConfig()
    if args[:1] == ["train"]:
        path = _option(args, "--config")
        defaults = from_file(path) if path else defaults
    commands = (
        Annotated[Demo, subcommand("demo")]
        | Annotated[TrainConfig, subcommand("train", default=defaults)]
        | Annotated[Sample, subcommand("sample")]
        | Annotated[Evaluate, subcommand("evaluate")]
        | Annotated[Info, subcommand("info")]
        | Annotated[Verify, subcommand("verify")]
    )
    return tyro.cli(
        commands, prog="tarflow-fast", description="Exact normalizing flows (TarFlow), fast.", args=args,
        use_underscores=True, config=(tyro.conf.OmitSubcommandPrefixes,),
    )  # fmt: skip


def _option(args: list[str], name: str) -> str | None:
    """The value of `name value` or `name=value`: needed before the parser can know its defaults."""
    for i, text in enumerate(args):
        if text == name and i + 1 < len(args):
            return args[i + 1]
        if text.startswith(name + "="):
            return text.partition("=")[2]
    return None


def main(args: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. Errors a user can mend are one line on stderr."""
    args = sys.argv[1:] if args is None else args
    logger = logging.getLogger("tarflow_fast")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        if args == ["--version"]:
            from tarflow_fast import __version__

            print(f"tarflow_fast {__version__}")
            return 0
        command = _parse(args)
        return _train(command) if isinstance(command, TrainConfig) else command.run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError, MemoryError) as error:
        if os.environ.get("TARFLOW_FAST_TRACEBACK"):
            raise
        hint = " (TARFLOW_FAST_TRACEBACK=1 shows where)" if isinstance(error, (TypeError, RuntimeError)) else ""
        print(f"error: {error or type(error).__name__}{hint}", file=sys.stderr)
        return 2
