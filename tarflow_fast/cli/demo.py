"""The demo: a shipped flow draws pictures, faster than plain PyTorch and with the same numbers."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tarflow_fast.data.images import make_grid, save_image
from tarflow_fast.data.sheet import Band, sheet
from tarflow_fast.flows import open_flow, training_noise
from tarflow_fast.model import TarFlow
from tarflow_fast.verify.rule import largest_error_and_bound

log = logging.getLogger("tarflow_fast")
ROWS, SAMPLES_A_CLASS = 10, 8
CELL = 56  # pixels of an image in the picture, about
SWEEP, SWEPT_A_CLASS = (0.0, 0.5, 1.0, 2.0, 3.0), 2  # guidance
COUNTS = (1, 100)  # images at a time
BUDGET = 40.0  # seconds for the turns of one count


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat of one implementation."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleaved(functions: list[Callable[[], object]], repeats: int) -> tuple[list[Timing], list[object]]:
    """Times functions by turns, so that a slow moment of the machine meets all; the first turn is not timed.

    A further turn begins only where, by the longest before, it would end within BUDGET seconds; one is always timed.
    Returns (the times of each, what each returned last).
    """
    seconds: list[list[float]] = [[] for _ in functions]
    results: list[object] = [None for _ in functions]
    begin, longest = time.perf_counter(), 0.0
    for turn in range(repeats + 1):
        begun = time.perf_counter()
        if turn > 1 and begun - begin + longest > BUDGET:
            break
        for number, function in enumerate(functions):
            start = time.perf_counter()
            results[number] = function()
            if turn:
                seconds[number].append(time.perf_counter() - start)
        longest = max(longest, time.perf_counter() - begun)
    return [Timing(taken) for taken in seconds], results


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
    out: Path = Path("demo"),
    *,
    flow: str | None = None,
    train: bool = False,
    seed: int = 0,
    guidance: float = 1.0,
    repeats: int = 7,
) -> tuple[str, bool]:
    """Draws a picture of a flow, <out>/samples.png, and holds its samples against the reference, 1 and 100 at a time.

    flow: a shipped flow or a folder; fashion by default, digits with train.  train: train the digits afresh first, in
    <out>/run.  repeats: timed turns; fewer where they would take longer than BUDGET.
    Returns (the report, whether the numbers agree).  Raises ValueError for bad arguments.
    """
    if repeats < 1:
        raise ValueError(f"demo: repeats must be at least 1, got {repeats}")
    if train and flow not in (None, "digits"):
        raise ValueError(f"demo: flow must be digits with train, which trains for two minutes, got {flow}")
    name = flow or ("digits" if train else "fashion")
    model, record = open_flow(_train(Path(out) / "run", seed) if train else name)
    if not isinstance(model, TarFlow):
        raise ValueError(f"demo: flow must be one over images, got {name}, a flow over tokens")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    classes = tuple(record.get("data", {}).get("classes", ())) or tuple(map(str, range(model.num_classes)))
    guidance = guidance if model.num_classes else 0.0
    seconds = draw(model, classes, training_noise(record), seed, guidance, out / "samples.png")
    log.info("%s: drawn in %.1f s", out / "samples.png", seconds)
    parts = []
    for count in COUNTS:
        log.info("by turns with plain PyTorch, %s at a time: at most a minute or so", _images(count))
        parts.append(compare(model, count, seed, guidance, repeats))
    size = sum(each.numel() for each in model.parameters()) / 1e6
    report = [
        f"{name}: {size:.1f} M parameters, {model.num_tokens} tokens; guidance {guidance:g}, float32, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        *(part.report() for part in parts),
        f"In short: the numbers of plain PyTorch, {', '.join(part.headline() for part in parts)}.",
    ]
    ok = all(part.agreement.ok for part in parts)
    return "\n\n".join(report if ok else report[:-1]), ok


def draw(
    model: TarFlow, classes: Sequence[str], noise_std: float | None, seed: int, guidance: float, path: Path
) -> float:
    """Writes one picture: noise, samples by class, the same denoised; below, some of that noise at rising guidance.

    Returns the seconds it took.
    """
    start = time.perf_counter()
    rows = min(model.num_classes, ROWS) or ROWS
    y = torch.arange(rows).repeat_interleave(SAMPLES_A_CLASS) if model.num_classes else None
    noise = draw_noise(model, rows * SAMPLES_A_CLASS, seed)
    layout = dict(scale=max(1, round(CELL / model.unpatchify(noise[:1]).shape[-1])), padding=3)
    raw = model.reverse(noise, y, guidance=guidance)
    told = f", at guidance {guidance:g}" if y is not None else ""
    panels = [
        (f"noise\nnormal, seed {seed}", make_grid(model.unpatchify(noise), SAMPLES_A_CLASS, (-3, 3), **layout)),
        (f"samples\nthe flow's inverse of it{told}", make_grid(raw, SAMPLES_A_CLASS, **layout)),
    ]
    if noise_std is not None:
        cleaned = make_grid(denoised(model, raw, y, noise_std), SAMPLES_A_CLASS, **layout)
        panels.append((f"denoised\nby the flow's own score, sigma {noise_std:g}", cleaned))
    bands = [Band(panels, () if y is None else classes[:rows])]
    if y is not None:
        chosen = torch.arange(len(noise)).view(rows, SAMPLES_A_CLASS)[:, :SWEPT_A_CLASS].flatten()
        settings = {f"guidance {g:g}": dict(guidance=g) for g in SWEEP}
        title = "the same noise at rising guidance" + ("" if noise_std is None else ", denoised")
        bands.append(sweep(model, noise[chosen], y[chosen], classes, settings, noise_std, title, layout))
    save_image(sheet(bands), path)
    return time.perf_counter() - start


def sweep(
    model: TarFlow,
    noise: torch.Tensor,
    y: torch.Tensor | None,
    classes: Sequence[str],
    settings: Mapping[str, dict[str, float]],
    noise_std: float | None,
    title: str,
    layout: dict[str, int],
) -> Band:
    """The same noise under several arguments of `reverse`: a row for each, by name; a panel for each class.

    noise: (N, T, D).  y: (N,) or None.  noise_std: of `denoised`.  layout: of `make_grid`.
    """
    drawn = [denoised(model, model.reverse(noise, y, **setting), y, noise_std) for setting in settings.values()]
    labels = torch.zeros(len(noise), dtype=torch.int64) if y is None else y
    panels = []
    for label in labels.unique().tolist():
        part = torch.stack(drawn)[:, labels == label]  # (settings, columns, C, H, W)
        panels.append(("" if y is None else classes[label], make_grid(part.flatten(0, 1), part.shape[1], **layout)))
    return Band(panels, list(settings), title)


def denoised(model: TarFlow, x: torch.Tensor, y: torch.Tensor | None, noise_std: float | None) -> torch.Tensor:
    """x without the noise of the flow's training; x itself where that is not known (None)."""
    return x if noise_std is None else model.denoise(x, y, noise_std=noise_std)


