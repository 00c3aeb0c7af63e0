"""Training with transforms other than the affine one: it learns, a run resumes to the same bits, and files carry it."""

import json

import pytest
import torch
from training import metrics, tiny, tiny_flags, trainer_of

from tarflow_fast import TarFlow
from tarflow_fast.cli import main
from tarflow_fast.training.config import TrainConfig
from tarflow_fast.training.run import train

NAMES = ["logistic_mixture:3", "spline:4"]
pytestmark = pytest.mark.filterwarnings("ignore:tarflow_fast inverts block")
every = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Uses one thread, because such small models get slower with more, above all when tests run in parallel."""
    threads(1)


@every
def test_it_learns_and_the_folder_carries_the_transform(tmp_path, name):
    run = train(tiny(tmp_path, transform=name, lr=2e-3))
    losses = [loss for (loss,) in metrics(tmp_path, "loss")]
    assert sum(losses[-10:]) / 10 < losses[0] - 0.5
    flow = TarFlow.from_pretrained(run.model)
    assert flow.config["transform"] == name and flow.config["nvp"] is True
    told = json.loads((tmp_path / "model" / "train.json").read_text())
    assert told["config"]["transform"] == name and f"--transform {name}" in told["command"]
    y = torch.arange(10)
    x = flow.sample(10, y, seed=0)
    z, _, _ = flow(x, y)
    assert torch.isfinite(x).all() and (flow.reverse(z.contiguous(), y) - x).abs().max() < 1e-3


@every
def test_a_resumed_run_has_the_bits_of_the_straight_one(tmp_path, name):
    train(tiny(tmp_path / "straight", transform=name, stop_at=4))
    train(tiny(tmp_path / "resumed", transform=name, stop_at=2))
    assert train(tiny(tmp_path / "resumed", transform=name, stop_at=4)).steps == 4
    for file in ("checkpoint.safetensors", "model/model.safetensors"):
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()


def test_a_run_is_not_continued_with_another_transform(tmp_path):
    train(tiny(tmp_path, transform="spline", stop_at=1))
    for theirs, told in (("affine", None), ("spline:4", "spline:4"), ("logistic_mixture", "logistic_mixture:8")):
        with pytest.raises(ValueError, match=f"was trained with transform spline:8, this run has {told};"):
            train(tiny(tmp_path, transform=theirs, stop_at=2))
    assert train(tiny(tmp_path, transform="spline:8", stop_at=2)).steps == 2


def test_names_that_nvp_tells_are_what_nvp_gives():
    assert TrainConfig(transform="affine").resolved() == TrainConfig().resolved()
    assert TrainConfig(transform="shift").resolved() == TrainConfig(nvp=False).resolved()
    for name, nvp, message in (
        ("affine", False, "train: transform must be shift where nvp is False, got 'affine'"),
        (
            "cubic",
            True,
            "train: transform must be one of affine, shift, logistic_mixture, spline, its sizes after colons",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(transform=name, nvp=nvp).resolved()


def test_the_flag_of_the_command_line(tmp_path):
    assert main([str(each) for each in tiny_flags(tmp_path, transform="spline:3", stop_at=1)]) == 0
    assert TarFlow.from_pretrained(tmp_path / "model").config["transform"] == "spline:3"


def test_a_run_starts_from_a_flow_with_its_transform(tmp_path):
    train(tiny(tmp_path / "first", transform="spline:3", stop_at=1))
    start = str(tmp_path / "first")
    again = TrainConfig(start=start, out=tmp_path / "again", stop_at=1, batch_size=32, sample_every=0, curve=False)
    assert TarFlow.from_pretrained(train(again).model).config["transform"] == "spline:3"
    with pytest.raises(ValueError, match="train: transform must be spline:3, as in the flow to start from, got affine"):
        train(tiny(tmp_path / "other", start=start, transform="affine"))


@every
def test_the_picture_of_samples_goes_without_guidance(tmp_path, name):
    trainer_of(tiny(tmp_path, transform=name)).samples(tmp_path / "samples.png")
    assert (tmp_path / "samples.png").stat().st_size > 500
