"""Training: it resumes exactly, files are whole or absent, and errors come before any damage."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from training import metrics, tiny, trainer_of, write_image

from tarflow_fast.data import load_dataset, sample_order, to_unit
from tarflow_fast.model import TarFlow
from tarflow_fast.net import causal_attention
from tarflow_fast.training.config import TrainConfig, from_file
from tarflow_fast.training.parallel import Workers
from tarflow_fast.training.run import train
from tarflow_fast.training.state import Ema, read_state
from tarflow_fast.training.trainer import CHECKPOINT, nll_per_dim


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Uses one thread, because such small models get slower with more, above all when tests run in parallel."""
    threads(1)


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
def test_learning_rate(schedule, warmup):
    config = TrainConfig(lr=2e-3, lr_final=1e-6, schedule=schedule, warmup=warmup).resolved()
    rates = [config.learning_rate(step, 40) for step in range(40)]
    rise = round(40 * warmup)
    if rise < 40:
        assert rates[rise] == pytest.approx(2e-3) and rates[-1] == pytest.approx(1e-6)
        middle = (rise + 39) / 2
        below, above = config.learning_rate(math.ceil(middle), 40), config.learning_rate(math.floor(middle), 40)
        assert (below + above) / 2 == pytest.approx((2e-3 + 1e-6) / 2)
    if rise:
        assert rates[0] == pytest.approx(2e-3 / rise if schedule == "cosine" else 2e-3 / 25)
    assert rates[:rise] == sorted(rates[:rise]) and rates[rise:] == sorted(rates[rise:], reverse=True)
    assert max(rates) <= 2e-3 * (1 + 1e-12) and min(rates) > 0


def test_an_early_flow_that_overflows_is_drawn_without_a_warning(tmp_path):
    trainer = trainer_of(tiny(tmp_path, noise_type="gaussian", noise_std=0.1))
    with torch.no_grad():
        trainer.ema.model.blocks[0].proj_out.bias.fill_(200.0)  # exp(200) overflows float32
    trainer.samples(tmp_path / "samples.png")  # a warning would fail this test
    assert (tmp_path / "samples.png").stat().st_size > 0


def test_nll_is_the_negative_log_density():
    z, logdets, var = torch.randn(3, 4, 5), torch.randn(3), torch.rand(4, 5) + 0.5
    prior = torch.distributions.Normal(torch.zeros(4, 5).double(), var.double().sqrt())
    expected = -(prior.log_prob(z.double()).sum((1, 2)) / 20 + logdets.double()).mean()
    assert nll_per_dim(z, logdets, var).item() == pytest.approx(expected.item(), rel=1e-5)


def test_ema_follows_the_formula():
    model, averaged = torch.nn.Linear(2, 2).double(), torch.nn.Linear(2, 2).double()
    averaged.load_state_dict(model.state_dict())
    ema = Ema(averaged, 0.25)
    expected = model.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 2, dtype=torch.float64))
        ema.update(model, step)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.model.weight, expected, rtol=1e-14, atol=1e-14)
    assert not ema.model.weight.requires_grad and not ema.model.training


def test_noise_and_labels_are_what_was_asked_for(tmp_path):
    trainer = trainer_of(tiny(tmp_path, batch_size=1024, noise_std=0.2, drop_label=0.25))
    images, labels = trainer.read(3)
    order = sample_order(3 * 1024, 1024, 1797, 0)
    assert torch.equal(images, trainer.data.images[order]) and torch.equal(labels, trainer.data.labels[order])
    x, y = trainer.noisy(3, images, labels)
    noise = (x - to_unit(images, 17)) / 0.2
    n = noise.numel()
    assert abs(noise.mean()) < 5 / n**0.5 and abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    dropped = y == -1
    assert abs(dropped.double().mean() - 0.25) < 5 * (0.25 * 0.75 / 1024) ** 0.5
    assert torch.equal(y[~dropped], labels[~dropped])
    assert torch.equal(trainer.noisy(3, images, labels)[0], x) and not torch.equal(
        trainer.noisy(4, images, labels)[0], x
    )


