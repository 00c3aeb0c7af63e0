"""Training as people expect it: fit(model, data), held-out bits and the best flow, the plan, the curve, a slow bf16."""

import json
import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image
from training import metrics, tiny, trainer_of, write_image

from tarflow_fast import data, native
from tarflow_fast.data import ImageSet
from tarflow_fast.evaluate import evaluate
from tarflow_fast.model import TarFlow
from tarflow_fast.training import fit, train
from tarflow_fast.training.config import TrainConfig
from tarflow_fast.training.report import TIMED, draw_curve, duration
from tarflow_fast.training.trainer import CHECKPOINT


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


SETTINGS = dict(batch_size=32, epochs=1.0, log_every=1, checkpoint_every=0, sample_every=0, curve=False, lr=2e-3)


def flow(**changes) -> TarFlow:
    torch.manual_seed(0)
    arguments = dict(in_channels=1, img_size=8, patch_size=4, channels=64, num_blocks=2, layers_per_block=1)
    return TarFlow(**arguments | changes)


def grey(count=64, seed=0) -> torch.Tensor:
    return torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- fit


def test_fit_is_train(tmp_path):
    """The same weights, bit for bit, as `train` from the same start on the same images and settings."""
    digits = data.load_digits()
    trained = train(tiny(tmp_path / "train", stop_at=4))
    model = flow(num_classes=10)
    config = tiny(tmp_path).resolved().to_json()
    free = ("noise_std", "drop_label", "batch_size", "epochs", "lr", "schedule", "warmup", "ema", "log_every")
    settings = {name: config[name] for name in free}
    run = fit(model, digits, out=tmp_path / "fit", stop_at=4, curve=False, **settings)
    assert (run.steps, run.total) == (trained.steps, trained.total) == (4, 57)
    mine, theirs = (TarFlow.from_pretrained(each.model).state_dict() for each in (run, trained))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert all(torch.equal(value, mine[name]) for name, value in model.state_dict().items())
    assert metrics(tmp_path / "fit", "loss") == metrics(tmp_path / "train", "loss")
    assert json.loads((run.model / "train.json").read_text())["command"] is None


def test_fit_writes_nothing_unless_told_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, start = flow(), flow().state_dict()
    run = fit(model, grey(), stop_at=2, **SETTINGS)
    assert run.model is None and run.steps == 2 and not [*tmp_path.iterdir()]
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, start[name])]
    assert "blocks.0.proj_in.weight" in changed and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_fit_continues(tmp_path):
    whole = fit(flow(), grey(), out=tmp_path / "whole", stop_at=4, **SETTINGS | {"epochs": 3.0})
    for stop_at in (2, 4):
        model = flow()
        part = fit(model, grey(), out=tmp_path / "parts", stop_at=stop_at, **SETTINGS | {"epochs": 3.0})
    assert part.steps == 4 == whole.steps
    assert (tmp_path / "parts" / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()


def test_fit_learns_what_the_data_is():
    """Images of one grey level: bits/dim fall far below the 8 bits of bytes that may be anything."""
    images = torch.full((32, 1, 8, 8), 200, dtype=torch.uint8)
    model = flow()
    before = model.bits_per_dim(images[:8], seed=0).mean().item()
    run = fit(model, images, held_out=images[:8], noise_type="uniform", **SETTINGS | {"epochs": 60.0, "ema": 0.5})
    after = model.bits_per_dim(images[:8], seed=0).mean().item()
    assert after < before - 3 and after < 5
    assert run.result["heldout_bits_per_dim"] == pytest.approx(after, abs=0.2)


class Letters(torch.utils.data.Dataset):
    classes = ("a", "b", "c")

    def __len__(self):
        return 48

    def __getitem__(self, index):
        return grey()[index].float() / 255, index % 3


@pytest.mark.parametrize("num_classes", [3, 4, 0])
def test_fit_takes_torch_data_sets(tmp_path, num_classes):
    run = fit(flow(num_classes=num_classes), Letters(), out=tmp_path, stop_at=1, **SETTINGS)
    record = json.loads((run.model / "train.json").read_text())["data"]
    names = {3: ["a", "b", "c"], 4: ["0", "1", "2", "3"], 0: []}[num_classes]
    assert record == {"source": "fit", "images": 48, "levels": 256, "classes": names}


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(images=grey()[:, :, :4]), ValueError, "fit: images must have the model's shape (N, 1, 8, 8), got "
         "(N, 1, 4, 8)"),
        (dict(held_out=grey().expand(-1, 3, -1, -1)), ValueError, "fit: held_out must have the model's shape "
         "(N, 1, 8, 8), got (N, 3, 8, 8)"),
        (dict(images=(grey(), torch.arange(64))), ValueError, "fit: labels of images must be below the model's "
         "num_classes = 3, got 63"),
        (dict(images=grey().float()), ValueError, "fit: images must be uint8, or floats k / 255 "),
        (dict(images=None), TypeError, "fit: data must be a tensor, "),
        (dict(model=torch.nn.Linear(2, 2)), TypeError, "fit: model must be a TarFlow, got Linear"),
        (dict(model=flow().double()), ValueError, "fit: model must be float32 "),
        (dict(learning_rate=1.0), TypeError, "fit: settings must be among "),
        (dict(channels=64), TypeError, "fit: settings must be among "),
        (dict(lr=-1.0), ValueError, "train: lr must be positive and finite, got -1.0"),
    ],
)  # fmt: skip
def test_fit_refuses(tmp_path, change, error, message):
    arguments = dict(model=flow(num_classes=3), images=grey(), out=tmp_path / "run") | SETTINGS | change
    with pytest.raises(error) as raised:
        fit(**arguments)
    assert str(raised.value).startswith(message) and not [*tmp_path.iterdir()]


