"""Training with learned noise: one loss, resumed to the bit, kept in best/ and model/, measured by `evaluate`."""

import json
import math

import numpy as np
import pytest
import torch
from training import metrics, tiny, tiny_flags, trainer_of

from tarflow_fast import TarFlow
from tarflow_fast.checkpoint import DEQUANTIZER
from tarflow_fast.cli import main
from tarflow_fast.data import (
    UniformDequantizer,
    VariationalDequantizer,
    generator,
    load_array,
    load_digits,
)
from tarflow_fast.evaluate import evaluate
from tarflow_fast.flows import open_dequantizer
from tarflow_fast.training import fit, train
from tarflow_fast.training.config import from_file
from tarflow_fast.training.parallel import Workers
from tarflow_fast.training.trainer import CHECKPOINT


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def variational(out, **changes):
    return tiny(out, dequantize="variational", **changes)


def test_it_begins_where_uniform_noise_does(tmp_path):
    """The first step has the same loss and bits, and the gradient reaches the dequantiser."""
    uniform, learned = trainer_of(tiny(tmp_path, noise_type="uniform")), trainer_of(variational(tmp_path))
    lines = [trainer.step(0, *trainer.read(0))[0] for trainer in (uniform, learned)]
    for name in ("loss", "bits_per_dim"):
        assert lines[1][name] == pytest.approx(lines[0][name], abs=1e-5)
    assert lines[1]["grad_norm"] > lines[0]["grad_norm"] * (1 + 1e-6)
    assert uniform.averaged_dequantizer is None and isinstance(uniform.noisy_flow.dequantizer, UniformDequantizer)


def test_the_loss_is_the_bound(tmp_path):
    """bits_per_dim of a step is -log2 p(x + u) + log2 q(u | x) a dimension, as the flow and the noise say."""
    train(variational(tmp_path, epochs=0.3, drop_label=0.0, lr=5e-3))
    trainer = trainer_of(variational(tmp_path, epochs=0.3, drop_label=0.0, lr=5e-3))
    trainer.resume()
    drawn, noise, labels = trainer.drawn(7, *trainer.read(7))
    with torch.no_grad():
        u, log_q = trainer.noisy_flow.dequantizer(drawn, noise, 17)
        x = (drawn + u) * (2 / 17) - 1
        nats = trainer.model.log_prob(x, labels) - log_q
        assert log_q.abs().mean() > 0.01
        torch.testing.assert_close(trainer.noisy_flow.dequantizer.log_prob(drawn, u, 17), log_q, rtol=1e-3, atol=1e-2)
    line, _ = trainer.step(7, *trainer.read(7))
    assert line["bits_per_dim"] == pytest.approx(-nats.mean().item() / 64 / math.log(2) + math.log2(17 / 2), rel=1e-5)


