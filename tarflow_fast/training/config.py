"""What can be set for a training run: one dataclass, which is also the command line. Imports no torch."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import arg

# Where a field is None, the value comes from here.
DIGITS: dict[str, Any] = dict(
    img_size=8, in_channels=1, patch_size=2, channels=128, num_blocks=4, layers_per_block=2, noise_std=0.1,
    drop_label=0.1, batch_size=64, epochs=60.0, lr=2e-3, schedule="onecycle", warmup=0.2, ema=0.998,
    log_every=20, checkpoint_every=400, sample_every=400, eval_every=400,
)  # fmt: skip
FASHION: dict[str, Any] = dict(
    img_size=28, in_channels=1, patch_size=4, channels=128, num_blocks=4, layers_per_block=4, noise_std=0.1,
    drop_label=0.1, batch_size=64, epochs=10.0, lr=1e-3, schedule="onecycle", warmup=0.05, ema=0.999,
    log_every=50, checkpoint_every=500, sample_every=1000, eval_every=1000,
)  # fmt: skip
PHOTOGRAPHS: dict[str, Any] = dict(
    img_size=32, in_channels=3, patch_size=4, channels=128, num_blocks=4, layers_per_block=2, noise_std=0.05,
    drop_label=0.1, batch_size=64, epochs=40.0, lr=1e-3, schedule="onecycle", warmup=0.1, ema=0.998,
    log_every=20, checkpoint_every=200, sample_every=200, eval_every=200,
)  # fmt: skip
FOLDER: dict[str, Any] = dict(
    img_size=64, in_channels=3, patch_size=4, channels=512, num_blocks=4, layers_per_block=8, noise_std=0.05,
    drop_label=0.1, batch_size=256, epochs=100.0, lr=1e-4, schedule="cosine", warmup=0.01, ema=0.9999,
    log_every=50, checkpoint_every=1000, sample_every=1000, eval_every=1000,
)  # fmt: skip
DEFAULTS = {"digits": DIGITS, "fashion-mnist": FASHION, "photographs": PHOTOGRAPHS}
GIVEN = "given"  # the name of a data set that a caller passed in

COUNTS = (
    "in_channels", "patch_size", "channels", "num_blocks", "layers_per_block", "batch_size", "accumulate", "log_every",
)  # fmt: skip

# A run can only be continued with the same of these: they shape the tensors, or decide what a sample is.
FIXED = (
    "dataset", "classes", "holdout", "img_size", "in_channels", "patch_size", "channels", "num_blocks",
    "layers_per_block", "nvp", "transform", "noise_type", "dequantize", "noise_std", "drop_label", "flip",
    "batch_size", "seed",
)  # fmt: skip
# These say where and how a run is carried out; they are no part of what it computes.
ELSEWHERE = (
    "data_root",
    "strict",
    "curve",
    "tensorboard",
    "out",
    "resume",
    "stop_at",
    "dry_run",
    "device",
    "progress",
    "config",
)


@dataclass(frozen=True)
class TrainConfig:
    """Trains a flow on images and saves it. Values left out depend on the data set."""

    dataset: str = "digits"
    """digits, fashion-mnist, photographs; or a folder <class>/<file> (or just <file>, unlabeled), of MNIST's files, or
    of Hugging Face's save_to_disk; or an IDX, .npy or .npz file."""
    data_root: Path | None = None
    """Where fashion-mnist is looked for: this folder, else data/; its FashionMNIST/raw; Debian's folder."""
    strict: bool = False
    """An image file that cannot be read is an error; otherwise it is named, counted and left out."""
    out: Path | None = None
    """Folder of the run: model/ (the flow), best/, checkpoint.safetensors, metrics.jsonl, samples/, curve.png. Else
    runs/<data set>."""
    start: str | None = None
    """A flow to go on from, with its shape and a fresh optimizer: digits, a run's folder, a checkpoint file."""
    config: Path | None = None
    """A .toml or .json file with values for these fields (a run's train.json serves); the command line wins."""

    classes: bool = True
    """The flow is told the classes that the data has; --no_classes leaves them out."""

    img_size: int | tuple[int, int] | None = None
    """Images are cropped and resized to this: pixels a side, or height and width."""
    in_channels: Annotated[int | None, arg(aliases=["--channel_size"])] = None
    """1 grey, 3 RGB."""
    patch_size: int | None = None
    """A token is patch_size x patch_size pixels."""
    channels: int | None = None
    """Width of the transformers, a multiple of 64."""
    num_blocks: Annotated[int | None, arg(aliases=["--blocks"])] = None
    """Flow blocks."""
    layers_per_block: int | None = None
    """Attention layers in each flow block."""
    nvp: bool = True
    """Scale and shift; --no_nvp shifts only and learns the prior's variance."""
    transform: str | None = None
    """What a block does to a token: affine, shift, logistic_mixture or spline. spline:16 has 16 bins, and
    logistic_mixture:4 has 4 logistics; else 8. Left out, --nvp tells it. docs/transforms.md has the formulas."""

    noise_type: Literal["gaussian", "uniform"] | None = None
    """gaussian: noise_std is added to images in [-1, 1]. uniform: dequantisation; bits/dim is reported. Left out:
    gaussian, or uniform where dequantize is given."""
    dequantize: Literal["uniform", "variational"] | None = None
    """Of noise_type uniform. variational: a small flow that sees the image learns the noise, and is saved in model/."""
    noise_std: float | None = None
    """Standard deviation of the Gaussian noise, for images in [-1, 1]."""
    drop_label: float | None = None
    """Share of labels dropped, which teaches the unconditional flow that guidance needs."""
    flip: bool = False
    """Mirrors half of the images left to right."""
    holdout: float = 0.0
    """Share of the images kept away from training; `evaluate --holdout` with the same share measures on them. 0: the
    test part of the data set, where it has one."""

    batch_size: int | None = None
    """Images a step, over all processes."""
    accumulate: int = 1
    """Parts a process cuts its share of the batch into, one backward each."""
    recompute: bool = False
    """Layers are computed again in the backward pass instead of kept: less memory, about a third more time."""
    epochs: float | None = None
    """Passes over the data."""
    lr: float | None = None
    """Highest learning rate."""
    lr_final: float = 1e-6
    """Learning rate at the end."""
    schedule: Literal["cosine", "onecycle"] | None = None
    """cosine: linear rise from 0. onecycle: cosine rise from lr / 25. Both fall to lr_final along a cosine."""
    warmup: float | None = None
    """Share of the steps during which the learning rate rises."""
    weight_decay: float = 1e-4
    """AdamW's."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 switches clipping off."""
    ema: float | None = None
    """Decay of the averaged weights, which are saved and sampled; ramped: min(ema, (1 + step) / (10 + step))."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; slow on CPUs without bf16 dot products."""
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the weights in model/."""
    seed: int = 0
    """Everything random follows from it."""

    resume: str = "auto"
    """auto: continue where this folder's checkpoint stands; none: start afresh; or the path of a checkpoint."""
    stop_at: int | None = None
    """Saves and stops after this many steps; the learning rate still follows the whole run."""
    log_every: int | None = None
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; 0: only at the end."""
    sample_every: int | None = None
    """Steps between grids of samples; 0: only at the end."""
    eval_every: int | None = None
    """Steps between measurements on held-out images (bits/dim; best/ keeps the best flow); 0: none are made."""
    eval_images: int = 1000
    """Measures on at most this many held-out images; 0: on all of them."""
    tensorboard: bool = False
    """Writes the same numbers and the grids of samples for TensorBoard, in tensorboard/."""
    curve: bool = True
    """Draws curve.png (loss, bits/dim) with the samples, where matplotlib is installed."""
    sample_guidance: Annotated[float, arg(aliases=["--cfg"])] = 1.0
    """Guidance of those samples, where the data has classes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    progress: bool = True
    """A progress bar, where there is a terminal; log lines otherwise."""
    dry_run: bool = False
    """Reads the data, takes one step, samples, and writes nothing."""

    def sized(self, shape: tuple[int, int, int]) -> TrainConfig:
        """The same for images of shape (channels, height, width). Raises ValueError where it asks for another."""
        channels, height, width = shape
        size = height if height == width else (height, width)
        for name, ours in (("in_channels", channels), ("img_size", size)):
            asked = getattr(self, name)
            if asked not in (None, ours) and asked != (height, width):
                raise ValueError(f"train: {name} must be {ours}, as the images are, got {asked}")
        return replace(self, in_channels=channels, img_size=self.img_size or size)

    def resolved(self, unsized: bool = False) -> TrainConfig:
        """The same with every None filled from the data set's defaults. Raises ValueError for values that cannot be.

        unsized: the size of the images is not known yet, and patch_size is not held against it.
        """
        defaults = DEFAULTS.get(self.dataset, FOLDER)
        defaults = defaults | {"noise_type": "gaussian" if self.dequantize is None else "uniform"}
        full = replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
        if isinstance(full.transform, str):
            from tarflow_fast.transforms import settle_transform  # here, because it imports torch

            transform, nvp = settle_transform("train", full.transform, full.nvp)
            full = replace(full, transform=transform, nvp=nvp)
        if full.out is None:
            full = replace(full, out=Path("runs") / Path(full.dataset).resolve().name)
        full._check(unsized and self.img_size is None)
        return full

    def _check(self, unsized: bool) -> None:
        def need(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"train: {name} must be {expected}, got {getattr(self, name)}")

        for name, kind in get_type_hints(TrainConfig).items():  # a settings file may hold anything
            need(name, _fits(getattr(self, name), kind), _words(kind))
        for name in COUNTS:
            need(name, getattr(self, name) >= 1, "an int of at least 1")
        for name in ("checkpoint_every", "sample_every", "eval_every", "eval_images", "seed"):
            need(name, getattr(self, name) >= 0, "at least 0")
        for name in ("epochs", "lr"):
            need(name, math.isfinite(getattr(self, name)) and getattr(self, name) > 0, "positive and finite")
        for name in ("noise_std", "lr_final", "weight_decay", "clip"):
            need(name, math.isfinite(getattr(self, name)) and getattr(self, name) >= 0, "finite and at least 0")
        for name in ("drop_label", "warmup"):
            need(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("holdout", "ema"):
            need(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        need("img_size", all(side >= 1 for side in self.sides), "a positive int or two of them")
        fits = unsized or all(side % self.patch_size == 0 for side in self.sides)
        need("patch_size", fits, f"a divisor of {self.img_size}")
        need("channels", self.channels % 64 == 0, "a multiple of 64")
        need("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)")
        alone = self.dequantize is None or self.noise_type == "uniform"
        need("dequantize", alone, "left out where noise_type is gaussian")
        need("stop_at", self.stop_at is None or self.stop_at >= 1, "at least 1")

    @property
    def sides(self) -> tuple[int, ...]:
        """Height and width of the images, or one of them for squares."""
        return (self.img_size,) if isinstance(self.img_size, int) else tuple(self.img_size)

    def learning_rate(self, step: int, total: int) -> float:
        """Of step 0..total-1: up to `lr` in the first `warmup` share of the steps, then down to `lr_final`.

        cosine: rise lr * (step + 1) / n, n = warmup steps.  onecycle: rise from lr / 25 along half a cosine.
        Both: fall lr_final + (lr - lr_final) * (1 + cos(pi t)) / 2, t from 0 to 1 over the remaining steps.
        """
        rise = round(self.warmup * total)
        if step < rise:
            if self.schedule == "cosine":
                return self.lr * (step + 1) / rise
            low = self.lr / 25
            return low + (self.lr - low) * (1 - math.cos(math.pi * step / rise)) / 2
        t = (step - rise) / max(total - 1 - rise, 1)
        return self.lr_final + (self.lr - self.lr_final) * (1 + math.cos(math.pi * t)) / 2

    def command(self) -> str | None:
        """The command line that repeats this run: what differs from the defaults. None where images were passed in."""
        if self.dataset == GIVEN:
            return None
        given, default = self.to_json(), TrainConfig(dataset=self.dataset).resolved().to_json()
        parts = [f"tarflow-fast train --dataset {shlex.quote(self.dataset)}"]
        for name, value in given.items():
            if isinstance(value, bool) and value != default[name]:
                parts.append(f"--{name}" if value else f"--no_{name}")
            elif value != default.get(name) and name != "dataset":
                parts.append(f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
        return " ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values of what the run computes (not of where and how it is carried out)."""
        values = {name: value for name, value in asdict(self).items() if name not in ELSEWHERE}
        if self.dequantize != "variational":  # files of other runs stay as they were before there was such a choice
            del values["dequantize"]
        return json.loads(json.dumps(values))

    def difference(self, other: dict[str, Any]) -> list[str]:
        """Names in FIXED whose value in `other` (a `to_json`) is not ours."""
        ours = self.to_json()
        return [name for name in FIXED if ours.get(name) != other.get(name)]


def _fits(value: object, kind: Any) -> bool:
    """Whether a value is of this type, as the fields of TrainConfig are declared."""
    inside = get_args(kind)
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in inside
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and len(value) == len(inside) and all(map(_fits, value, inside))
    if inside:  # a union
        return any(_fits(value, each) for each in inside)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _words(kind: Any) -> str:
    inside = get_args(kind)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(inside)
    if get_origin(kind) is tuple:
        return f"{len(inside)} values, each {_words(inside[0])}"
    if inside:
        return " or ".join(_words(each) for each in inside if each is not type(None))
    return {bool: "true or false", int: "an int", float: "a number", str: "a text", Path: "a Path"}[kind]


def from_file(path: str | Path) -> TrainConfig:
    """The settings in a .toml or .json file; a run's train.json is read by its "config" table.

    Raises FileNotFoundError, or ValueError naming the file for bad syntax or an unknown name.
    """
    path = Path(path)
    text = path.read_text()
    try:
        if path.suffix == ".toml":
            try:
                import tomllib
            except ModuleNotFoundError as error:
                raise ValueError("reading TOML needs Python 3.11; write the same values as .json") from error
            values = tomllib.loads(text)
        else:
            values = json.loads(text)
        values = values.get("config", values) if isinstance(values, dict) else values
        if not isinstance(values, dict):
            raise ValueError("it holds no names and values")
    except ValueError as error:  # both parsers' errors are ValueErrors
        raise ValueError(f"train: cannot read the settings in {path}: {error}") from error
    known = {field.name for field in fields(TrainConfig)} - {"config"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"train: {path} sets {unknown[0]}, which is none of {', '.join(sorted(known))}")
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    for name in ("out", "data_root"):
        if isinstance(values.get(name), str):
            values[name] = Path(values[name])
    return replace(TrainConfig(), **values)
