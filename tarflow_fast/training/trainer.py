"""The state of one training run in one process, and one step of it.

A step is a function of (state, seed, step): the noise and the dropped labels of the whole global batch are drawn alike
in every process and sliced, so the number of processes changes rounding and nothing else, and a resumed run continues
bit for bit.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tarflow_fast import data
from tarflow_fast.checkpoint import DEQUANTIZER
from tarflow_fast.data import ImageSet, VariationalDequantizer
from tarflow_fast.data.images import make_grid, save_image, side_by_side
from tarflow_fast.evaluate import evaluate
from tarflow_fast.files import write_atomic
from tarflow_fast.model import TarFlow
from tarflow_fast.training.config import TrainConfig
from tarflow_fast.training.folder import CHECKPOINT, holds_flow
from tarflow_fast.training.noise import NoisyFlow
from tarflow_fast.training.parallel import Workers
from tarflow_fast.training.state import Ema, load_state, read_state, save_state

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("tarflow_fast")


def nll_per_dim(z: torch.Tensor, logdets: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats a dimension, batch mean: 0.5 mean(z^2 / var + log(2 pi var)) - mean(logdets).

    z: (B, T, D).  logdets: (B,), means over T * D.  var: (T, D), the prior's variance.  Returns a float32 scalar.
    """
    prior = 0.5 * (z.float().square() / var + (2 * math.pi * var).log()).mean()
    return prior - logdets.float().mean()


def load(config: TrainConfig) -> ImageSet:
    """The images that resolved settings name."""
    return data.load_dataset(
        config.dataset, config.img_size, config.in_channels, data_root=config.data_root, strict=config.strict
    )


