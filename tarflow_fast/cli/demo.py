"""The demo: a small flow draws handwritten digits, faster than plain PyTorch and with the same numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tarflow_fast.data.images import make_grid, save_image, side_by_side
from tarflow_fast.flows import SHIPPED, open_flow, training_noise
from tarflow_fast.verify.rule import largest_error_and_bound

SAMPLES_A_CLASS = 10


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat of one implementation."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleaved(functions: list[Callable[[], object]], repeats: int) -> list[Timing]:
    """Times functions by turns, so that a slow moment of the machine meets all; the first turn is not timed."""
    seconds: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 1):
        for taken, function in zip(seconds, functions, strict=True):
            start = time.perf_counter()
            function()
            if turn:
                taken.append(time.perf_counter() - start)
    return [Timing(taken) for taken in seconds]


@dataclass(frozen=True)
class Agreement:
    """Largest absolute differences, in units of the images' range [-1, 1].

    ours, reference: of the float32 results against the reference in float64.  between: of one against the other.
    limit: what the error rule allows ours (verify/rule.py); it scales with the flow.
    """

    ours: float
    reference: float
    between: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.limit  # False for NaN


def demo(
    out: Path = Path("demo"), *, train: bool = False, seed: int = 0, guidance: float = 1.0, repeats: int = 7
) -> tuple[str, bool]:
    """Draws 100 digits, a row a class, writes <out>/samples.png, and holds them against the reference.

    train: train the flow afresh first, in <out>/run, instead of loading the shipped one.  repeats: timed turns.
    Returns (the report, whether the numbers agree).  Raises ValueError for bad arguments.
    """
    from tarflow_fast.reference import ReferenceTarFlow

    if repeats < 1:
        raise ValueError(f"demo: repeats must be at least 1, got {repeats}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    folder = _train(out / "run", seed) if train else SHIPPED["digits"]
    model, record = open_flow(folder)
    y = torch.arange(model.num_classes).repeat_interleave(SAMPLES_A_CLASS)
    noise = torch.randn(len(y), model.num_tokens, model.token_size, generator=torch.Generator().manual_seed(seed))
    reference = ReferenceTarFlow(**model.config).eval()
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours_timing, reference_timing = interleaved(
            [
                lambda: model.reverse(noise, y, guidance=guidance),
                lambda: reference.reverse(noise, y, guidance=guidance),
            ],
            repeats,
        )
        raw, expected = model.reverse(noise, y, guidance=guidance), reference.reverse(noise, y, guidance=guidance)
        exact = reference.double().reverse(noise.double(), y, guidance=guidance)
    error, limit = largest_error_and_bound(raw, exact, expected)
    agreement = Agreement(
        ours=error,
        reference=(expected - exact).abs().max().item(),
        between=(raw - expected).abs().max().item(),
        limit=limit,
    )
    noise_std = training_noise(record)
    start = time.perf_counter()
    clean = model.denoise(raw, y, noise_std=noise_std)
    denoise_seconds = time.perf_counter() - start
    pictures = [
        (f"noise, seed {seed}", make_grid(model.unpatchify(noise), SAMPLES_A_CLASS, (-3, 3), scale=6, padding=4)),
        (f"the flow's inverse, guidance {guidance:g}", make_grid(raw, SAMPLES_A_CLASS, scale=6, padding=4)),
        (f"denoised, sigma {noise_std:g}", make_grid(clean, SAMPLES_A_CLASS, scale=6, padding=4)),
    ]
    save_image(side_by_side(pictures), out / "samples.png")
    rows = [
        ("reference (plain PyTorch)", reference_timing, agreement.reference),
        ("tarflow_fast", ours_timing, agreement.ours),
    ]
    report = _report(rows, agreement, len(y), guidance, repeats)
    report += f"\n\ndenoising: {denoise_seconds:.3f} s.  {out / 'samples.png'}: noise, samples, denoised; a row a class"
    return report, agreement.ok


def _train(out: Path, seed: int) -> Path:
    from tarflow_fast.training.config import TrainConfig
    from tarflow_fast.training.run import train

    run = train(TrainConfig(dataset="digits", out=out, seed=seed, resume="none"))
    if run.steps < run.total:
        raise KeyboardInterrupt
    return run.model


def _report(
    rows: list[tuple[str, Timing, float]], agreement: Agreement, count: int, guidance: float, repeats: int
) -> str:
    baseline = rows[0][1]
    lines = [
        f"{count} images, guidance {guidance:g}, float32, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {repeats} turns",
        "",
        "| implementation | seconds, median (range) | images/s | ratio, median of turns | error against float64 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, timing, error in rows:
        spread = f"{timing.median:.3f} ({min(timing.seconds):.3f} to {max(timing.seconds):.3f})"
        speed = count / timing.median
        ratio = statistics.median(a / b for a, b in zip(baseline.seconds, timing.seconds, strict=True))
        lines.append(f"| {name} | {spread} | {speed:.0f} | {ratio:.2f}x | {error:.1e} |")
    verdict = "within" if agreement.ok else "ABOVE"
    lines += [
        "",
        f"same noise through both: largest difference {agreement.between:.1e}; our error {agreement.ours:.1e} is "
        f"{verdict} the limit {agreement.limit:.1e} (twice the reference's own, plus 2 float32 steps)",
    ]
    return "\n".join(lines)