def test_flip_mirrors_about_half_of_the_images(tmp_path):
    trainer = trainer_of(tiny(tmp_path, batch_size=256, noise_std=0.0, flip=True))
    images, labels = trainer.read(0)
    x, _ = trainer.noisy(0, images, labels)
    clean = to_unit(images, 17)
    kept, mirrored = ((x == side).flatten(1).all(1) for side in (clean, clean.flip(-1)))
    assert (kept | mirrored).all() and 90 < int((mirrored & ~kept).sum()) < 166  # 128 +- 5 standard deviations


def test_uniform_noise_dequantises(tmp_path):
    trainer = trainer_of(tiny(tmp_path, noise_type="uniform"))
    images, labels = trainer.read(0)
    x, _ = trainer.noisy(0, images, labels)
    assert torch.equal(((x + 1) * 17 / 2).floor().byte(), images)


@pytest.mark.parametrize("noise_type", ["gaussian", "uniform"])
def test_ranks_cut_one_global_batch(tmp_path, noise_type):
    trainer = trainer_of(tiny(tmp_path, noise_type=noise_type, drop_label=0.5, flip=True))
    x, y = trainer.noisy(5, *trainer.read(5))
    parts = []
    for rank in range(4):
        trainer.me = Workers(rank, 4, torch.device("cpu"))
        parts.append(trainer.noisy(5, *trainer.read(5)))
    assert torch.equal(torch.cat([part for part, _ in parts]), x)
    assert torch.equal(torch.cat([labels for _, labels in parts]), y) and len(parts[0][0]) == 8


def test_one_step_is_adamw_on_the_loss(tmp_path):
    """A step gives the same as its parts written out: gradient of the mean loss, clipping, AdamW, then the average."""
    config = tiny(tmp_path, accumulate=4, clip=0.5, weight_decay=0.1).resolved()
    trainer = trainer_of(config)
    model = TarFlow(**trainer.model.config)
    model.load_state_dict(trainer.model.state_dict())
    rate = config.learning_rate(0, trainer.total)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)
    images, labels = trainer.read(0)
    x, y = trainer.noisy(0, images, labels)
    z, _, logdets = model(x, y)
    loss = model.get_loss(z, logdets)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    line, _ = trainer.step(0, images, labels)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6) and line["grad_norm"] == pytest.approx(
        norm.item(), rel=1e-5
    )
    assert line["lr"] == rate and line["step"] == 1 and line["epoch"] == pytest.approx(32 / 1797)
    # An Adam step has size lr whatever the gradient, and if the gradient is rounding noise, its sign may differ.
    difference = max(
        (p - q).abs().max().item() for p, q in zip(model.parameters(), trainer.model.parameters(), strict=True)
    )
    assert difference < 0.05 * rate