# ---------------------------------------------------------------- sizes that the data brings


def test_train_takes_the_size_of_an_array(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 6, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", x=pixels, y=np.arange(40) % 5)
    settings = dict(dataset=str(tmp_path / "set.npz"), patch_size=2, stop_at=1)
    run = train(tiny(tmp_path / "run", **settings))
    model = TarFlow.from_pretrained(run.model)
    assert model.config["img_size"] == [6, 8] and model.config["in_channels"] == 3 and model.num_classes == 5
    record = json.loads((run.model / "train.json").read_text())
    assert record["command"].startswith(
        f"tarflow-fast train --dataset {tmp_path}/set.npz --img_size 6 8 --patch_size 2 "
    )
    for change, message in (
        (dict(img_size=16), "load_dataset: .* must be 16 x 16 with 3 channels as asked for, got 6 x 8 with 3; "),
        (dict(patch_size=4), r"train: patch_size must be a divisor of \(6, 8\), got 4"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            train(tiny(tmp_path / "other", **settings | change))
    assert not (tmp_path / "other").exists()


def test_bad_settings_are_told_before_the_data_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"^train: channels must be a multiple of 64, got 65$"):
        train(tiny(tmp_path / "run", dataset=str(tmp_path / "missing.npz"), channels=65))


def test_strict_and_data_root_reach_the_data(tmp_path, monkeypatch):
    write_image(tmp_path / "set" / "1.png", np.zeros((8, 8)))
    (tmp_path / "set" / "2.png").write_bytes(b"")
    settings = dict(dataset=str(tmp_path / "set"), img_size=8, in_channels=1, batch_size=4, stop_at=1)
    assert len(trainer_of(tiny(tmp_path / "run", **settings)).data) == 1
    with pytest.raises(ValueError, match=r"^read_image: cannot read .*2.png"):
        train(tiny(tmp_path / "run", strict=True, **settings))
    monkeypatch.setattr("tarflow_fast.data.load.DEBIAN", tmp_path / "debian")
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path}/here, "):
        train(tiny(tmp_path / "run", dataset="fashion-mnist", data_root=tmp_path / "here"))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- held-out bits, the best flow


def test_held_out_bits_are_measured_and_the_best_flow_is_kept(tmp_path):
    config = tiny(tmp_path, holdout=0.1, eval_every=2, stop_at=5, eval_images=50, log_every=10)
    run = train(config)
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    bits = {line["step"]: line["heldout_bits_per_dim"] for line in lines}
    assert list(bits) == [2, 4, 5] and run.result["heldout_bits_per_dim"] == bits[5]
    last, best = TarFlow.from_pretrained(run.model), TarFlow.from_pretrained(tmp_path / "best")
    _, held_out = data.load_digits().split(0.1)
    chosen = torch.randperm(180, generator=data.generator(0, "eval"))[:50].sort().values
    part = held_out.subset(chosen)
    assert evaluate(last, part, batch_size=32).mean == bits[5]
    step = min(bits, key=bits.get)
    assert evaluate(best, part, batch_size=32).mean == bits[step] == min(bits.values())
    assert json.loads((tmp_path / "best" / "train.json").read_text())["result"]["steps"] == step


def test_a_worse_flow_is_not_the_best_even_after_resuming(tmp_path, monkeypatch):
    values = iter([3.0, 2.0, 2.5, 2.2, 1.5])
    monkeypatch.setattr("tarflow_fast.training.trainer.Trainer.evaluate", lambda self: next(values))
    kept = []
    for stop_at in (3, 4, 5):
        train(tiny(tmp_path, holdout=0.1, eval_every=1, stop_at=stop_at))
        result = json.loads((tmp_path / "best" / "train.json").read_text())["result"]
        kept.append((result["steps"], result["heldout_bits_per_dim"]))
    assert kept == [(2, 2.0), (2, 2.0), (5, 1.5)]


@pytest.mark.parametrize("changes", [dict(holdout=0.0), dict(holdout=0.1, eval_every=0)])
def test_nothing_is_measured_without_images_or_when_told_not_to(tmp_path, changes):
    train(tiny(tmp_path, stop_at=1, **changes))
    assert not (tmp_path / "best").exists() and "heldout" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_set_with_its_own_test_part(tmp_path):
    parts = [ImageSet(grey(seed=seed), None, (), 256, "noise") for seed in (0, 1)]
    whole = ImageSet(parts[0].images, None, (), 256, "noise", parts[1])
    config = TrainConfig(
        out=tmp_path, patch_size=4, channels=64, num_blocks=1, layers_per_block=1, curve=False, stop_at=1, batch_size=16
    )
    run = train(config, whole)
    expected = evaluate(TarFlow.from_pretrained(run.model), parts[1], batch_size=16).mean
    assert run.result["heldout_bits_per_dim"] == expected


# ---------------------------------------------------------------- what is told


def test_the_plan_and_the_time_that_is_left(tmp_path, caplog, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("tarflow_fast.training.report.time.perf_counter", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO, "tarflow_fast"):
        train(tiny(tmp_path, holdout=0.1, eval_every=0, log_every=1000, stop_at=TIMED + 30))
    plan = caplog.messages[0]
    assert re.fullmatch(
        r"digits: 1617 images \(180 held out\), 8 x 8 x 1, 10 classes; 0\.\d\d M parameters, 4 tokens; "
        r"50 steps of 32 images, fp32, on 1 x cpu", plan
    ), plan  # fmt: skip
    (left,) = [text for text in caplog.messages if "to go" in text]
    # the clock ticks once where the warm-up ends and once at the estimate: 1 s for 15 steps
    assert left == f"about 2 s to go: 30 steps, {1 / 15:.3g} s a step in the first {TIMED}"


def test_durations_are_words():
    assert [duration(s) for s in (0.1, 99, 100, 5999, 6000, 36000)] == [
        "about 1 s", "about 99 s", "about 2 min", "about 100 min", "about 1.7 h", "about 10.0 h",
    ]  # fmt: skip


def test_the_curve_is_drawn_or_a_note_says_what_it_needs(tmp_path, monkeypatch, caplog):
    pytest.importorskip("matplotlib")
    train(tiny(tmp_path, holdout=0.1, eval_every=2, stop_at=4, curve=True, noise_type="uniform"))
    picture = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB")).reshape(-1, 3).astype(int)
    for name, color in {"loss": (31, 119, 180), "held out": (255, 127, 14), "batches": (44, 160, 44)}.items():
        assert (np.abs(picture - color).max(1) < 8).sum() > 50, name  # matplotlib's first three colours
    (tmp_path / "curve.png").unlink()
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert draw_curve(tmp_path) is False
    with caplog.at_level(logging.INFO, "tarflow_fast"):
        train(tiny(tmp_path, holdout=0.1, stop_at=5, curve=True, noise_type="uniform"))
    assert "curve.png needs matplotlib: pip install 'tarflow-fast[report]'" in caplog.messages
    assert not (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("isa, warns", [("avx512bf16", False), ("avx2", True), (None, True)])
def test_bf16_warns_where_it_is_slow(tmp_path, monkeypatch, caplog, isa, warns):
    monkeypatch.setattr(native, "isa", lambda: isa)
    train(tiny(tmp_path, stop_at=1, precision="bf16"))
    told = [text for text in caplog.messages if text.startswith("train: bf16 is slow here: this CPU (")]
    assert len(told) == warns and (not told or f"({isa or 'no native library'})" in told[0])
