"""Training: real images in, a flow in a folder out. `tarflow-fast train`, or `train(TrainConfig(...))`.

The loss is 0.5 mean(z^2) - mean(log_det) over noisy images (arXiv 2412.06329: Gaussian noise for samples, uniform noise
for likelihood), AdamW, averaged weights; data order and noise are functions of (seed, step): see trainer.py.
"""

from __future__ import annotations

import json
import logging
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tarflow_fast.files import write_atomic
from tarflow_fast.training.config import TrainConfig
from tarflow_fast.training.parallel import workers
from tarflow_fast.training.trainer import CHECKPOINT, Trainer

log = logging.getLogger("tarflow_fast")


@dataclass(frozen=True)
class Run:
    """What a call of `train` did. model: the flow's folder.  steps of total are done now."""

    model: Path
    steps: int
    total: int


def train(config: TrainConfig) -> Run:
    """Trains as config says; `TarFlow.from_pretrained(run.model)` then reads the flow.

    Writes, in config.out: model/ (config.json, model.safetensors, train.json), checkpoint.safetensors, metrics.jsonl (a
    line every log_every steps), samples/. Ctrl-C and SIGTERM finish the step, save, and return.
    Raises ValueError for settings or data that cannot be, FloatingPointError for a loss that is not finite.
    """
    config = config.resolved()
    with ExitStack() as contexts:
        me = contexts.enter_context(workers(config.device))
        contexts.enter_context(torch.random.fork_rng(devices=[me.device] if me.device.type == "cuda" else []))
        torch.manual_seed(config.seed)
        trainer = Trainer(config, me)
        trainer.resume()
        if me.main and not config.dry_run:
            for leftover in config.out.glob(f".{CHECKPOINT}.*"):  # of a process killed while it wrote
                leftover.unlink()
        caught = contexts.enter_context(stop_signals())
        try:
            _loop(trainer, caught)
        finally:
            trainer.net = trainer.model  # lets go of DDP, and of the process group with it
        return Run(config.out / "model", trainer.steps_done, trainer.total)


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collects SIGTERM and Ctrl-C into a list instead of dying of them; a second Ctrl-C interrupts as usual.

    Outside the main thread, where Python allows no handlers, the list stays empty.
    """
    caught: list[str] = []

    def handle(number: int, _frame: object) -> None:
        if number == signal.SIGINT and caught:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _loop(trainer: Trainer, caught: list[str]) -> None:
    config, me = trainer.config, trainer.me
    first = trainer.steps_done
    last = min(trainer.total, config.stop_at or trainer.total, first + 1 if config.dry_run else trainer.total)
    if me.main:
        size = sum(p.numel() for p in trainer.model.parameters()) / 1e6
        images, classes = len(trainer.data), len(trainer.data.classes)
        log.info("%d images, %d classes; %.2f M parameters; %d x %s", images, classes, size, me.world, me.device)
    result: dict[str, float] = {}
    stopping = False
    with Report(trainer, first, last) as report:
        for step, images, labels in trainer.batches(first, last):
            line, stopping = trainer.step(step, images, labels, stop=bool(caught))
            stopping = stopping or (me.world == 1 and bool(caught))
            done = step + 1
            result = report.step(line, force=stopping or done == last)
            if stopping or done == last:
                break
            if config.checkpoint_every and done % config.checkpoint_every == 0:
                trainer.save(result)
            if config.sample_every and done % config.sample_every == 0 and not config.dry_run:
                trainer.samples(_picture(trainer))
    if last > first or not (config.out / "model" / "train.json").exists():
        trainer.save(result)
    early = trainer.steps_done < last
    if not early:
        trainer.samples(None if config.dry_run else _picture(trainer))
    if not me.main:
        return
    where = f"step {trainer.steps_done} of {trainer.total}"
    if config.dry_run:
        log.info("dry run: %s and a grid of samples went through; nothing was written", where)
    elif early:
        log.info("%s: stopped by %s and saved; the same command continues", where, (*caught, "another process")[0])
    else:
        log.info("%s: the flow is in %s", where, config.out / "model")


def _picture(trainer: Trainer) -> Path:
    return trainer.config.out / "samples" / f"step_{trainer.steps_done:07d}.png"


class Report:
    """Where the numbers of a run go: metrics.jsonl, and a progress bar (or log lines where there is no terminal).

    Only the main process reports. On resuming, lines after the checkpoint's step belong to work that was lost, and go.
    """

    def __init__(self, trainer: Trainer, first: int, last: int) -> None:
        config, self.main = trainer.config, trainer.me.main
        self.every, self.batch_size, self.total = config.log_every, config.batch_size, trainer.total
        self.losses: list[float] = []
        self.speeds: list[float] = []
        self.since = time.perf_counter()
        self.path = config.out / "metrics.jsonl" if self.main and not config.dry_run else None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = "".join(f"{text}\n" for text in _lines_until(self.path, first))
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

    def step(self, line: dict[str, float], force: bool) -> dict[str, float]:
        """Takes a step's numbers in. Returns what train.json keeps: mean loss since the last line, median images/s."""
        self.losses.append(line["loss"])
        mean_loss = statistics.fmean(self.losses)
        if force or line["step"] % self.every == 0:
            now = time.perf_counter()
            speed = len(self.losses) * self.batch_size / (now - self.since)
            self.speeds.append(speed)
            self.losses, self.since = [], now
            line = line | {"mean_loss": mean_loss, "images_per_second": speed}
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            if self.bar is not None:
                self.bar.set_postfix_str(f"loss {mean_loss:.4f}, {speed:.0f} images/s")
            elif self.main:
                log.info("step %d/%d  loss %.4f  %.0f images/s", line["step"], self.total, mean_loss, speed)
        if self.bar is not None:
            self.bar.update()
        result = {"loss": mean_loss}
        if self.speeds:
            result["images_per_second"] = round(statistics.median(self.speeds), 1)
        if "bits_per_dim" in line:
            result["bits_per_dim"] = line["bits_per_dim"]
        return result


def _lines_until(path: Path, step: int) -> list[str]:
    """The lines of a metrics file up to a step. A line cut short by a crash is dropped."""
    kept = []
    for text in path.read_text().splitlines() if step and path.exists() else []:
        try:
            if json.loads(text)["step"] <= step:
                kept.append(text)
        except (ValueError, KeyError, TypeError):
            continue
    return kept