def test_bits_per_dim_is_the_models_own(tmp_path):
    config = tiny(tmp_path, noise_type="uniform", epochs=0.3, drop_label=0.0)
    train(config)
    trainer = trainer_of(config)
    trainer.resume()
    images, labels = trainer.read(7)
    x, y = trainer.noisy(7, images, labels)
    expected = -trainer.model.log_prob(x, y).mean().item() / 64 / math.log(2) + math.log2(17 / 2)
    line, _ = trainer.step(7, images, labels)
    assert line["bits_per_dim"] == pytest.approx(expected, rel=1e-5)
    first, *_, last = metrics(tmp_path, "bits_per_dim")
    assert last[0] < first[0] - 0.2


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("changes", [dict(accumulate=2, flip=True, ema=0.9), dict(nvp=False, noise_type="uniform")])
def test_resumed_run_is_bit_for_bit_the_straight_one(tmp_path, changes):
    straight = train(tiny(tmp_path / "straight", stop_at=6, **changes))
    assert (straight.steps, straight.total) == (6, 57)
    first = train(tiny(tmp_path / "resumed", stop_at=3, **changes))
    torch.randn(3)  # other draws in between must not matter
    second = train(tiny(tmp_path / "resumed", stop_at=6, **changes))
    assert (first.steps, second.steps) == (3, 6)
    for name in (CHECKPOINT, "model/model.safetensors", "model/config.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    names = ("step", "epoch", "loss", "lr", "grad_norm")
    assert metrics(tmp_path / "resumed", *names) == metrics(tmp_path / "straight", *names)
    assert [step for (step,) in metrics(tmp_path / "resumed", "step")] == [1, 2, 3, 4, 5, 6]


def test_training_leaves_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    train(tiny(tmp_path, stop_at=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_work_lost_after_a_checkpoint_is_repeated_exactly(tmp_path):
    train(tiny(tmp_path, stop_at=2))
    early = (tmp_path / CHECKPOINT).read_bytes()
    train(tiny(tmp_path, stop_at=4))
    late, lines = (tmp_path / CHECKPOINT).read_bytes(), metrics(tmp_path, "step", "loss")
    (tmp_path / CHECKPOINT).write_bytes(early)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # the crash cut this line short
    (tmp_path / f".{CHECKPOINT}.k2j4").write_bytes(b"half")
    train(tiny(tmp_path, stop_at=4))
    assert (tmp_path / CHECKPOINT).read_bytes() == late
    assert metrics(tmp_path, "step", "loss") == lines
    assert not list(tmp_path.glob(".*"))


def test_it_learns_and_the_folder_is_complete(tmp_path):
    run = train(tiny(tmp_path, epochs=2.0, sample_every=100, checkpoint_every=50, log_every=10, save_dtype="float16"))
    assert (run.steps, run.total, run.model) == (113, 113, tmp_path / "model")
    losses = [loss for (loss,) in metrics(tmp_path, "mean_loss")]
    assert losses[-1] < losses[0] - 0.5
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "checkpoint.safetensors", "metrics.jsonl", "model/config.json", "model/model.safetensors", "model/train.json",
        "samples/step_0000100.png", "samples/step_0000113.png",
    ]  # fmt: skip
    model = TarFlow.from_pretrained(run.model)
    tensors, step, _ = read_state(tmp_path / CHECKPOINT)
    assert step == 113 and model.num_classes == 10
    for name, value in model.state_dict().items():
        if not name.endswith("attn_mask"):
            assert value.dtype == torch.float16 and torch.equal(value, tensors[f"ema.{name}"].half()), name
    record = json.loads((tmp_path / "model" / "train.json").read_text())
    assert record["command"] == (
        "tarflow-fast train --dataset digits --patch_size 4 --channels 64 --num_blocks 2 --layers_per_block 1 "
        "--batch_size 32 --epochs 2.0 --save_dtype float16 --log_every 10 --checkpoint_every 50 --sample_every 100"
    )
    assert record["result"]["steps"] == 113 and record["result"]["loss"] == losses[-1]
    assert record["data"] == {"source": "digits", "images": 1797, "levels": 17, "classes": list("0123456789")}
    # There are two panels, each with 10 rows of 8 pictures of 8x8 pixels, enlarged five times.
    assert Image.open(tmp_path / "samples" / "step_0000113.png").size == (
        2 * (8 * 42 + 2) + 3 * 16,
        10 * 42 + 2 + 40 + 16,
    )


def test_a_run_repeats_from_its_train_json(tmp_path):
    train(tiny(tmp_path / "one", stop_at=2, lr=1e-3, betas=(0.8, 0.9)))
    config = from_file(tmp_path / "one" / "model" / "train.json")
    train(replace(config, out=tmp_path / "two", stop_at=2))
    assert (tmp_path / "two" / CHECKPOINT).read_bytes() == (tmp_path / "one" / CHECKPOINT).read_bytes()


@pytest.mark.parametrize("lazy", [False, True])
def test_folder_of_images(tmp_path, monkeypatch, lazy):
    if lazy:
        monkeypatch.setattr("tarflow_fast.data.folder.load_folder.__defaults__", (3, 0))
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 16, 3))
    for i, picture in enumerate(pixels):
        write_image(tmp_path / "set" / "ab"[i % 2] / f"{i:02}.png", picture)
    config = tiny(
        tmp_path / "run", dataset=str(tmp_path / "set"), img_size=(8, 16), patch_size=4, batch_size=8, stop_at=3,
        holdout=0.25, epochs=9.0,
    )  # fmt: skip
    run = train(config)
    assert (run.steps, run.total) == (3, math.ceil(9 * 9 / 8))
    model = TarFlow.from_pretrained(run.model)
    assert model.config["img_size"] == [8, 16] and model.num_classes == 2 and model.num_tokens == 8
    assert model.sample(2, 1, seed=0).shape == (2, 3, 8, 16)


