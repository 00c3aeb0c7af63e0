"""One family of flows on one data set: trained for some seconds, checked, and then timed."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from families_check import Checked, check
from peers.peer import Peer
from torch import Tensor

from tarflow_fast import data

RATE, BATCH = 1e-3, 64  # of AdamW, for every family alike
ROWS = 1000  # sampled, and given to the log-density
LOOKS, CHOOSE = 10, 200  # times that training measures the images for choosing the best weights, and how many
SWEEP = 1e-3  # that the inverse by one sweep may differ from the library's, of the largest number in float32
MOST_SECONDS = 120.0  # that sampling may take


@dataclass(frozen=True)
class Images:
    """Bytes for training, for choosing the weights, and for the result; x = (2 (bytes + u) / levels - 1 - mean) / std.

    One mean and one standard deviation, of all pixels of the training images, so that the constant is the same for
    every flow: bits/dim = -log2 p(x) / dims + log2(levels / 2) + log2(std).
    """

    name: str
    train: Tensor
    choose: Tensor
    held_out: Tensor
    levels: int
    mean: float
    std: float

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.train.shape[1:])

    def draw(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W) as real numbers, uniformly dequantised."""
        u = torch.rand(images.shape, generator=generator)
        return (data.dequantize(images, u, self.levels) - self.mean) / self.std

    def bits_per_dim(self, log_prob: Tensor) -> Tensor:
        """Of the bytes, from log p(x) in nats: (B,), float64."""
        scale = math.log2(self.levels / 2) + math.log2(self.std)
        return -log_prob.double() / math.prod(self.shape) / math.log(2) + scale


def load(name: str, held_out: int = ROWS) -> Images:
    """digits (a fifth held out) or another set of `tarflow_fast.data`, of which at most `held_out` images are measured.

    A tenth of what is left for training, of which at most 200 images are used, chooses the weights.
    FileNotFoundError where a set is not on this machine.
    """
    whole = data.load_dataset(name).unlabelled()
    train, test = whole.split(0.0 if whole.held_out is not None else 0.2)
    train, choose = train.split(0.1)
    order = torch.randperm(len(test), generator=data.generator(0, "families"))[:held_out]
    return images(name, train.images, choose.images[:CHOOSE], test.images[order], whole.levels)


def images(name: str, train: Tensor, choose: Tensor, held_out: Tensor, levels: int) -> Images:
    """`Images` of bytes (N, C, H, W), the mean and the standard deviation taken from the first."""
    pixels = data.dequantize(train, torch.full((), 0.5), levels)
    return Images(name, train, choose, held_out, levels, pixels.mean().item(), pixels.std().item())


@dataclass(frozen=True)
class Trained:
    """steps: of the optimizer.  seconds: all of training, looks at the images for choosing included.
    skipped: steps whose loss or gradient was not finite, and which changed nothing.
    """

    steps: int
    seconds: float
    skipped: int


def train(peer: Peer, images: Images, seconds: float, seed: int = 0) -> Trained:
    """AdamW, a cosine over the seconds, one step at least; keeps the weights with the fewest bits/dim on `choose`."""
    began = time.perf_counter()
    rows, noise = (data.generator(seed, purpose) for purpose in ("families rows", "families noise"))

    def batch() -> Tensor:
        chosen = torch.randint(len(images.train), (BATCH,), generator=rows)
        return images.draw(images.train[chosen], noise)

    peer.train()
    peer.begin(batch())
    optimizer = torch.optim.AdamW(peer.parameters(), lr=RATE)
    best, weights, steps, skipped, looks = math.inf, None, 0, 0, 0
    while (used := time.perf_counter() - began) < seconds or steps == 0:
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * min(used / seconds, 1.0)))
        optimizer.zero_grad()
        loss = peer.loss(batch())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), images.train[0].numel())
        if torch.isfinite(loss) and torch.isfinite(norm):
            optimizer.step()
            peer.after_step()
        else:
            skipped += 1
        steps += 1
        if used > (looks + 1) / LOOKS * seconds or time.perf_counter() - began > seconds:
            looks += 1
            found = images.bits_per_dim(log_prob(peer, images, images.choose)).mean().item()
            if found < best:
                best, weights = found, copy.deepcopy(peer.state_dict())
            peer.train()
    if weights is not None:
        peer.load_state_dict(weights)
    peer.finish()
    peer.eval()
    return Trained(steps, time.perf_counter() - began, skipped)