def test_ranks_and_parts_share_one_batch(tmp_path):
    trainer = trainer_of(variational(tmp_path, drop_label=0.5, flip=True))
    whole = trainer.drawn(5, *trainer.read(5))
    parts = []
    for rank in range(4):
        trainer.me = Workers(rank, 4, torch.device("cpu"))
        parts.append(trainer.drawn(5, *trainer.read(5)))
    for mine, theirs in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(mine, torch.cat(theirs))
    one, four = (trainer_of(variational(tmp_path, accumulate=n)) for n in (1, 4))
    lines = [trainer.step(0, *trainer.read(0))[0] for trainer in (one, four)]
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-6)
    assert lines[0]["grad_norm"] == pytest.approx(lines[1]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("changes", [dict(accumulate=2, flip=True, ema=0.9), dict(nvp=False, precision="bf16")])
def test_resumed_run_is_bit_for_bit_the_straight_one(tmp_path, changes):
    settings = dict(holdout=0.1, eval_every=2, eval_images=20, **changes)
    train(variational(tmp_path / "straight", stop_at=6, **settings))
    train(variational(tmp_path / "resumed", stop_at=3, **settings))
    torch.randn(3)  # other draws in between must not matter
    train(variational(tmp_path / "resumed", stop_at=6, **settings))
    files = [CHECKPOINT, *(f"{folder}/{name}" for folder in ("model", "best") for name in
                           ("model.safetensors", "config.json", DEQUANTIZER))]  # fmt: skip
    for name in files:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    names = ("step", "loss", "lr", "grad_norm", "bits_per_dim")
    assert metrics(tmp_path / "resumed", *names) == metrics(tmp_path / "straight", *names)


def test_the_folder_holds_what_was_measured(tmp_path):
    """best/ has the flow and the noise whose bits on held-out images the record tells."""
    settings = dict(holdout=0.1, eval_every=10, eval_images=40, stop_at=25, lr=5e-3)
    run = train(variational(tmp_path, **settings))
    for folder in (tmp_path / "best", tmp_path / "model"):
        record = json.loads((folder / "train.json").read_text())
        flow, made = TarFlow.from_pretrained(folder), open_dequantizer(folder)
        _, held_out = load_digits().split(0.1)
        chosen = torch.randperm(len(held_out), generator=generator(0, "eval"))[:40]
        bits = evaluate(flow, held_out.subset(chosen.sort().values), batch_size=32, dequantizer=made).mean
        assert bits == pytest.approx(record["result"]["heldout_bits_per_dim"], abs=1e-5)
        assert record["config"]["dequantize"] == "variational" and record["config"]["noise_type"] == "uniform"
        assert "--noise_type uniform --dequantize variational" in record["command"]
    same = open_dequantizer(tmp_path)  # the run's folder, too
    assert all(torch.equal(value, run.dequantizer.state_dict()[name]) for name, value in same.state_dict().items())
    again = from_file(tmp_path / "model" / "train.json")
    assert again.dequantize == "variational"


def test_it_goes_on_from_a_flow_and_its_noise(tmp_path):
    first = train(variational(tmp_path / "first", stop_at=20, lr=5e-3))
    free = {name: None for name in ("patch_size", "channels", "num_blocks", "layers_per_block")}
    settings = dict(start=str(tmp_path / "first"), stop_at=1, lr=1e-9, warmup=0.0, ema=0.0, weight_decay=0.0, **free)
    second = train(variational(tmp_path / "second", **settings))
    for name, value in first.dequantizer.state_dict().items():
        torch.testing.assert_close(second.dequantizer.state_dict()[name], value, rtol=0, atol=1e-7)
    assert max(value.abs().max() for name, value in first.dequantizer.state_dict().items() if "proj_out" in name) > 1e-3


def test_a_later_uniform_run_leaves_no_foreign_noise_behind(tmp_path):
    train(variational(tmp_path, stop_at=1))
    assert (tmp_path / "model" / DEQUANTIZER).is_file()
    with pytest.raises(ValueError, match=r"was trained with dequantize variational, this run has None"):
        train(tiny(tmp_path, stop_at=2, noise_type="uniform"))
    run = train(tiny(tmp_path, stop_at=1, noise_type="uniform", resume="none"))
    assert not (tmp_path / "model" / DEQUANTIZER).exists()
    assert run.dequantizer is None and open_dequantizer(tmp_path) is None


def test_files_of_uniform_runs_do_not_know_of_it(tmp_path):
    """Their settings are what they were before there was such a choice, and such checkpoints go on."""
    named, plain = tiny(tmp_path, dequantize="uniform").resolved(), tiny(tmp_path, noise_type="uniform").resolved()
    assert named.to_json() == plain.to_json() and "dequantize" not in named.to_json()
    assert named.noise_type == "uniform" and tiny(tmp_path).resolved().noise_type == "gaussian"
    train(tiny(tmp_path / "one", noise_type="uniform", stop_at=2))
    train(tiny(tmp_path / "two", dequantize="uniform", stop_at=1))
    train(tiny(tmp_path / "two", noise_type="uniform", stop_at=2))
    assert (tmp_path / "one" / CHECKPOINT).read_bytes() == (tmp_path / "two" / CHECKPOINT).read_bytes()
    assert b"dequantize" not in (tmp_path / "one" / CHECKPOINT).read_bytes()


def test_fit_trains_a_dequantizer_where_it_is(tmp_path):
    torch.manual_seed(0)
    flow = TarFlow(1, 8, 4, 64, 2, 1)
    images = torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8)
    made = VariationalDequantizer.of(flow, channels=128)
    settings = dict(batch_size=32, epochs=2.0, log_every=1, checkpoint_every=0, curve=False, lr=2e-3)
    run = fit(flow, images, dequantize="variational", dequantizer=made, out=tmp_path, **settings)
    kept = VariationalDequantizer.load(run.model)
    assert kept.config["channels"] == 128
    for name, value in made.state_dict().items():
        assert torch.equal(value, kept.state_dict()[name])
    assert not torch.equal(made.context.proj_out.weight, torch.zeros_like(made.context.proj_out.weight))
    fresh = fit(flow, images, dequantize="variational", **settings)
    assert fresh.dequantizer.config["channels"] == 64 and fresh.model is None
    for changes, error, message in (
        (dict(dequantize="uniform"), ValueError, "dequantizer must come with dequantize='variational', got 'uniform'"),
        (dict(), ValueError, "dequantizer must come with dequantize='variational', got None"),
        (
            dict(dequantizer=3, dequantize="variational"),
            TypeError,
            "dequantizer must be a VariationalDequantizer, got int",
        ),
        (
            dict(dequantizer=VariationalDequantizer(1, 8, 4).double(), dequantize="variational"),
            ValueError,
            "dequantizer must be float32, got torch.float64",
        ),
        (
            dict(dequantizer=VariationalDequantizer(1, 4, 4), dequantize="variational"),
            ValueError,
            "dequantizer must be for images of shape (1, 8, 8), got (1, 4, 4)",
        ),
    ):
        with pytest.raises(error) as raised:
            fit(flow, images, **settings | dict(dequantizer=made) | changes)
        assert str(raised.value) == f"fit: {message}"


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dequantize="learned"), "train: dequantize must be one of uniform, variational, got learned"),
        (
            dict(dequantize="variational", noise_type="gaussian"),
            "train: dequantize must be left out where noise_type is gaussian, got variational",
        ),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ValueError) as raised:
        train(tiny(tmp_path / "run", **changes))
    assert str(raised.value) == message and not (tmp_path / "run").exists()