def test_unlabeled_folder_trains_an_unconditional_flow(tmp_path):
    for i in range(4):
        write_image(tmp_path / "set" / f"{i}.png", np.full((8, 8), 60 * i))
    run = train(
        tiny(tmp_path / "run", dataset=str(tmp_path / "set"), img_size=8, in_channels=1, batch_size=4, epochs=2.0)
    )
    assert run.steps == 2 and TarFlow.from_pretrained(run.model).num_classes == 0


def test_classes_can_be_left_out(tmp_path):
    """The flow then has no classes, and trains as on the same images without labels."""
    same = dict(lr=1e-3, schedule="cosine", warmup=0.1, noise_std=0.1, ema=0.9, stop_at=3)
    trained = train(tiny(tmp_path / "a", classes=False, **same))
    digits = load_dataset("digits", 8, 1)
    plain = train(tiny(tmp_path / "b", **same), replace(digits, labels=None, classes=()))
    assert TarFlow.from_pretrained(trained.model).num_classes == 0
    one, other = ((run.model / "model.safetensors").read_bytes() for run in (trained, plain))
    assert one == other


def test_a_run_starts_from_a_flow(tmp_path):
    """The first loss is the flow's own, and its shape need not be told; another shape is refused."""
    first = train(tiny(tmp_path / "first", stop_at=40, ema=0.0))
    shape = dict.fromkeys(("patch_size", "channels", "num_blocks", "layers_per_block"))
    goes_on = train(tiny(tmp_path / "second", start=str(first.model), stop_at=2, seed=1, **shape))
    config = TarFlow.from_pretrained(goes_on.model).config
    assert config == TarFlow.from_pretrained(first.model).config
    fresh = train(tiny(tmp_path / "fresh", stop_at=2, seed=1))
    assert goes_on.result["loss"] < fresh.result["loss"] - 0.5
    with pytest.raises(ValueError, match="channels must be 64, as in the flow to start from, got 128"):
        train(tiny(tmp_path / "other", start=str(first.model), channels=128))
    assert not (tmp_path / "other").exists()


