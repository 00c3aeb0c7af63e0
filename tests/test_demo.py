"""The shipped flow and the demo: digits are readable, numbers agree with the reference, and wrong ones are reported."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tarflow_fast.cli import demo, main
from tarflow_fast.data.images import make_grid
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


def test_every_shipped_flow_is_small_and_has_a_card():
    assert {"digits", "fashion"} <= set(SHIPPED)
    for name, folder in SHIPPED.items():
        model, record = open_flow(name)
        assert (folder / "model.safetensors").stat().st_size <= 8_000_000, name
        assert model.num_classes == len(record["data"]["classes"]), name
        card = (folder / "README.md").read_text()
        assert record["command"].split(" --")[1].split()[1] in card and f'open_flow("{name}")' in card, name


def test_demo_draws_checks_and_times(tmp_path, capsys):
    assert main(["demo", "--flow", "digits", "--out", str(tmp_path / "d"), "--repeats", "2", "--seed", "3"]) == 0
    report = capsys.readouterr().out
    rows = [line.split("|") for line in report.splitlines() if line.startswith(("| reference", "| tarflow_fast"))]
    assert len(rows) == 4
    for count, reference, engine in ((1, *rows[:2]), (100, *rows[2:])):
        seconds, speed, ratio, error = (column.strip() for column in engine[2:6])
        assert float(speed) == pytest.approx(count / float(seconds.split()[0]), rel=0.02)
        assert reference[4].strip() == "1.00x"
        fastest, slowest = (float(text.strip("()")) for text in reference[2].split()[1::2])
        ours = [float(text.strip("()")) for text in seconds.split()[1::2]]
        assert fastest / ours[1] * 0.98 <= float(ratio[:-1]) <= slowest / ours[0] * 1.02
        assert float(error) < 1e-3 and report.count("is within the limit") == 2
        said = re.search(rf"(\S+) times as fast at {count} image", report.splitlines()[-1])[1]
        assert abs(float(said) - float(ratio[:-1])) <= 0.056  # one is rounded to tenths, the other to hundredths
    picture = np.asarray(Image.open(tmp_path / "d" / "samples.png"))
    # The flow's own results must be there, pixel for pixel: samples, below them denoised ones at guidance 1 and 3.
    model, _ = open_flow("digits")
    y = torch.arange(10).repeat_interleave(8)
    noise = torch.randn(80, model.num_tokens, model.token_size, generator=torch.Generator().manual_seed(3))
    raw = model.reverse(noise, y, guidance=1.0)
    strong = model.reverse(noise[8:10], y[8:10], guidance=3.0)
    layout = dict(scale=7, padding=3)
    ((top, left),) = places(picture, make_grid(raw, 8, **layout).numpy())
    weak, strong = (make_grid(model.denoise(x, y[8:10], noise_std=0.1), 2, **layout) for x in (raw[8:10], strong))
    beside, below = places(picture, weak.numpy())
    assert beside[0] == top + 59 and beside[1] > left + 8 * 59  # row 1 of the denoised panel, and the third row below
    assert below[0] > top + 10 * 59 and places(picture, strong.numpy()) == [(below[0] + 2 * 59, below[1])]


def places(picture, part):
    """Every (top, left) of part in picture, from top to bottom."""
    height, width = part.shape[:2]
    middle, found = part[height // 2].tobytes(), []
    for top in range(picture.shape[0] - height + 1):
        at = picture[top + height // 2].tobytes().find(middle)
        while at >= 0:
            if np.array_equal(picture[top : top + height, at // 3 : at // 3 + width], part):
                found.append((top, at // 3))
            at = picture[top + height // 2].tobytes().find(middle, at + 1)
    return found


def test_demo_rings_when_the_numbers_are_off(tmp_path, capsys, monkeypatch):
    reverse = TarFlow.reverse

    def off(self, x, *args, **kwargs):
        return reverse(self, x * (1 + 1e-3), *args, **kwargs)

    monkeypatch.setattr(TarFlow, "reverse", off)
    assert main(["demo", "--flow", "digits", "--out", str(tmp_path), "--repeats", "1"]) == 1
    assert "is ABOVE the limit" in capsys.readouterr().out


def test_demo_draws_a_flow_without_classes(tmp_path):
    """There is then no guidance, and no noise is taken off where none is known."""
    torch.manual_seed(0)
    TarFlow(3, 8, 4, 64, 2, 1).save_pretrained(tmp_path / "flow")
    _, ok = demo.demo(tmp_path, flow=str(tmp_path / "flow"), repeats=1)
    grid = (8 * 59 + 3, 10 * 59 + 3)
    assert ok and Image.open(tmp_path / "samples.png").size == (2 * grid[0] + 24 + 2 * 16, grid[1] + 2 * 29 + 2 * 16)


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
    timings, last = demo.interleaved([lambda: calls.append("a"), lambda: calls.append("b") or len(calls)], 3)
    assert calls == list("abababab") and last == [None, 8]  # one turn is not timed, then three are
    assert [len(timing.seconds) for timing in timings] == [3, 3]
    assert demo.Timing([3.0, 1.0, 2.0]).median == 2.0


@pytest.mark.parametrize("seconds, turns", [(1.0, 7), (11.0, 2), (9.0, 3), (50.0, 1)])
def test_turns_end_within_the_budget(seconds, turns, monkeypatch):
    """The untimed turn counts as well: of 40 seconds, four turns of 9 take 36. One is timed at any price."""
    now = [0.0]
    monkeypatch.setattr(demo.time, "perf_counter", lambda: now[0])

    def work():
        now[0] += seconds

    (timing,), _ = demo.interleaved([work], 7)
    assert timing.seconds == [seconds] * turns


def test_demo_trains_afresh(tmp_path, monkeypatch, capsys):
    from tarflow_fast.training import config

    quick = {**config.DIGITS, "epochs": 0.1, "channels": 64, "num_blocks": 1, "layers_per_block": 1}
    monkeypatch.setitem(config.DEFAULTS, "digits", quick)
    _, ok = demo.demo(tmp_path, train=True, repeats=1)
    assert ok and (tmp_path / "samples.png").is_file()
    record = json.loads((tmp_path / "run" / "model" / "train.json").read_text())
    assert record["result"]["steps"] == record["result"]["of"] == 3


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(repeats=0), "demo: repeats must be at least 1, got 0"),
        (
            dict(train=True, flow="fashion"),
            "demo: flow must be digits with train, which trains for two minutes, got fashion",
        ),
    ],
)
def test_bad_arguments(tmp_path, changes, message):
    with pytest.raises(ValueError) as raised:
        demo.demo(tmp_path / "d", **changes)
    assert str(raised.value) == message and not (tmp_path / "d").exists()
