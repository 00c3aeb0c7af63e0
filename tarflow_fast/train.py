"""Training: real images in, a flow in a folder out. `tarflow-fast train`, or `train(TrainConfig(...))`.

The loss is 0.5 mean(z^2) - mean(log_det) over noisy images (arXiv 2412.06329, section 2.4: Gaussian noise for samples, uniform
noise for likelihood), AdamW, averaged weights. A step is a function of (state, seed, step): the noise and the dropped
labels of the whole global batch are drawn alike in every process and sliced, so the number of processes changes
rounding and nothing else, and a resumed run continues bit for bit.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tarflow_fast import data as D
from tarflow_fast.images import make_grid, save_image, side_by_side
from tarflow_fast.parallel import Workers, workers
from tarflow_fast.train_config import TrainConfig
from tarflow_fast.training_state import Ema, load_state, read_state, save_state

log = logging.getLogger("tarflow_fast")
CHECKPOINT = "checkpoint.safetensors"


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of step 0..total-1: up to `lr` in the first `warmup` share of the steps, then down to `lr_final`.

    cosine: rise lr * (step + 1) / n, n = warmup steps.  onecycle: rise from lr / 25 along half a cosine.
    Both: fall lr_final + (lr - lr_final) * (1 + cos(pi t)) / 2, t from 0 to 1 over the remaining steps.
    """
    rise = round(config.warmup * total)
    if step < rise:
        if config.schedule == "cosine":
            return config.lr * (step + 1) / rise
        low = config.lr / 25
        return low + (config.lr - low) * (1 - math.cos(math.pi * step / rise)) / 2
    t = (step - rise) / max(total - 1 - rise, 1)
    return config.lr_final + (config.lr - config.lr_final) * (1 + math.cos(math.pi * t)) / 2