def test_bf16_training_keeps_the_shifts_exact(tmp_path):
    """bfloat16 has steps of 1/256 next to -1, half a level: a shift there is computed in float32."""
    torch.manual_seed(0)
    block = TarFlow(1, 8, 2, 64, 1, 1).blocks[0]
    with torch.no_grad():
        block.proj_out.bias.copy_(-1 + torch.arange(8) / 5000)
    x = torch.zeros(1, 16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        z, _ = block(x)
    a, b = block.proj_out.bias.detach().chunk(2)
    torch.testing.assert_close(z[0, 1:], ((0 - b) * (-a).exp()).expand(15, 4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("T", [1, 5, 64])
def test_attention_of_training_is_attention(T):
    """Where gradients are recorded on a CPU, two products take the fused kernel's place: the same numbers."""
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, T, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    grad = torch.randn(2, 3, T, 16, dtype=torch.float64)
    ours = torch.autograd.grad(causal_attention(*parts), parts, grad)
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(*parts, is_causal=True), parts, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        plain = causal_attention(*parts)
    torch.testing.assert_close(causal_attention(*parts).detach(), plain, rtol=1e-12, atol=1e-13)


def test_bf16_autocast_is_near_float32(tmp_path):
    train(tiny(tmp_path / "fp32", stop_at=3))
    train(tiny(tmp_path / "bf16", stop_at=3, precision="bf16"))
    exact, near = (np.array(metrics(tmp_path / name, "loss")) for name in ("fp32", "bf16"))
    assert 0 < np.abs(near - exact).max() < 2**-8 * np.abs(exact).max() * 4  # a few bf16 roundings (2^-8 each)
    tensors, _, _ = read_state(tmp_path / "bf16" / CHECKPOINT)
    assert tensors["model.blocks.0.proj_in.weight"].dtype == torch.float32


def test_recomputed_layers_give_the_same_bits_with_less_memory(tmp_path):
    runs = [train(tiny(tmp_path / str(how), stop_at=3, recompute=how, layers_per_block=4)) for how in (False, True)]
    one, other = ((run.model / "model.safetensors").read_bytes() for run in runs)
    assert one == other
    model, x = TarFlow(1, 8, 2, 64, 2, 4), torch.randn(8, 1, 8, 8)
    kept = []
    for recompute in (False, True):
        for block in model.blocks:
            block.recompute = recompute
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held = model(x)
        weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
        kept.append(sum(size for address, size in storages.items() if address not in weights))
        del held
    assert kept[1] < 0.2 * kept[0], kept


def test_tensorboard_gets_the_numbers_and_the_pictures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tiny(tmp_path, stop_at=3, tensorboard=True, sample_every=2))
    train(tiny(tmp_path, stop_at=5, tensorboard=True))  # goes on
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "lr", "grad_norm"):
        lines = [(step, pytest.approx(value)) for step, value in metrics(tmp_path, "step", name)]
        assert [(event.step, event.value) for event in events.Scalars(name)] == lines, name
    assert [image.step for image in events.Images("samples")] == [2, 3, 5]


def test_missing_tensorboard_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"tarflow-fast\[tensorboard\]"):
        train(tiny(tmp_path / "run", stop_at=1, tensorboard=True))
    assert not (tmp_path / "run").exists()


def test_a_flow_older_than_its_checkpoint_is_written_again(tmp_path):
    """As when the process was killed after it had written the last checkpoint, and before the flow."""
    run = train(tiny(tmp_path, stop_at=3))

    def contents():
        record = json.loads((run.model / "train.json").read_text())
        record["result"].pop("images_per_second")
        return record, (run.model / "model.safetensors").read_bytes()

    expected = contents()
    early = train(tiny(tmp_path / "early", stop_at=2))
    for name in ("train.json", "model.safetensors"):
        (run.model / name).write_bytes((early.model / name).read_bytes())
    assert contents() != expected
    train(tiny(tmp_path, stop_at=3))
    assert contents() == expected


def test_a_terminal_gets_a_progress_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(tiny(tmp_path, stop_at=3))
    shown = capsys.readouterr().err
    (loss,) = metrics(tmp_path, "mean_loss")[-1]
    assert "3/3" in shown and f"loss {loss:.4f}, " in shown and "it/s" in shown and "images/s" in shown
    train(tiny(tmp_path, stop_at=4, progress=False))
    assert "it/s" not in capsys.readouterr().err


def test_dry_run_writes_nothing(tmp_path):
    run = train(tiny(tmp_path / "run", dry_run=True))
    assert run.steps == 1 and not (tmp_path / "run").exists()
