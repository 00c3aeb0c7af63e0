"""The command `evaluate`: bits per dimension, classification and FID of a flow over images; nats of one over tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    import torch

    from tarflow_fast.data import ImageSet, VariationalDequantizer
    from tarflow_fast.fid import Features, Statistics
    from tarflow_fast.flow import TokenFlow
    from tarflow_fast.model import TarFlow

_OF_FID = (
    "fid_samples", "fid_save", "fid_weights", "guidance", "guide_what", "attn_temp", "annealed_guidance", "denoise",
    "precision", "solver", "tolerance", "window", "draft",
)  # fmt: skip
_OF_IMAGES = ("holdout", "n_draws", "dequantize", "importance", "classify", "noise_std", "fid", *_OF_FID)


@dataclass(frozen=True)
class Evaluate:
    """Measures a flow on data: bits per dimension of images (under dequantisation), how often it finds their class,
    and how far its samples are from them (FID); log-likelihood of tokens."""

    flow: Positional[Annotated[str | None, arg(metavar="FLOW")]] = None
    """digits (the shipped flow), a folder, or a checkpoint file; left out: --model."""
    model: str = "digits"
    """The same, as an option."""
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
    dequantize: Literal["auto", "uniform", "variational"] = "auto"
    """auto: by the dequantiser that was trained with the flow, where there is one; else uniform noise."""
    importance: int = 1
    """Each draw's bound is importance-weighted over this many, which makes it tighter."""
    classify: int = 300
    """Images classified by Bayes' rule, where flow and data have classes; each costs a pass a class. 0: none."""
    fid: str | None = None
    """Also measures the FID of samples against these: a file of statistics (.npz, .pt, .pth, .safetensors), the
    original's too, or a data set as for train, all of it but a test part of its own."""
    fid_samples: int = 50_000
    """Samples drawn for it."""
    fid_save: Path | None = None
    """Writes the data set's statistics to this .npz file, for the next --fid."""
    fid_weights: Path | None = None
    """Inception's weights (torch-fidelity's file); left out: in torch hub's folder, downloaded where missing."""
    guidance: Annotated[float, arg(aliases=["--cfg"])] = 0.0
    """Of the samples, as for sample."""
    guide_what: Literal["a", "b", "ab"] = "ab"
    """Of the samples, as for sample."""
    attn_temp: float = 1.0
    """Of the samples, as for sample."""
    annealed_guidance: bool = True
    """Guidance grows along the tokens, as in the original's evaluation, and other than in sample."""
    denoise: bool = True
    """Of the samples, as for sample."""
    noise_std: float | None = None
    """Of the noise the flow was trained with; left out: from the flow's train.json."""
    precision: Literal["fp32", "bf16", "int8"] | None = None
    """Of the samples, as for sample."""
    solver: Literal["auto", "sequential", "windows"] = "auto"
    """Of the samples, as for sample."""
    tolerance: float | None = None
    """Of the samples, as for sample."""
    window: int | None = None
    """Of the samples, as for sample."""
    draft: Literal["bf16", "int8"] | None = None
    """Of windows: a cheaper precision for first values; left out: they are guessed."""
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
        from tarflow_fast.flows import open_flow
        from tarflow_fast.model import TarFlow
        from tarflow_fast.validate import find_device

        self._check()
        device = find_device("evaluate", self.device)
        name = self.model if self.flow is None else self.flow
        model, record = open_flow(
            name, device=device, in_channels=self.in_channels, img_size=self.img_size, head_size=self.head_size,
            key=self.key,
        )  # fmt: skip
        if isinstance(model, TarFlow):
            return self._run_images(model, record, device, self._dequantizer(name, device))
        return self._run_tokens(model, name)

    def _check(self) -> None:
        import math

        from tarflow_fast.solvers import Solving
        from tarflow_fast.transforms import Guidance
        from tarflow_fast.validate import check_positive_int

        check_positive_int("evaluate", "batch_size", self.batch_size)
        check_positive_int("evaluate", "importance", self.importance)
        check_positive_int("evaluate", "classify", self.classify, 0)
        check_positive_int("evaluate", "fid_samples", self.fid_samples, 2)
        if self.flow is not None and self.model != Evaluate.model:
            raise ValueError(f"evaluate: name the flow once, got {self.flow} and --model {self.model}")
        if self.fid is None:
            if given := self._given(_OF_FID):
                raise ValueError(f"evaluate: {', '.join(given)} must come with --fid")
        if self.fid_save is not None and (self.fid_save.suffix != ".npz" or self.fid_save.is_dir()):
            raise ValueError(f"evaluate: fid_save must name a .npz file, got {self.fid_save}")
        if self.noise_std is not None and not (math.isfinite(self.noise_std) and self.noise_std >= 0):
            raise ValueError(f"evaluate: noise_std must be finite and >= 0, got {self.noise_std}")
        Guidance(self.guidance, self.guide_what, self.attn_temp, self.annealed_guidance, where="evaluate")
        Solving("evaluate", self.solver, self.tolerance, self.window, draft=self.draft)

    def _given(self, names: tuple[str, ...]) -> list[str]:
        """Those of these options that were given another value than their default."""
        return [name for name in names if getattr(self, name) != getattr(Evaluate, name)]

    def _dequantizer(self, name: str, device: torch.device) -> VariationalDequantizer | None:
        from tarflow_fast.flows import open_dequantizer

        found = None if self.dequantize == "uniform" else open_dequantizer(name, device=device)
        if found is None and self.dequantize == "variational":
            raise ValueError(f"evaluate: dequantize 'variational' needs a flow with a dequantiser, {name} has none")
        return found

    def _run_images(
        self,
        model: TarFlow,
        record: dict[str, Any],
        device: torch.device,
        dequantizer: VariationalDequantizer | None,
    ) -> int:
        from tarflow_fast.cli.parts import note_on_training, part_to_measure
        from tarflow_fast.data import ImageFiles
        from tarflow_fast.evaluate import classification, evaluate, histogram_bits
        from tarflow_fast.flows import training_noise

        progress = {"batch_size": self.batch_size, "progress": sys.stderr.isatty()}
        noise_std = training_noise(record) if self.noise_std is None else self.noise_std
        whole = self._load(self.dataset, model)
        measure_fid = None if self.fid is None else self._prepare_fid(model, noise_std, device)
        known, part, which = part_to_measure(whole, self.holdout)
        bits = evaluate(
            model, part, conditional=not self.unconditional, n_draws=self.n_draws, seed=self.seed,
            dequantizer=dequantizer, importance=self.importance, **progress,
        )  # fmt: skip
        if note := note_on_training(record, self.dataset, self.holdout):
            print(note)
        print(f"{self.dataset}, {which}: {len(part)} images, {part.levels} levels")
        _row("", "value", "+-", "standard error over what was measured")
        measured = f"{len(part)} images{self._bound(dequantizer)}"
        _row("bits/dim", f"{bits.mean:.4f}", f"{bits.standard_error:.4f}", measured)
        if not isinstance(whole.images, ImageFiles):
            _row("  a histogram a pixel", f"{histogram_bits(known, part):.4f}", "", f"{len(part)} images")
        if self.classify and model.num_classes and part.labels is not None and not self.unconditional:
            found = classification(
                model, part, self.classify, noise_std=noise_std or None, seed=self.seed, dequantizer=dequantizer,
                **progress,
            )  # fmt: skip
            measured = f"{len(found.right)} images, Bayes' rule"
            _row("accuracy", f"{found.mean:.4f}", f"{found.standard_error:.4f}", measured)
        if measure_fid is not None:
            measure_fid()
        return 0

    def _bound(self, dequantizer: VariationalDequantizer | None) -> str:
        """Which bound the bits are, where it is not that of uniform noise and single draws."""
        variational = "" if dequantizer is None else ", variational dequantisation"
        return variational + (f", importance-weighted over {self.importance}" if self.importance > 1 else "")

    def _load(self, name: str, model: TarFlow) -> ImageSet:
        from tarflow_fast.data import load_dataset

        size = model.config["img_size"], model.config["in_channels"]
        return load_dataset(name, *size, data_root=self.data_root, strict=self.strict)

    def _prepare_fid(self, model: TarFlow, noise_std: float | None, device: torch.device) -> Callable[[], None]:
        """What draws the samples and prints the row; all that it needs is read here, before anything is measured."""
        from tarflow_fast.fid import fid, holds_statistics, load_statistics

        if holds_statistics(self.fid):
            if self.fid_save is not None:
                raise ValueError(f"evaluate: fid_save is for the statistics of a data set, and {self.fid} holds some")
            reference, images = load_statistics(self.fid), None
        else:
            reference, images = None, self._load(self.fid, model)
        features = _features(self.fid_weights, device)

        def measure() -> None:
            found = fid(
                model, reference or self._gather(images, features), features, n=self.fid_samples,
                conditional=not self.unconditional, guidance=self.guidance, guide_what=self.guide_what,
                attn_temp=self.attn_temp, annealed_guidance=self.annealed_guidance,
                noise_std=(noise_std or None) if self.denoise else None, precision=self.precision, solver=self.solver,
                tolerance=self.tolerance, window=self.window, draft=self.draft, seed=self.seed,
                batch_size=self.batch_size,
                progress=sys.stderr.isatty(),
            )  # fmt: skip
            guided = f", guidance {self.guidance:g}{' annealed' * self.annealed_guidance}" if self.guidance else ""
            done = f", denoised (sigma {noise_std:g})" if noise_std and self.denoise else ""
            measured = f"{found.statistics.count} samples against {self.fid}"
            _row("FID", f"{found.distance:.4f}", "", measured + guided + done)
            if found.bad:
                print(f"note: {found.bad} of {self.fid_samples} samples are not finite and were left out")

        return measure

    def _gather(self, images: ImageSet, features: Features) -> Statistics:
        """The statistics of a data set, written where that was asked for."""
        from tarflow_fast.fid import image_statistics, save_statistics

        found = image_statistics(images, features, batch_size=self.batch_size, progress=sys.stderr.isatty())
        if self.fid_save is not None:
            save_statistics(self.fid_save, found)
        return found

    def _run_tokens(self, model: TokenFlow, name: str) -> int:
        from tarflow_fast.evaluate import evaluate_tokens, load_tokens

        for given in self._given(_OF_IMAGES):
            raise ValueError(f"evaluate: {given} is for images, and {name} is a flow over tokens")
        x, y = load_tokens(self.dataset, (model.num_tokens, model.token_size))
        y = None if self.unconditional or not model.num_classes else y
        found = evaluate_tokens(model, x, y, batch_size=self.batch_size, progress=sys.stderr.isatty())
        print(f"{self.dataset}: {len(x)} rows of {model.num_tokens} tokens of size {model.token_size}")
        print(f"log-likelihood {found.mean:.4f} +- {found.standard_error:.4f} nats (standard error over rows)")
        print(f"nats/dim {found.per_dim:.4f}")
        if len(found.bad):
            print(f"note: log p is not finite in {len(found.bad)} rows, the first is row {found.bad[0]}")
        return 0


def _features(weights: Path | None, device: torch.device) -> Features:
    from tarflow_fast.fid import inception_features

    return inception_features(weights, device)


def _row(name: str, value: str, error: str, measured: str) -> None:
    print(f"{name:<22}{value:>10}  {error:>8}  {measured}".rstrip(), flush=True)
