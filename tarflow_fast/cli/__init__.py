"""The command line tool: one class a command. Loads torch only inside a command.

Flags may be written with underscores or dashes. Exit codes: 0 done; 1 a check failed; 2 bad input; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg, subcommand

from tarflow_fast.cli.calibrate import Calibrate
from tarflow_fast.cli.evaluate import Evaluate
from tarflow_fast.cli.report import Report
from tarflow_fast.cli.sample import Sample
from tarflow_fast.cli.score import Score
from tarflow_fast.cli.verify import Verify
from tarflow_fast.training.config import TrainConfig, from_file


@dataclass(frozen=True)
class Demo:
    """Draws a picture with a shipped flow, checks its samples against plain PyTorch, and times both."""

    out: Path = Path("demo")
    """Folder for samples.png."""
    flow: str | None = None
    """fashion (28x28, the default), digits (8x8), another shipped flow, or a folder."""
    train: bool = False
    """Train the digits afresh first (about two minutes on two cores)."""
    seed: int = 0
    """Of the noise, and of the training."""
    guidance: float = 1.0
    """How strongly the class is insisted on."""
    repeats: int = 7
    """Timed turns of each implementation."""

    def run(self) -> int:
        from tarflow_fast.cli.demo import demo

        report, ok = demo(
            self.out, flow=self.flow, train=self.train, seed=self.seed, guidance=self.guidance, repeats=self.repeats
        )  # fmt: skip
        print(report)
        return 0 if ok else 1


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
        | Annotated[Score, subcommand("score")]
        | Annotated[Info, subcommand("info")]
        | Annotated[Verify, subcommand("verify")]
        | Annotated[Calibrate, subcommand("calibrate")]
        | Annotated[Report, subcommand("report")]
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
