"""What a run tells while it goes: metrics.jsonl, a progress bar or log lines, the time it will take, curve.png."""

from __future__ import annotations

import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tarflow_fast.files import write_atomic
from tarflow_fast.training.folder import grid_path
from tarflow_fast.training.trainer import Trainer

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("tarflow_fast")
TIMED = 20  # steps before the time that is left is told; the first 5 of them warm up and are not counted
WARMUP = 5


class Report:
    """Where the numbers of a run go: metrics.jsonl, and a progress bar (or log lines where there is no terminal).

    Only the main process reports. On resuming, lines after the checkpoint's step belong to work that was lost, and go.
    """

    def __init__(self, trainer: Trainer, first: int, last: int) -> None:
        config, self.main = trainer.config, trainer.me.main
        self.every, self.batch_size, self.total = config.log_every, config.batch_size, trainer.total
        self.first, self.last = first, last
        self.losses = trainer.losses
        self.timed = 0  # steps of this process since the last line; the losses may be of the one before
        self.speeds: list[float] = []
        self.since = self.warm = time.perf_counter()
        # A run that is over has told all to the board before, except a picture that it was killed at.
        shows = config.tensorboard and trainer.writes and (last > first or not grid_path(config.out, first).is_file())
        self.board = open_board(config.out / "tensorboard", first) if shows else None
        self.path = config.out / "metrics.jsonl" if trainer.writes else None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = "".join(f"{text}\n" for text in lines_of(self.path, first))
            write_atomic(self.path, lambda temporary: temporary.write_text(kept))
        self.bar: Any = None
        if self.main and config.progress and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=last, initial=first, unit="it", desc="train", dynamic_ncols=True)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.main:
            log.info("%s", text)

    def pause(self, seconds: float) -> None:
        """Time that was no training, and is to count in no speed."""
        self.since += seconds
        self.warm += seconds

    def step(self, line: dict[str, float], force: bool, held_out: float | None = None) -> dict[str, float]:
        """Takes a step's numbers in. Returns what train.json keeps: mean loss since the last line, median images/s.

        held_out: bits per dimension of held-out images after this step, where they were measured.
        """
        self.losses.append(line["loss"])
        self.timed += 1
        mean_loss = statistics.fmean(self.losses)
        self._estimate(line["step"])
        if held_out is not None:
            line = line | {"heldout_bits_per_dim": held_out}
        if force or line["step"] % self.every == 0:
            now = time.perf_counter()
            speed = self.timed * self.batch_size / (now - self.since)
            self.speeds.append(speed)
            self.losses.clear()
            self.since, self.timed = now, 0
            line = line | {"mean_loss": mean_loss, "images_per_second": speed}
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            if self.board is not None:
                for name, value in line.items():
                    self.board.add_scalar(name, value, line["step"])
            bits = "" if held_out is None else f", held out {held_out:.4f} bits/dim"
            if self.bar is not None:
                self.bar.set_postfix_str(f"loss {mean_loss:.4f}, {speed:.0f} images/s{bits}")
            elif self.main:
                log.info("step %d/%d  loss %.4f  %.0f images/s%s", line["step"], self.total, mean_loss, speed, bits)
        if self.bar is not None:
            self.bar.update()
        return self._result(line | {"mean_loss": mean_loss})

    def latest(self) -> dict[str, float]:
        """What `step` gave for the last line of metrics.jsonl; {} where there is none."""
        lines = [] if self.path is None else lines_of(self.path)
        return self._result(json.loads(lines[-1])) if lines else {}

    def _result(self, line: dict[str, float]) -> dict[str, float]:
        result = {"loss": line["mean_loss"]}
        if self.speeds or "images_per_second" in line:
            speeds = self.speeds or [line["images_per_second"]]
            result["images_per_second"] = round(statistics.median(speeds), 1)
        for name in ("bits_per_dim", "heldout_bits_per_dim"):
            if name in line:
                result[name] = line[name]
        return result

    def picture(self, picture: Image, step: int) -> None:
        """Shows a grid of samples on the board, where there is one, before its file says that this was done."""
        if self.board is not None:
            import numpy as np

            self.board.add_image("samples", np.asarray(picture), step, dataformats="HWC")
            self.flush()

    def flush(self) -> None:
        """Writes what the board still holds in memory. Else a process that is killed would take it along."""
        if self.board is not None:
            self.board.flush()

    def _estimate(self, step: int) -> None:
        """After TIMED steps, once: how long the rest will take. Not for runs that are nearly over by then."""
        done = step - self.first
        if done == WARMUP:
            self.warm = time.perf_counter()
        if done == TIMED and self.last - step >= TIMED:
            each = (time.perf_counter() - self.warm) / (TIMED - WARMUP)
            left = (self.last - step) * each
            self.say(f"{duration(left)} to go: {self.last - step} steps, {each:.3g} s a step in the first {TIMED}")


def open_board(folder: Path, first: int) -> Any:
    """TensorBoard's writer. Steps after `first` belong to work that was lost, and TensorBoard does not show them.

    Raises ModuleNotFoundError where tensorboard is not installed.
    """
    return board_writer()(str(folder), purge_step=first + 1)


def board_writer() -> Any:
    """TensorBoard's class of writers. Raises ModuleNotFoundError where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "train: --tensorboard needs a package that is not installed: pip install 'tarflow-fast[tensorboard]'"
        ) from error
    return SummaryWriter


def duration(seconds: float) -> str:
    """About how long, in words: "about 40 s", "about 12 min", "about 3.2 h"."""
    if seconds < 100:
        return f"about {max(1, round(seconds))} s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"


def lines_of(path: Path, step: int | None = None) -> list[str]:
    """The lines of a metrics file, up to a step. A line cut short by a crash is dropped."""
    kept = []
    for text in path.read_text().splitlines() if step != 0 and path.exists() else []:
        try:
            if step is None or json.loads(text)["step"] <= step:
                kept.append(text)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def draw_curve(folder: Path) -> bool:
    """folder/curve.png: loss, and bits per dimension where they were measured, by step, of folder/metrics.jsonl.

    Returns False, and draws nothing, without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = [json.loads(text) for text in lines_of(folder / "metrics.jsonl")]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot(xlabel="step", ylabel="loss")
    marker = "." if len(lines) < 50 else ""  # a line of one point would not be seen
    steps, losses = [line["step"] for line in lines], [line["mean_loss"] for line in lines]
    left.plot(steps, losses, color="C0", marker=marker, label="loss")
    curves = {"bits_per_dim": ("training batches", "C2"), "heldout_bits_per_dim": ("held out", "C1")}
    curves = {name: style for name, style in curves.items() if any(name in line for line in lines)}
    if curves:
        right = left.twinx()
        right.set_ylabel("bits/dim")
        for name, (label, color) in curves.items():
            points = [(line["step"], line[name]) for line in lines if name in line]
            right.plot(*zip(*points, strict=True), color=color, marker="." if len(points) < 50 else "", label=label)
        figure.legend(handles=[*left.lines, *right.lines], loc="outside upper center", ncols=3)
    write_atomic(folder / "curve.png", lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    return True