@torch.no_grad()
def log_prob(peer: Peer, images: Images, which: Tensor) -> Tensor:
    """log p of bytes under one fixed draw of noise: (N,), nats."""
    peer.eval()
    noise = data.generator(0, "families measure")
    return torch.cat([peer.log_prob(images.draw(part, noise)).detach() for part in which.split(250)])


@dataclass(frozen=True)
class Result:
    """What the table says of a family. A time is None where the check failed, or where `note` says why."""

    parameters: int
    trained: Trained
    checked: Checked
    bits: float | None = None
    bits_error: float | None = None
    sampling: float | None = None
    one_sweep: float | None = None
    density: float | None = None
    bad_samples: int = 0
    note: str = ""


def measure(peer: Peer, images: Images, seconds: float, checked_rows: int = 2, seed: int = 0) -> Result:
    """Trains, checks, and times. A peer that the check refuses has no figures."""
    _warm_up(copy.deepcopy(peer), images)
    trained = train(peer, images, seconds, seed)
    count = sum(each.numel() for each in peer.parameters() if each.requires_grad)
    noise = data.generator(seed, "families check")
    checked = check(peer, images.draw(images.held_out[:checked_rows], noise))
    if checked.why:
        return Result(count, trained, checked, note=checked.why)
    bits = images.bits_per_dim(log_prob(peer, images, images.held_out))
    some = images.held_out[torch.arange(ROWS) % len(images.held_out)]
    x = images.draw(some, noise)
    with torch.no_grad():
        density = statistics.median([_timed(lambda: peer.log_prob(x)) for _ in range(4)][1:])
        sampling, bad, note = time_sampling(peer)
        swept, differs = time_one_sweep(peer, x[:10])
        note = "; ".join(each for each in (note, differs) if each)
    error = (bits.std() / len(bits) ** 0.5).item()
    return Result(count, trained, checked, bits.mean().item(), error, sampling, swept, density, bad, note)


def _warm_up(peer: Peer, images: Images) -> None:
    """One step of a copy, so that what a library or PyTorch does once a process is in nobody's seconds."""
    x = images.draw(images.train[:BATCH], torch.Generator().manual_seed(0))
    peer.begin(x)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=RATE)
    peer.loss(x).backward()
    optimizer.step()
    peer.after_step()


@torch.no_grad()
def time_sampling(peer: Peer) -> tuple[float | None, int, str]:
    """Seconds of 1000 samples, how many of them are not finite, and why they were not drawn, where they were not."""
    for few in (1, 10, 100):
        took = _timed(lambda few=few: peer.sample(few))
        if took > MOST_SECONDS / 10:
            return None, 0, f"{few} {'sample' if few == 1 else 'samples'} took {took:.0f} s, so 1000 were not drawn"
    kept = []
    seconds = _timed(lambda: kept.append(peer.sample(ROWS)))
    bad = int((~kept[0].flatten(1).isfinite().all(dim=1)).sum())
    return seconds, bad, f"{bad} of 1000 samples are not finite" if bad else ""


@torch.no_grad()
def time_one_sweep(peer: Peer, x: Tensor) -> tuple[float | None, str]:
    """Seconds of 1000 samples by `made.accelerate`, once its inverse is the library's on x; None where it has none."""
    sweep = peer.one_sweep()
    if sweep is None:
        return None, ""
    z = peer.encode(x)
    theirs = peer.decode(z)
    difference = ((sweep.decode(z) - theirs).abs().max() / theirs.abs().max()).item()
    if not difference <= SWEEP:
        return None, f"the sweep differs from the library's inverse by {difference:.1g} of the largest number"
    return time_sampling(sweep)[0], ""


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