class Trainer:
    """Model, averaged model, optimizer and data of one process. config must be resolved.

    images: the data, instead of those that config names.  model: trained instead of a fresh one.  writes: whether the
    run's folder is written; a dry run and processes other than the main one never do.  dequantizer: trained instead of
    a fresh one, where config asks for one that learns.
    """

    def __init__(
        self,
        config: TrainConfig,
        me: Workers,
        images: ImageSet | None = None,
        model: TarFlow | None = None,
        writes: bool = True,
        dequantizer: VariationalDequantizer | None = None,
    ) -> None:
        self.config, self.me = config, me
        self.writes = writes and me.main and not config.dry_run
        share = me.world * config.accumulate
        if config.batch_size % share:
            raise ValueError(
                f"train: batch_size must be a multiple of processes * accumulate = {me.world} * {config.accumulate}, "
                f"got {config.batch_size}"
            )
        images = load(config) if images is None else images
        if not config.classes:
            images = images.unlabelled()
        self.data, self.held_out = images.split(config.holdout)
        if len(self.data) == 0:
            raise ValueError(f"train: holdout {config.holdout} leaves none of {len(images)} images to train on")
        self.total = math.ceil(config.epochs * len(self.data) / config.batch_size)
        arguments = model.config if model is not None else dict(
            in_channels=config.in_channels, img_size=config.img_size, patch_size=config.patch_size,
            channels=config.channels, num_blocks=config.num_blocks, layers_per_block=config.layers_per_block,
            nvp=config.nvp, num_classes=len(self.data.classes), transform=config.transform,
        )  # fmt: skip
        self.model = (TarFlow(**arguments) if model is None else model).to(me.device)
        averaged = TarFlow(**arguments).to(me.device)
        averaged.load_state_dict(self.model.state_dict())
        self.ema = Ema(averaged, config.ema)
        self.noisy_flow = NoisyFlow(self.model, config, self.data.levels, dequantizer)
        learned = self.noisy_flow.learned
        self.noise_ema = None if learned is None else Ema(copy.deepcopy(learned), config.ema)
        self.optimizer = torch.optim.AdamW(
            self.noisy_flow.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        for block in self.model.blocks:
            block.recompute = config.recompute
        self.net: nn.Module = self.noisy_flow
        if me.world > 1:
            self.net = nn.parallel.DistributedDataParallel(self.noisy_flow)
        self.steps_done = 0
        self.best: float | None = None
        self.resumed = False
        self.from_elsewhere = False  # resumed from a checkpoint that is not the one in config.out
        self.losses: list[float] = []  # of the steps since the last line of metrics.jsonl

    def read(self, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This process's share of a step's global batch: ((b, C, H, W) uint8, (b,) int64 or None), on the CPU."""
        local = self.config.batch_size // self.me.world
        start = step * self.config.batch_size + self.me.rank * local
        return self.data.fetch(data.sample_order(start, local, len(self.data), self.config.seed))

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
        """The model's input: float images with noise, labels with some dropped to -1."""
        images, noise, labels = self.drawn(step, images, labels)
        return self.noisy_flow.add(images, noise)[0], labels

    def drawn(
        self, step: int, images: torch.Tensor, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Images, some mirrored, the numbers that their noise is made of, and labels with some dropped to -1.

        Everything is drawn for the global batch and sliced by rank: sample number g of the run gets the same noise
        whichever process takes it.
        """
        config, device = self.config, self.me.device
        mine = slice(self.me.rank * len(images), (self.me.rank + 1) * len(images))
        shape = (config.batch_size, *images.shape[1:])
        images = images.to(device, non_blocking=True)
        draw = data.generator(config.seed, "noise", step, device)
        dropped = torch.rand(config.batch_size, generator=draw, device=device)[mine] < config.drop_label
        mirrored = torch.rand(config.batch_size, generator=draw, device=device)[mine] < 0.5
        if config.flip:
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        noise = self.noisy_flow.draw(shape, draw, device)[mine]
        if labels is not None:
            labels = torch.where(dropped, -1, labels.to(device, non_blocking=True))
        return images, noise, labels

    def step(
        self, step: int, images: torch.Tensor, labels: torch.Tensor | None, stop: bool = False
    ) -> tuple[dict[str, float], bool]:
        """One optimizer step. Returns (the log line's numbers over the global batch, does any process want to stop).

        Raises FloatingPointError, before any weight is touched, when the loss or the gradient is not finite.
        """
        config = self.config
        images, noise, y = self.drawn(step, images, labels)
        rate = config.learning_rate(step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        z, loss, nll = self._gradient(images, noise, y)
        totals = torch.stack([loss, nll, torch.tensor(float(stop), device=loss.device)])
        mean_loss, mean_nll, stopping = self.me.mean_(totals).tolist()
        grad_norm = nn.utils.clip_grad_norm_(self.noisy_flow.parameters(), config.clip or math.inf).item()
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(
                f"train: not finite at step {step + 1} of {self.total}: loss {mean_loss}, gradient norm {grad_norm}, "
                f"learning rate {rate:.3g}; the last checkpoint is untouched. A lower lr or a longer warmup may help"
            )
        self.optimizer.step()
        if not config.nvp:
            self.model.update_prior(z)
            self.me.mean_(self.model.var)  # update_prior is linear in the batch mean: this gives the global batch's
        self.ema.update(self.model, step)
        if self.noise_ema is not None:
            self.noise_ema.update(self.noisy_flow.learned, step)
        self.steps_done = step + 1
        line = {"step": step + 1, "epoch": (step + 1) * config.batch_size / len(self.data), "loss": mean_loss}
        line |= {"lr": rate, "grad_norm": grad_norm}
        if config.noise_type == "uniform":
            line["bits_per_dim"] = mean_nll / math.log(2) + math.log2(self.data.levels / 2)
        return line, stopping > 0

    def _gradient(
        self, images: torch.Tensor, noise: torch.Tensor, y: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Leaves the global batch's gradient in the parameters. Returns this process's z, loss and nll, detached."""
        parts = self.config.accumulate
        zs, losses, nlls = [], [], []
        self.optimizer.zero_grad(set_to_none=True)
        ys = [None] * parts if y is None else y.chunk(parts)
        for i, (part, drawn, label) in enumerate(zip(images.chunk(parts), noise.chunk(parts), ys, strict=True)):
            waiting = self.me.world > 1 and i + 1 < parts
            bf16 = self.config.precision == "bf16"
            with self.net.no_sync() if waiting else nullcontext():
                with torch.autocast(images.device.type, torch.bfloat16) if bf16 else nullcontext():
                    z, logdets, log_q = self.net(part, drawn, label)
                    loss = self.model.get_loss(z.float(), logdets) + log_q.mean()
                (loss / parts).backward()
            z = z.detach().float()
            zs.append(z)
            losses.append(loss.detach())
            nlls.append(nll_per_dim(z, logdets.detach(), self.model.var) + log_q.detach().mean())
        return torch.cat(zs), torch.stack(losses).mean(), torch.stack(nlls).mean()

    def resume(self) -> None:
        """Continues from the checkpoint that config.resume names, if any.

        Raises ValueError when it is another run's, or when there is a flow in config.out and none to continue from.
        """
        config = self.config
        own = config.out / CHECKPOINT
        path = own if config.resume == "auto" else Path(config.resume)
        if config.resume == "none":
            return
        if config.resume == "auto" and not path.exists():
            if holds_flow(config.out):
                raise ValueError(
                    f"train: resume must find {own} beside the flow in {config.out / 'model'}, got no such file; "
                    "--resume none starts afresh and removes the flow, another --out keeps it"
                )
            return
        tensors, step, theirs = read_state(path)
        differing = config.difference(theirs)
        if differing:
            name = differing[0]
            raise ValueError(
                f"train: {path} was trained with {name} {theirs.get(name)}, this run has {config.to_json().get(name)}; "
                "--resume none starts afresh, another --out keeps both"
            )
        self.losses = load_state(tensors, path, self.model, self.ema, self.optimizer, self._beside())
        self.steps_done, self.resumed, self.from_elsewhere = step, True, path.resolve() != own.resolve()
        if self.me.main and step < self.total:
            log.info("continuing at step %d of %d from %s", step, self.total, path)
        elif self.me.main:
            log.info("nothing is left to train: %s has %d steps, this run %d", path, step, self.total)

    def _beside(self) -> dict[str, nn.Module]:
        """What the checkpoint holds beside the flow: the dequantiser that learns, and its average."""
        if self.noise_ema is None:
            return {}
        return {"dequantizer": self.noisy_flow.learned, "dequantizer_ema": self.noise_ema.model}

    @property
    def averaged_dequantizer(self) -> VariationalDequantizer | None:
        """The average of the dequantiser that learns, which is saved and measured with; None where none does."""
        return None if self.noise_ema is None else self.noise_ema.model

    def save(self, result: dict[str, Any]) -> None:
        """Writes the checkpoint, then the averaged model with train.json beside it. Only the main process does."""
        if not self.writes:
            return
        out = self.config.out
        out.mkdir(parents=True, exist_ok=True)
        save_state(
            out / CHECKPOINT, self.model, self.ema, self.optimizer, self.steps_done, self.config.to_json(), self.losses,
            self._beside(),
        )  # fmt: skip
        self._save_flow(out / "model", result)

    def _save_flow(self, folder: Path, result: dict[str, Any]) -> None:
        """Writes the averaged model, the averaged dequantiser (float32 always), and train.json beside them."""
        kept = self.ema.model
        if self.config.save_dtype != "float32":
            kept = TarFlow(**kept.config)
            kept.load_state_dict(self.ema.model.state_dict())
            kept.to(getattr(torch, self.config.save_dtype))
        kept.save_pretrained(folder)
        if self.averaged_dequantizer is None:
            (folder / DEQUANTIZER).unlink(missing_ok=True)  # an earlier run's would be taken for this flow's
        else:
            self.averaged_dequantizer.save(folder)
        record = {
            "command": self.config.command(),
            "config": self.config.to_json(),
            "data": {
                "source": self.data.source,
                "images": len(self.data),
                "levels": self.data.levels,
                "classes": list(self.data.classes),
            },
            "result": {"steps": self.steps_done, "of": self.total, **result},
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        }
        text = json.dumps(record, indent=2) + "\n"
        write_atomic(folder / "train.json", lambda temporary: temporary.write_text(text))

    @property
    def behind(self) -> bool:
        """Whether model/ is missing or of an earlier step: the process was killed after it wrote the checkpoint."""
        record = self.config.out / "model" / "train.json"
        return not record.is_file() or json.loads(record.read_text())["result"]["steps"] != self.steps_done

    @property
    def measures(self) -> bool:
        """Whether this run measures bits per dimension on held-out images."""
        return bool(self.config.eval_every) and len(self.held_out) > 0 and not self.config.dry_run

    def evaluate(self) -> float:
        """Bits per dimension of the averaged model on held-out images, at most eval_images of them, always the same.

        The main process measures, and the others wait for it in the next step.
        """
        if not self.me.main:
            return math.nan
        most = self.config.eval_images or len(self.held_out)
        chosen = torch.randperm(len(self.held_out), generator=data.generator(0, "eval"))[:most]
        part = self.held_out.subset(chosen.sort().values)
        size = min(self.config.batch_size, 256)
        return evaluate(self.ema.model, part, batch_size=size, dequantizer=self.averaged_dequantizer).mean

    def keep_best(self, held_out: float, result: dict[str, Any]) -> None:
        """Saves the averaged model in best/ if no earlier step of this run knew the held-out images better."""
        if not self.writes:
            return
        record = self.config.out / "best" / "train.json"
        if self.best is None:
            resumed = self.steps_done > 1 and self.resumed and record.is_file()
            self.best = json.loads(record.read_text())["result"]["heldout_bits_per_dim"] if resumed else math.inf
        if held_out < self.best:
            self.best = held_out
            self._save_flow(record.parent, result)

    def samples(self, path: Path | None, show: Callable[[Image], None] | None = None) -> None:
        """Draws samples of the averaged model, a row a class, raw and denoised side by side; path None draws only.

        show: is given the picture before it is written.
        """
        if not self.me.main:
            return
        model, config = self.ema.model, self.config
        classes = min(len(self.data.classes), 10)
        y = torch.arange(classes, device=self.me.device).repeat_interleave(8) if classes else None
        guidance = config.sample_guidance if classes and model.blocks[0].transform.guided else 0.0
        # an early flow may overflow: the picture then shows black squares, and training goes on
        x = model.sample(8 * classes or 64, y, guidance=guidance, seed=config.seed, nonfinite="ignore")
        panels = [("samples", x)]
        if config.noise_type == "gaussian" and config.noise_std > 0:
            panels.append(("denoised", model.denoise(x, y, config.noise_std, nonfinite="ignore")))
        if path is not None:
            scale = max(1, 40 // x.shape[-1])
            picture = side_by_side([(name, make_grid(part, 8, scale=scale)) for name, part in panels])
            if show is not None:
                show(picture)
            save_image(picture, path)