def draw_noise(model: TarFlow, count: int, seed: int) -> torch.Tensor:
    """(count, T, D) from N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, model.num_tokens, model.token_size, generator=generator)


@dataclass(frozen=True)
class Comparison:
    """The engine and the reference on the same noise: times by turns, and errors."""

    count: int
    ours: Timing
    reference: Timing
    agreement: Agreement

    @property
    def ratio(self) -> float:
        """How many times as fast ours is: the median over turns."""
        return statistics.median(a / b for a, b in zip(self.reference.seconds, self.ours.seconds, strict=True))

    def headline(self) -> str:
        """The ratio in words."""
        return f"{self.ratio:.1f} times as fast at {_images(self.count)}"

    @property
    def busy(self) -> bool:
        """Whether the machine was so busy that the times say little: some turn took twice as long as another.

        The reference tells: its turns are the longer ones, so a moment's hiccup does not double one.
        """
        return max(self.reference.seconds) > 2 * min(self.reference.seconds)

    def report(self) -> str:
        """A table of both, and the verdict on the numbers."""
        agreement = self.agreement
        lines = [
            f"{_images(self.count)} at a time, {len(self.ours.seconds)} turns",
            "",
            "| implementation | seconds, median (range) | images/s | ratio, median of turns | error against float64 |",
            "| --- | --- | --- | --- | --- |",
        ]
        rows = [
            ("reference (plain PyTorch)", self.reference, 1.0, agreement.reference),
            ("tarflow_fast", self.ours, self.ratio, agreement.ours),
        ]
        for name, timing, ratio, error in rows:
            spread = f"{timing.median:.3g} ({min(timing.seconds):.3g} to {max(timing.seconds):.3g})"
            speed = self.count / timing.median
            lines.append(f"| {name} | {spread} | {speed:.3g} | {ratio:.2f}x | {error:.1e} |")
        verdict = "within" if agreement.ok else "ABOVE"
        lines += [
            "",
            f"same noise through both: largest difference {agreement.between:.1e}; our error {agreement.ours:.1e} is "
            f"{verdict} the limit {agreement.limit:.1e} (twice the reference's own, plus 2 float32 steps)",
        ]
        if self.busy:
            lines.append("note: the turns of the reference differ by more than twice: the machine was busy")
        return "\n".join(lines)


@torch.no_grad()
def compare(model: TarFlow, count: int, seed: int, guidance: float, repeats: int) -> Comparison:
    """Times `count` images by turns with the reference, and judges both by the reference in float64."""
    from tarflow_fast.reference import ReferenceTarFlow

    y = torch.arange(count) % model.num_classes if model.num_classes else None
    noise = draw_noise(model, count, seed)
    reference = ReferenceTarFlow(**model.config).eval()
    reference.load_state_dict(model.state_dict())
    (ours, theirs), (raw, expected) = interleaved(
        [lambda: model.reverse(noise, y, guidance=guidance), lambda: reference.reverse(noise, y, guidance=guidance)],
        repeats,
    )
    exact = reference.double().reverse(noise.double(), y, guidance=guidance)
    error, limit = largest_error_and_bound(raw, exact, expected)
    agreement = Agreement(
        ours=error,
        reference=(expected - exact).abs().max().item(),
        between=(raw - expected).abs().max().item(),
        limit=limit,
    )
    return Comparison(count, ours, theirs, agreement)


def _images(count: int) -> str:
    return f"{count} image{'s' if count > 1 else ''}"


def _train(out: Path, seed: int) -> Path:
    from tarflow_fast.training.config import TrainConfig
    from tarflow_fast.training.run import train

    run = train(TrainConfig(dataset="digits", out=out, seed=seed, resume="none"))
    if run.steps < run.total:
        raise KeyboardInterrupt
    return run.model
