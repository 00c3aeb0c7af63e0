"""Training: images in, a flow in a folder out. `tarflow-fast train`, `train(TrainConfig(...))`, or `fit(model, data)`.

The loss is 0.5 mean(z^2) - mean(log_det) over noisy images (arXiv 2412.06329: Gaussian noise for samples, uniform noise
for likelihood), plus the mean of log q of learned noise (noise.py); AdamW, averaged weights. Data order and noise are
functions of (seed, step): see trainer.py.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tarflow_fast import data, native
from tarflow_fast.data import ImageSet, VariationalDequantizer
from tarflow_fast.flows import open_dequantizer
from tarflow_fast.model import TarFlow
from tarflow_fast.training.config import DEFAULTS, GIVEN, TrainConfig
from tarflow_fast.training.fitting import check_dequantizer, fit_config, fit_images, started
from tarflow_fast.training.folder import clear, clear_strangers, grid_path, remove_leftovers
from tarflow_fast.training.parallel import Workers, workers
from tarflow_fast.training.report import Report, board_writer, draw_curve
from tarflow_fast.training.trainer import Trainer, load

log = logging.getLogger("tarflow_fast")


@dataclass(frozen=True)
class Run:
    """What a call of `train` or `fit` did.

    model: the flow's folder (None where nothing was written).  steps of total are done now.  result: the last numbers:
    loss, images_per_second, and bits_per_dim and heldout_bits_per_dim where they were measured.  dequantizer: trained
    with the flow, averaged as it is, where the noise was learned.
    """

    model: Path | None
    steps: int
    total: int
    result: dict[str, float]
    dequantizer: VariationalDequantizer | None = None


def train(config: TrainConfig, images: ImageSet | None = None) -> Run:
    """Trains as config says; `TarFlow.from_pretrained(run.model)` then reads the flow.

    images: the data, instead of those that config.dataset names.
    Writes, in config.out: model/ (config.json, model.safetensors, train.json), checkpoint.safetensors, metrics.jsonl (a
    line every log_every steps), samples/, curve.png, and where there are held-out images best/ (the flow that knows
    them best). Learned noise lies beside the flow in both. Ctrl-C and SIGTERM finish the step, save, and return.
    Raises ValueError for settings or data that cannot be, FloatingPointError for a loss that is not finite.
    """
    model, dequantizer = None, None
    if config.start is not None:
        model, config = started(config)
        dequantizer = open_dequantizer(config.start) if config.dequantize == "variational" else None
    if images is not None:
        config = replace(config, dataset=GIVEN)
    elif config.dataset not in DEFAULTS and data.has_own_size(config.dataset):
        config.resolved(unsized=True)  # settings that cannot be are told before the data is read
        images = data.load_dataset(config.dataset, config.img_size, config.in_channels)
    if images is not None:
        config = config.sized(images.shape)
    config = config.resolved()
    if model is not None:
        images = fit_images(model, load(config) if images is None else images)
    return _run(config, images, model, True, dequantizer)


def fit(
    model: TarFlow,
    images: object,
    *,
    held_out: object = None,
    out: str | Path | None = None,
    dequantizer: VariationalDequantizer | None = None,
    **settings: Any,
) -> Run:
    """Trains a flow on images, with the trainer of `tarflow-fast train`; afterwards it holds the averaged weights.

    model: a float32 TarFlow, trained where it is.
    images, held_out: see `tarflow_fast.data.as_images`: a tensor, a tuple (images, labels), any torch `Dataset`.
        Labels must be below model.num_classes; a flow without classes is told none.
    out: folder of the run, as `train` writes it, from which the same call continues; None: nothing is written.
    dequantizer: trained where it is, with dequantize="variational"; None: a fresh one, which the result holds.
    settings: fields of `TrainConfig` other than those that the model fixes: epochs, batch_size, lr, noise_std, ...
    Raises TypeError for an unknown setting or another kind of data, ValueError as `train`, and for images or labels
    that do not fit the model.
    """
    pictures = fit_images(model, images, held_out)
    config = fit_config(model, out, settings)
    if dequantizer is not None:
        check_dequantizer(dequantizer, model, config)
    return _run(config, pictures, model, out is not None, dequantizer)


def _run(
    config: TrainConfig,
    images: ImageSet | None,
    model: TarFlow | None,
    writes: bool,
    dequantizer: VariationalDequantizer | None,
) -> Run:
    with ExitStack() as contexts:
        me = contexts.enter_context(workers(config.device))
        contexts.enter_context(torch.random.fork_rng(devices=[me.device] if me.device.type == "cuda" else []))
        torch.manual_seed(config.seed)
        trainer = Trainer(config, me, images, model, writes, dequantizer)
        trainer.resume()
        if trainer.writes:
            if config.tensorboard:
                board_writer()  # where it is missing, this is told before anything is removed
            remove_leftovers(config.out)
            if not trainer.resumed:
                clear(config.out)
            elif trainer.from_elsewhere:
                clear_strangers(config.out, config, trainer.steps_done)
        caught = contexts.enter_context(stop_signals())
        try:
            result = _loop(trainer, caught)
        finally:
            trainer.net = trainer.noisy_flow  # lets go of DDP, and of the process group with it
        if model is not None:
            trainer.optimizer.zero_grad()
            model.load_state_dict(trainer.ema.model.state_dict())
        learned = trainer.averaged_dequantizer
        if dequantizer is not None and learned is not None:
            dequantizer.load_state_dict(learned.state_dict())
        return Run(config.out / "model" if writes else None, trainer.steps_done, trainer.total, result, learned)


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


def _loop(trainer: Trainer, caught: list[str]) -> dict[str, float]:
    config, me = trainer.config, trainer.me
    first = trainer.steps_done
    last = min(trainer.total, config.stop_at or trainer.total, first + 1 if config.dry_run else trainer.total)
    if me.main:
        log.info("%s", _plan(trainer, last - first))
        if config.precision == "bf16" and slow_bf16(me):
            log.warning(
                "train: bf16 is slow here: this CPU (%s) has no bf16 dot products, and autocast was measured 10 times "
                "slower than float32 on such CPUs; --precision fp32 is faster", native.isa() or "no native library",
            )  # fmt: skip
    result: dict[str, float] = {}
    stopping = False
    with Report(trainer, first, last) as report:
        for step, images, labels in trainer.batches(first, last):
            line, stopping = trainer.step(step, images, labels, stop=bool(caught))
            stopping = stopping or (me.world == 1 and bool(caught))
            done = step + 1
            over = stopping or done == last
            measured = trainer.measures and (done == last or done % config.eval_every == 0) and not stopping
            held_out = _timed(report, trainer.evaluate) if measured else None
            result = report.step(line, force=over or measured, held_out=held_out)
            if held_out is not None:
                trainer.keep_best(held_out, result)
            if over:
                break
            # Pictures come first: what comes before a checkpoint is done again by a run that was killed in between.
            if config.sample_every and done % config.sample_every == 0 and not config.dry_run:
                _timed(report, lambda: _pictures(trainer, report))
            if config.checkpoint_every and done % config.checkpoint_every == 0:
                _timed(report, lambda result=result: _save(trainer, report, result))
        result = result or report.latest()
        if last > first or trainer.behind:
            _save(trainer, report, result)
        early = trainer.steps_done < last
        if not early and config.dry_run:
            trainer.samples(None)
        elif not early and not _pictures(trainer, report):
            log.info("curve.png needs matplotlib: pip install 'tarflow-fast[report]'")
    if not me.main:
        return result
    where = f"step {trainer.steps_done} of {trainer.total}"
    if config.dry_run:
        log.info("dry run: %s and a grid of samples went through; nothing was written", where)
    elif early:
        log.info("%s: stopped by %s%s", where, (*caught, "another process")[0], _goes_on(trainer))
    elif trainer.writes:
        log.info("%s: the flow is in %s", where, config.out / "model")
    return result


def _plan(trainer: Trainer, steps: int) -> str:
    """What will run, in one line."""
    config, me, images = trainer.config, trainer.me, trainer.data
    channels, height, width = images.shape
    kept = f" ({len(trainer.held_out)} held out)" if len(trainer.held_out) else ""
    size = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    learned = sum(p.numel() for p in trainer.noisy_flow.dequantizer.parameters()) / 1e6
    noise = f" and {learned:.2f} M of the noise" if learned else ""
    return (
        f"{images.source}: {len(images)} images{kept}, {height} x {width} x {channels}, {len(images.classes)} classes; "
        f"{size:.2f} M parameters{noise}, {trainer.model.num_tokens} tokens; "
        f"{steps} steps of {config.batch_size} images, {config.precision}, on {me.world} x {me.device}"
    )


def _goes_on(trainer: Trainer) -> str:
    return " and saved; the same command continues" if trainer.writes else ""


def _timed(report: Report, work: Any) -> Any:
    """The result of work, which no speed counts as training."""
    start = time.perf_counter()
    result = work()
    report.pause(time.perf_counter() - start)
    return result


def _save(trainer: Trainer, report: Report, result: dict[str, Any]) -> None:
    """The checkpoint and the flow. The board is written first: a resumed run repeats no step before the checkpoint."""
    report.flush()
    trainer.save(result)


def _pictures(trainer: Trainer, report: Report) -> bool:
    """samples/ and curve.png, where the run writes. False where matplotlib is missing for the second."""
    config = trainer.config
    if not trainer.writes:
        return True
    path = grid_path(config.out, trainer.steps_done)
    trainer.samples(path, lambda picture: report.picture(picture, trainer.steps_done))
    return not config.curve or draw_curve(config.out)


def slow_bf16(me: Workers) -> bool:
    """Whether bf16 runs on a CPU without bf16 dot products."""
    return me.device.type == "cpu" and native.isa() != "avx512bf16"
