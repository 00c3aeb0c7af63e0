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
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional, arg, subcommand

from tarflow_fast.cli.sample import Sample
from tarflow_fast.cli.verify import Verify
from tarflow_fast.training.config import TrainConfig, from_file

if TYPE_CHECKING:
    from tarflow_fast.flow import TokenFlow


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
class Evaluate:
    """Measures a flow on data: bits per dimension of images (uniform dequantisation), log-likelihood of tokens."""

    model: str = "digits"
    """digits (the shipped flow), a folder, or a checkpoint file."""
    dataset: str = "digits"
    """As for train; of tokens a .npy file, or a .npz file with x (N, T, D) and, if any, labels y."""
    data_root: Path | None = None
    """As for train."""
    strict: bool = False
    """As for train."""
    holdout: float = 0.0
    """Measures on this share only, the one that `train --holdout` keeps away; 0: on the set's own test part, or all."""
    unconditional: bool = False
    """Does not tell the flow the labels."""
    n_draws: int = 1
    """Dequantisation draws an image."""
    batch_size: int = 64
    """Rows together."""
    seed: int = 0
    """Of the draws."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    in_channels: Annotated[int | None, arg(aliases=["--channel_size"])] = None
    """Of a checkpoint file's images: 3, or this."""
    img_size: tuple[int, int] | None = None
    """Height and width of a checkpoint file's images, where they are not square."""
    head_size: int | None = None
    """Of a checkpoint file over tokens, which its shapes do not tell: 64, or this."""
    key: str | None = None
    """The part of a checkpoint file that is the flow, where it holds several ("state_dict", "ema")."""

    def run(self) -> int:
        from tarflow_fast.data import ImageFiles, load_dataset
        from tarflow_fast.evaluate import evaluate, histogram_bits
        from tarflow_fast.flows import open_flow
        from tarflow_fast.model import TarFlow
        from tarflow_fast.validate import check_positive_int, find_device

        check_positive_int("evaluate", "batch_size", self.batch_size)
        device = find_device("evaluate", self.device)
        model, record = open_flow(
            self.model, device=device, in_channels=self.in_channels, img_size=self.img_size,
            head_size=self.head_size, key=self.key,
        )  # fmt: skip
        if not isinstance(model, TarFlow):
            return self._run_tokens(model)
        whole = load_dataset(
            self.dataset, model.config["img_size"], model.config["in_channels"], data_root=self.data_root,
            strict=self.strict,
        )  # fmt: skip
        own = not self.holdout and whole.held_out is not None
        known, part = whole.split(self.holdout) if self.holdout or own else (whole, whole)
        bits = evaluate(
            model, part, conditional=not self.unconditional, n_draws=self.n_draws, seed=self.seed,
            batch_size=self.batch_size, progress=sys.stderr.isatty(),
        )  # fmt: skip
        trained = record.get("config", {})
        if trained.get("dataset") == self.dataset and trained.get("holdout", 0.0) != self.holdout:
            print(f"note: the flow was trained with --holdout {trained.get('holdout', 0.0):g} of these images")
        which = f"held out {self.holdout:g}" if self.holdout else "held out" if own else "all"
        print(f"{self.dataset}, {which}: {len(part)} images, {part.levels} levels")
        print(f"bits/dim {bits.mean:.4f} +- {bits.standard_error:.4f} (standard error over images)")
        if not isinstance(whole.images, ImageFiles):
            print(f"a histogram a pixel: {histogram_bits(known, part):.4f}")
        return 0

    def _run_tokens(self, model: TokenFlow) -> int:
        from tarflow_fast.evaluate import evaluate_tokens, load_tokens

        for name, default in (("holdout", 0.0), ("n_draws", 1)):
            if getattr(self, name) != default:
                raise ValueError(f"evaluate: {name} is for images, and {self.model} is a flow over tokens")
        x, y = load_tokens(self.dataset, (model.num_tokens, model.token_size))
        y = None if self.unconditional or not model.num_classes else y
        found = evaluate_tokens(model, x, y, batch_size=self.batch_size, progress=sys.stderr.isatty())
        print(f"{self.dataset}: {len(x)} rows of {model.num_tokens} tokens of size {model.token_size}")
        print(f"log-likelihood {found.mean:.4f} +- {found.standard_error:.4f} nats (standard error over rows)")
        print(f"nats/dim {found.per_dim:.4f}")
        if len(found.bad):
            print(f"note: log p is not finite in {len(found.bad)} rows, the first is row {found.bad[0]}")
        return 0


@dataclass(frozen=True)
class Info:
    """Tells versions, CPU, GPU, and which kernels are available, or why not; of a flow, which path each block takes."""

    model: Positional[Annotated[str | None, arg(metavar="MODEL")]] = None
    """Also lists the blocks of this flow: digits, a folder, or a checkpoint file."""
    json: bool = False
    """As JSON."""
    device: str = "auto"
    """Where the flow would run: auto, cpu, cuda, ..."""
    in_channels: Annotated[int | None, arg(aliases=["--channel_size"])] = None
    """Of a checkpoint file's images: 3, or this."""
    img_size: tuple[int, int] | None = None
    """Height and width of a checkpoint file's images, where they are not square."""
    head_size: int | None = None
    """Of a checkpoint file over tokens, which its shapes do not tell: 64, or this."""
    key: str | None = None
    """The part of a checkpoint file that is the flow, where it holds several ("state_dict", "ema")."""

    def run(self) -> int:
        from tarflow_fast import info
        from tarflow_fast.flows import open_flow
        from tarflow_fast.validate import find_device

        model = None
        if self.model is not None:
            device = find_device("info", self.device)
            model, _ = open_flow(
                self.model, device=device, in_channels=self.in_channels, img_size=self.img_size,
                head_size=self.head_size, key=self.key,
            )  # fmt: skip
        if self.json:
            print(json.dumps(info.info() | ({"blocks": info.blocks(model)} if model else {}), indent=2))
        else:
            print(info.format_info() + (f"\n\n{info.format_blocks(model)}" if model else ""))
        return 0


def _train(config: TrainConfig) -> int:
    from tarflow_fast.training.run import train

    train(config)
    return 0


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