def test_a_checkpoint_without_its_noise_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    train(variational(tmp_path, stop_at=1))
    path = tmp_path / CHECKPOINT
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = {name: value for name, value in load_file(path).items() if not name.startswith("dequantizer_ema")}
    save_file(tensors, path, metadata=header)
    with pytest.raises(ValueError, match=r"does not fit: dequantizer_ema\.context\."):
        train(variational(tmp_path, stop_at=2))


# ---------------------------------------------------------------- the command line


def test_the_command_line_trains_and_evaluates(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(tiny_flags("run", dequantize="variational", stop_at=12, lr=5e-3)) == 0
    images = load_digits()
    np.savez("part.npz", x=images.images[:30].numpy(), y=images.labels[:30].numpy())
    capsys.readouterr()

    def bits(*flags):
        code = main(["evaluate", "run", "--dataset", "digits", "--classify", "0", "--device", "cpu", *flags])
        out, err = capsys.readouterr()
        line = next((each for each in out.splitlines() if each.startswith("bits/dim")), "")
        return code, line, err

    code, line, _ = bits()
    flow, made = TarFlow.from_pretrained("run"), open_dequantizer("run")
    expected = evaluate(flow, images, dequantizer=made).mean
    assert code == 0 and float(line.split()[1]) == pytest.approx(expected, abs=6e-5)
    assert line.endswith("1797 images, variational dequantisation")
    _, uniform, _ = bits("--dequantize", "uniform")
    assert float(uniform.split()[1]) == pytest.approx(evaluate(flow, images).mean, abs=6e-5)
    assert uniform.endswith("1797 images")
    _, weighted, _ = bits("--importance", "4")
    assert weighted.endswith("1797 images, variational dequantisation, importance-weighted over 4")
    assert float(weighted.split()[1]) < float(line.split()[1])
    assert bits("--importance", "0") == (2, "", "error: evaluate: importance must be >= 1, got 0\n")
    (tmp_path / "run" / "model" / DEQUANTIZER).unlink()
    code, _, err = bits("--dequantize", "variational")
    assert (
        code == 2 and err == "error: evaluate: dequantize 'variational' needs a flow with a dequantiser, run has none\n"
    )


def test_score_measures_with_the_noise_of_the_flow(tmp_path, capsys):
    train(variational(tmp_path / "run", stop_at=12, lr=5e-3))
    images = load_digits()
    for name, rows in (("own.npz", slice(0, 20)), ("other.npz", slice(20, 40))):
        np.savez(tmp_path / name, x=images.images[rows].numpy())
    own, other = (load_array(tmp_path / name) for name in ("own.npz", "other.npz"))
    assert main(["score", str(tmp_path / "run"), "--data", str(own.source), "--against", str(other.source)]) == 0
    told = [float(line.split("bits/dim ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()[:2]]
    flow, made = TarFlow.from_pretrained(tmp_path / "run"), open_dequantizer(tmp_path / "run")
    for bits, part in zip(told, (own, other), strict=True):
        assert bits == pytest.approx(evaluate(flow, part, dequantizer=made, conditional=False).mean, abs=6e-5)
        assert abs(bits - evaluate(flow, part, conditional=False).mean) > 1e-4