def nll_per_dim(z: torch.Tensor, logdets: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats a dimension, mean over the batch: 0.5 mean(z^2 / var + log(2 pi var)) - mean(logdets).

    z: (B, T, D).  logdets: (B,), means over T * D.  var: (T, D), the prior's variance.  Returns a float32 scalar.
    """
    prior = 0.5 * (z.float().square() / var + (2 * math.pi * var).log()).mean()
    return prior - logdets.float().mean()


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


class Trainer:
    """One run: model, averaged model, optimizer and data of one process. `train` is the way in."""

    def __init__(self, config: TrainConfig, me: Workers) -> None:
        from tarflow_fast.model import TarFlow

        self.config, self.me = config, me
        share = me.world * config.accumulate
        if config.batch_size % share:
            raise ValueError(
                f"train: batch_size must be a multiple of processes * accumulate = {me.world} * {config.accumulate}, "
                f"got {config.batch_size}"
            )
        whole = D.load_dataset(config.dataset, config.img_size, config.in_channels)
        self.data, _ = whole.split(config.holdout)
        if len(self.data) == 0:
            raise ValueError(f"train: holdout {config.holdout} leaves none of {len(whole)} images to train on")
        self.total = math.ceil(config.epochs * len(self.data) / config.batch_size)
        arguments = dict(
            in_channels=config.in_channels, img_size=config.img_size, patch_size=config.patch_size,
            channels=config.channels, num_blocks=config.num_blocks, layers_per_block=config.layers_per_block,
            nvp=config.nvp, num_classes=len(self.data.classes),
        )  # fmt: skip
        self.model = TarFlow(**arguments).to(me.device)
        averaged = TarFlow(**arguments).to(me.device)
        averaged.load_state_dict(self.model.state_dict())
        self.ema = Ema(averaged, config.ema)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.net: nn.Module = self.model
        if me.world > 1:
            # no buffers to broadcast: the prior is averaged below, and masks are not held
            self.net = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
        self.steps_done = 0

    def read(self, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This process's share of a step's global batch: ((b, C, H, W) uint8, (b,) int64 or None), on the CPU."""
        local = self.config.batch_size // self.me.world
        start = step * self.config.batch_size + self.me.rank * local
        return self.data.fetch(D.sample_order(start, local, len(self.data), self.config.seed))

    def batches(self, first: int, last: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """(step, images, labels) of steps first .. last - 1. Files are decoded one batch ahead of the computation."""
        if isinstance(self.data.images, torch.Tensor):
            yield from ((step, *self.read(step)) for step in range(first, last))
            return
        with ThreadPoolExecutor(1) as pool:
            upcoming = pool.submit(self.read, first)
            for step in range(first, last):
                current = upcoming.result()
                if step + 1 < last:
                    upcoming = pool.submit(self.read, step + 1)
                yield step, *current

    def noisy(
        self, step: int, images: torch.Tensor, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The model's input: float images with noise, labels with some dropped to -1.

        Everything is drawn for the global batch and sliced by rank: sample number g of the run gets the same noise
        whichever process takes it.
        """
        config, device = self.config, self.me.device
        mine = slice(self.me.rank * len(images), (self.me.rank + 1) * len(images))
        shape = (config.batch_size, *images.shape[1:])
        images = images.to(device, non_blocking=True)
        draw = D.generator(config.seed, "noise", step, device)
        dropped = torch.rand(config.batch_size, generator=draw, device=device)[mine] < config.drop_label
        mirrored = torch.rand(config.batch_size, generator=draw, device=device)[mine] < 0.5
        if config.flip:
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if config.noise_type == "gaussian":
            noise = torch.randn(shape, generator=draw, device=device)[mine]
            x = D.to_unit(images, self.data.levels) + config.noise_std * noise
        else:
            x = D.dequantize(images, torch.rand(shape, generator=draw, device=device)[mine], self.data.levels)
        if labels is not None:
            labels = torch.where(dropped, -1, labels.to(device, non_blocking=True))
        return x, labels

    def step(self, step: int, images: torch.Tensor, labels: torch.Tensor | None, stop: bool = False) -> dict[str, Any]:
        """One optimizer step. Returns the log line's numbers over the global batch, and whether any process wants to stop.

        Raises FloatingPointError, before any weight is touched, when the loss or the gradient is not finite.
        """
        config, me = self.config, self.me
        x, y = self.noisy(step, images, labels)
        rate = learning_rate(step, self.total, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        totals = torch.zeros(3, device=me.device)  # loss, nll, wish to stop: one all_reduce a step
        zs = []
        xs = x.chunk(config.accumulate)
        ys = [None] * config.accumulate if y is None else y.chunk(config.accumulate)
        for i, (part, label) in enumerate(zip(xs, ys, strict=True)):
            with ExitStack() as contexts:
                if me.world > 1 and i + 1 < config.accumulate:
                    contexts.enter_context(self.net.no_sync())
                bf16 = torch.autocast(me.device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()
                with bf16:
                    z, _, logdets = self.net(part, label)
                    loss = self.model.get_loss(z, logdets) / config.accumulate
                loss.backward()
            z, logdets = z.detach(), logdets.detach()
            zs.append(z)
            totals[0] += loss.detach()
            totals[1] += nll_per_dim(z, logdets, self.model.var) / config.accumulate
        totals[2] = float(stop)
        loss, nll, stopping = me.mean_(totals).tolist()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or math.inf).item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(
                f"train: not finite at step {step + 1} of {self.total}: loss {loss}, gradient norm {grad_norm}, learning "
                f"rate {rate:.3g}; the last checkpoint is untouched. A lower lr, a longer warmup or a smaller clip may help"
            )
        self.optimizer.step()
        if not config.nvp:
            self.model.update_prior(torch.cat(zs).float())
            me.mean_(self.model.var)  # update_prior is linear in the batch mean: the mean of the results is the global one
        self.ema.update(self.model, step)
        self.steps_done = step + 1
        line = {"step": step + 1, "epoch": (step + 1) * config.batch_size / len(self.data), "loss": loss, "lr": rate}
        line["grad_norm"] = grad_norm
        if config.noise_type == "uniform":
            line["bits_per_dim"] = nll / math.log(2) + math.log2(self.data.levels / 2)
        return line | {"stop": stopping > 0}

    def resume(self) -> None:
        """Continues from the checkpoint that config.resume names, if any. Raises ValueError when it is of another run."""
        config = self.config
        if config.resume == "none":
            return
        path = config.out / CHECKPOINT if config.resume == "auto" else Path(config.resume)
        if config.resume == "auto" and not path.exists():
            return
        tensors, step, theirs = read_state(path)
        differing = config.difference(theirs)
        if differing:
            name = differing[0]
            raise ValueError(
                f"train: {path} was trained with {name} = {theirs.get(name)}, and this run has {config.to_json()[name]}; "
                "--resume none starts afresh, another --out keeps both"
            )
        load_state(tensors, path, self.model, self.ema, self.optimizer)
        self.steps_done = step
        if self.me.main:
            log.info("continuing at step %d of %d from %s", step, self.total, path)

    def save(self, result: dict[str, Any]) -> None:
        """Writes the checkpoint, then the averaged model with train.json beside it. Only the main process does."""
        if not self.me.main or self.config.dry_run:
            return
        from tarflow_fast.checkpoint import write_atomic

        out = self.config.out
        out.mkdir(parents=True, exist_ok=True)
        save_state(out / CHECKPOINT, self.model, self.ema, self.optimizer, self.steps_done, self.config.to_json())
        from tarflow_fast.model import TarFlow

        kept = self.ema.model
        if self.config.save_dtype != "float32":
            kept = TarFlow(**kept.config)
            kept.load_state_dict(self.ema.model.state_dict())
            kept.to(getattr(torch, self.config.save_dtype))
        kept.save_pretrained(out / "model")
        record = {
            "command": self.command(),
            "config": self.config.to_json(),
            "data": {"source": self.data.source, "images": len(self.data), "levels": self.data.levels,
                     "classes": list(self.data.classes)},
            "result": {"steps": self.steps_done, "of": self.total, **result},
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        }  # fmt: skip
        text = json.dumps(record, indent=2) + "\n"
        write_atomic(out / "model" / "train.json", lambda temporary: Path(temporary).write_text(text))

    def command(self) -> str:
        """The command line that repeats this run: only what differs from the defaults."""
        given, default = self.config.to_json(), TrainConfig(dataset=self.config.dataset).resolved().to_json()
        parts = ["tarflow-fast train", f"--dataset {self.config.dataset}"]
        for name, value in given.items():
            if value == default[name] or name == "dataset":
                continue
            if isinstance(value, bool):
                parts.append(f"--{name}" if value else f"--no_{name}")
            else:
                parts.append(f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
        return " ".join(parts)

    def samples(self, path: Path | None) -> None:
        """Draws samples of the averaged model (a row a class; raw and denoised side by side) and writes them as PNG."""
        if not self.me.main:
            return
        model, config = self.ema.model, self.config
        classes = min(len(self.data.classes), 10)
        y = torch.arange(classes, device=self.me.device).repeat_interleave(8) if classes else None
        count = 8 * classes or 64
        guidance = config.sample_guidance if classes else 0.0
        x = model.sample(count, y, guidance=guidance, seed=config.seed, nonfinite="ignore")
        panels = [("samples", x)]
        if config.noise_type == "gaussian" and config.noise_std > 0:
            panels.append(("denoised", model.denoise(x, y, noise_std=config.noise_std)))
        if path is not None:
            scale = max(1, 40 // x.shape[-1])
            save_image(side_by_side([(name, make_grid(part, 8, scale=scale)) for name, part in panels]), path)


def train(config: TrainConfig) -> Path:
    """Trains as config says and returns the folder of the flow (`TarFlow.from_pretrained` reads it).

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
        caught = contexts.enter_context(stop_signals())
        trainer.resume()
        _loop(trainer, caught)
    return config.out / "model"


def _loop(trainer: Trainer, caught: list[str]) -> None:
    config, me = trainer.config, trainer.me
    first = trainer.steps_done
    last = min(trainer.total, config.stop_at or trainer.total, first + 1 if config.dry_run else trainer.total)
    if me.main:
        parameters = sum(p.numel() for p in trainer.model.parameters())
        log.info(
            "%d images, %d classes; %.2f M parameters; steps %d to %d of %d on %d x %s",
            len(trainer.data), len(trainer.data.classes), parameters / 1e6, first, last, trainer.total, me.world, me.device,
        )  # fmt: skip
    writing = me.main and not config.dry_run
    metrics = Metrics(config.out / "metrics.jsonl", first) if writing else None
    shown = me.main and (sys.stderr.isatty() if config.progress is None else config.progress)
    bar = _progress_bar(first, last) if shown else None
    since, losses, rates = time.perf_counter(), [], []
    for step, images, labels in trainer.batches(first, last):
        line = trainer.step(step, images, labels, stop=bool(caught))
        stopping = line.pop("stop")
        losses.append(line["loss"])
        done = step + 1
        if done % config.log_every == 0 or done == last or stopping:
            now = time.perf_counter()
            line["images_per_second"] = rates_now = len(losses) * config.batch_size / (now - since)
            rates.append(rates_now)
            line["mean_loss"] = sum(losses) / len(losses)
            final, since, losses = line, now, []
            if metrics:
                metrics.write(line)
            if me.main and not bar:
                log.info("step %d/%d  loss %.4f  %.0f images/s", done, trainer.total, line["mean_loss"], rates_now)
            if bar:
                bar.set_postfix_str(f"loss {line['mean_loss']:.4f}, {rates_now:.0f} images/s")
        if bar:
            bar.update()
        if stopping or done == last:
            break
        if config.checkpoint_every and done % config.checkpoint_every == 0:
            trainer.save({"loss": line["loss"]})
        if config.sample_every and done % config.sample_every == 0 and not config.dry_run:
            trainer.samples(config.out / "samples" / f"step_{done:07d}.png")
    if bar:
        bar.close()
    result = {}
    if last > first:
        result = {"loss": final["mean_loss"], "images_per_second": sorted(rates)[len(rates) // 2]}
        if "bits_per_dim" in final:
            result["bits_per_dim"] = final["bits_per_dim"]
    if last > first or not (config.out / "model").exists():
        trainer.save(result)
    stopped_early = trainer.steps_done < last
    if config.dry_run or not stopped_early:
        path = config.out / "samples" / f"step_{trainer.steps_done:07d}.png"
        trainer.samples(None if config.dry_run else path)
    if me.main:
        if stopped_early:
            log.info("stopped by %s after step %d of %d; the same command continues",
                     caught[0] if caught else "another process", trainer.steps_done, trainer.total)  # fmt: skip
        elif config.dry_run:
            log.info("dry run: one step and one grid of samples went through; nothing was written")
        else:
            log.info("step %d of %d: the flow is in %s", trainer.steps_done, trainer.total, config.out / "model")


class Metrics:
    """metrics.jsonl: one JSON object a line, flushed at once. Lines after `step` are of a lost continuation, and go."""

    def __init__(self, path: Path, step: int) -> None:
        from tarflow_fast.checkpoint import write_atomic

        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if step and path.exists():
            for text in path.read_text().splitlines():
                try:
                    if json.loads(text)["step"] <= step:
                        kept.append(text)
                except (ValueError, KeyError, TypeError):  # a line cut short by a crash
                    continue
        write_atomic(path, lambda temporary: Path(temporary).write_text("".join(f"{text}\n" for text in kept)))

    def write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _progress_bar(first: int, last: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=last, initial=first, unit="it", desc="train", dynamic_ncols=True)
