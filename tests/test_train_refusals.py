"""Training refuses some settings, devices, checkpoints and losses, each with a message that says why."""

import math
import re

import pytest
import torch
from training import metrics, tiny

from tarflow_fast.training.config import FIXED, from_file
from tarflow_fast.training.run import train
from tarflow_fast.training.trainer import CHECKPOINT


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Uses one thread, because such small models get slower with more, above all when tests run in parallel."""
    threads(1)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(channels=100), "train: channels must be a multiple of 64, got 100"),
        (dict(patch_size=3), "train: patch_size must be a divisor of 8, got 3"),
        (dict(drop_label=1.5), "train: drop_label must be between 0 and 1, got 1.5"),
        (dict(lr=math.nan), "train: lr must be positive and finite, got nan"),
        (dict(lr="fast"), "train: lr must be a number, got fast"),
        (dict(noise_type="gauss"), "train: noise_type must be one of gaussian, uniform, got gauss"),
        (dict(precision="int8"), "train: precision must be one of fp32, bf16, got int8"),
        (dict(schedule="linear"), "train: schedule must be one of cosine, onecycle, got linear"),
        (dict(flip="false"), "train: flip must be true or false, got false"),
        (dict(betas=0.9), "train: betas must be 2 values, each a number, got 0.9"),
        (dict(img_size=8.0), "train: img_size must be an int or 2 values, each an int, got 8.0"),
        (dict(seed=True), "train: seed must be an int, got True"),
        (dict(save_dtype="fp16"), "train: save_dtype must be one of float32, float16, bfloat16, got fp16"),
        (dict(transform=3), "train: transform must be a text, got 3"),
        (dict(ema=1.0), "train: ema must be in [0, 1), got 1.0"),
        (dict(batch_size=0), "train: batch_size must be an int of at least 1, got 0"),
        (
            dict(batch_size=32, accumulate=3),
            "train: batch_size must be a multiple of processes * accumulate = 1 * 3, got 32",
        ),
        (dict(epochs=-1.0), "train: epochs must be positive and finite, got -1.0"),
        (dict(stop_at=0), "train: stop_at must be at least 1, got 0"),
        (dict(device="gpu9"), "train: device must be auto, cpu, cuda or cuda:<number>, got 'gpu9'"),
        (dict(img_size=16), "load_digits: digits are 8x8 with 1 channel, got img_size 16 and in_channels 1"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ValueError) as raised:
        train(tiny(tmp_path / "run", **changes))
    assert str(raised.value) == message
    assert not (tmp_path / "run").exists()


def test_a_settings_file_that_is_no_table(tmp_path):
    path = tmp_path / "settings.json"
    for text in ("[1]", '{"config": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^train: cannot read the settings in .*: it holds no names and values$"):
            from_file(path)


def test_a_run_that_is_over_says_so(tmp_path, caplog):
    settings = dict(epochs=0.5, out=tmp_path / "run")
    train(tiny(**settings))
    with caplog.at_level("INFO", "tarflow_fast"):
        train(tiny(**settings))
    assert re.search(r"nothing is left to train: .* has (\d+) steps, this run \1", caplog.text)
    assert "continuing" not in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"^train: device 'cuda' was asked for, and torch .* sees no GPU$"):
        train(tiny(tmp_path / "run", device="cuda"))


@pytest.mark.parametrize("name, value", [("noise_std", 0.2), ("batch_size", 64), ("channels", 128), ("seed", 1)])
def test_another_runs_checkpoint_is_refused(tmp_path, name, value):
    train(tiny(tmp_path, stop_at=1))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    was = tiny(tmp_path).resolved().to_json()[name]
    with pytest.raises(ValueError) as raised:
        train(tiny(tmp_path, stop_at=2, **{name: value}))
    assert str(raised.value) == (
        f"train: {tmp_path / CHECKPOINT} was trained with {name} {was}, this run has {value}; "
        "--resume none starts afresh, another --out keeps both"
    )
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert name in FIXED
    assert train(tiny(tmp_path, stop_at=1, resume="none", **{name: value})).steps == 1


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    train(tiny(tmp_path, stop_at=1))
    path = tmp_path / CHECKPOINT
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
        error, message = ValueError, f"train: cannot read the checkpoint {path}: "
    elif damage == "foreign":
        path.write_bytes((tmp_path / "model" / "model.safetensors").read_bytes())
        error, message = ValueError, f"train: {path} is no training checkpoint of format 1"
    else:
        path = tmp_path / "other.safetensors"
        error, message = FileNotFoundError, f"train: there is no checkpoint {path}"
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(error) as raised:
        train(tiny(tmp_path, stop_at=2, resume=str(path)))
    assert str(raised.value).startswith(message)
    assert (path.read_bytes() if path.exists() else None) == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    train(tiny(tmp_path, stop_at=2))
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(FloatingPointError, match=r"^train: not finite at step 4 of 57: loss (nan|inf), gradient norm "):
        train(tiny(tmp_path, lr=1e30, warmup=0.0))
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert [step for (step,) in metrics(tmp_path, "step")] == [1, 2, 3]
    assert train(tiny(tmp_path, stop_at=3)).steps == 3  # the run can go on
