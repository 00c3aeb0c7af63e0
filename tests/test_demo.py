"""The shipped flow and the demo: digits are readable, numbers agree with the reference, and wrong ones are reported."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow_fast.cli import demo, main
from tarflow_fast.flows import SHIPPED, open_flow, training_noise
from tarflow_fast.model import TarFlow
from tarflow_fast.verify.rule import largest_error_and_bound

FOLDER = SHIPPED["digits"]


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def test_shipped_flow_is_small_and_says_where_it_is_from():
    assert (FOLDER / "model.safetensors").stat().st_size < 4_000_000
    model, record = open_flow("digits")
    assert model.var.dtype == torch.float32 and model.num_classes == 10
    assert record["command"].startswith("tarflow-fast train --dataset digits")
    assert record["result"]["steps"] == record["result"]["of"]
    assert training_noise(record) == 0.1
    for name in ("patch_size", "channels", "num_blocks", "layers_per_block", "nvp"):
        assert record["config"][name] == model.config[name]
    assert "UCI Machine Learning Repository" in (FOLDER / "README.md").read_text()


def test_shipped_flow_draws_readable_digits_and_denoising_cleans_them():
    """A classifier of real digits reads the samples, and denoised samples lie nearer to real digits than raw ones."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    real = load_digits()
    reader = SVC(gamma=0.001).fit(real.data, real.target)
    model, _ = open_flow("digits")
    y = torch.arange(10).repeat_interleave(20)
    raw = model.sample(200, y, guidance=1.0, seed=1)
    clean = model.denoise(raw, y, noise_std=0.1)

    def pixels(x):
        return ((x + 1) * 8).flatten(1).double().numpy()

    right = reader.predict(pixels(clean)) == y.numpy()
    assert right.mean() >= 0.9
    assert min(right[y.numpy() == label].mean() for label in range(10)) >= 0.6
    nearest = [np.linalg.norm(pixels(x)[:, None] - real.data[None], axis=2).min(1) for x in (raw, clean)]
    assert (nearest[1] < nearest[0]).mean() > 0.95
    # Ink is white and paper is black. Denoising must take the noise of 0.1 off the paper.
    paper = pixels(raw) < 1.0
    assert pixels(clean)[paper].std() < 0.7 * pixels(raw)[paper].std()


def test_demo_draws_checks_and_times(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "d"), "--repeats", "2", "--seed", "3"]) == 0
    report = capsys.readouterr().out
    rows = [line.split("|") for line in report.splitlines() if line.startswith(("| reference", "| tarflow_fast"))]
    assert len(rows) == 2
    seconds, speed, ratio, error = (column.strip() for column in rows[1][2:6])
    median = float(seconds.split()[0])
    assert float(speed) == pytest.approx(100 / median, rel=0.01) and rows[0][4].strip() == "1.00x"
    fastest, slowest = (float(text.strip("()")) for text in rows[0][2].split()[1::2])
    ours = [float(text.strip("()")) for text in seconds.split()[1::2]]
    assert fastest / ours[1] * 0.98 <= float(ratio[:-1]) <= slowest / ours[0] * 1.02
    assert float(error) < 1e-3 and "is within the limit" in report
    picture = np.asarray(Image.open(tmp_path / "d" / "samples.png"))
    assert picture.shape == (40 + 10 * 52 + 4 + 16, 3 * (10 * 52 + 4) + 4 * 16, 3)
    # The middle panel must show the flow's own result, pixel for pixel.
    model, _ = open_flow("digits")
    y = torch.arange(10).repeat_interleave(10)
    noise = torch.randn(100, model.num_tokens, model.token_size, generator=torch.Generator().manual_seed(3))
    grid = demo.make_grid(model.reverse(noise, y, guidance=1.0), 10, scale=6, padding=4)
    assert np.array_equal(picture[40:564, 16 + 524 + 16 :][:, :524], grid.numpy())


def test_demo_rings_when_the_numbers_are_off(tmp_path, capsys, monkeypatch):
    reverse = TarFlow.reverse

    def off(self, x, *args, **kwargs):
        return reverse(self, x * (1 + 1e-3), *args, **kwargs)

    monkeypatch.setattr(TarFlow, "reverse", off)
    assert main(["demo", "--out", str(tmp_path), "--repeats", "1"]) == 1
    assert "is ABOVE the limit" in capsys.readouterr().out


def test_limit_of_agreement():
    """The limit is twice PyTorch's own error plus two float32 steps (ulp) at the largest value."""
    eps, truth = torch.finfo(torch.float32).eps, torch.tensor([1.0, -0.25], dtype=torch.float64)

    def agree(ours, theirs):
        got, plain = (truth + torch.tensor([0.0, off], dtype=torch.float64) for off in (ours, theirs))
        error, limit = largest_error_and_bound(got.float(), truth, plain.float())
        return demo.Agreement(ours=error, reference=theirs, between=0.0, limit=limit).ok

    assert agree(2e-6, 1e-6) and not agree(2e-6 + 3 * eps, 1e-6)
    assert agree(2 * eps, 0.0) and not agree(3 * eps, 0.0) and not agree(float("nan"), 1e-6)


def test_both_are_timed_by_turns():
    calls = []
    timings = demo.interleaved([lambda: calls.append("a"), lambda: calls.append("b")], 3)
    assert calls == list("abababab")  # one turn is not timed, then three are
    assert [len(timing.seconds) for timing in timings] == [3, 3]
    assert demo.Timing([3.0, 1.0, 2.0]).median == 2.0


def test_demo_trains_afresh(tmp_path, monkeypatch, capsys):
    from tarflow_fast.training import config

    quick = {**config.DIGITS, "epochs": 0.1, "channels": 64, "num_blocks": 1, "layers_per_block": 1}
    monkeypatch.setattr(config, "DIGITS", quick)
    _, ok = demo.demo(tmp_path, train=True, repeats=1)
    assert ok and (tmp_path / "samples.png").is_file()
    record = json.loads((tmp_path / "run" / "model" / "train.json").read_text())
    assert record["result"]["steps"] == record["result"]["of"] == 3


@pytest.mark.parametrize("changes, message", [(dict(repeats=0), "demo: repeats must be at least 1, got 0")])
def test_bad_arguments(tmp_path, changes, message):
    with pytest.raises(ValueError) as raised:
        demo.demo(tmp_path / "d", **changes)
    assert str(raised.value) == message and not (tmp_path / "d").exists()
