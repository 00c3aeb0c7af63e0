"""The folder of a run: nothing of a killed process or of an earlier run is left in it, and nobody's files are taken."""

import json
import os
import time

import pytest
import torch
from torch.nn import functional as F
from training import metrics, tiny

from tarflow_fast.model import TarFlow
from tarflow_fast.training import fit
from tarflow_fast.training.run import train
from tarflow_fast.training.trainer import CHECKPOINT, Trainer


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def killed(config, step):
    """Runs train(config) in a forked process that ends without cleaning up when it reads the images of a step."""
    child = os.fork()
    if not child:
        read = Trainer.read
        Trainer.read = lambda self, number: os._exit(0) if number == step else read(self, number)
        try:
            train(config)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


# ---------------------------------------------------------------- temporary files


def test_temporary_files_of_a_killed_process_go(tmp_path):
    config = dict(holdout=0.1, eval_every=1)
    train(tiny(tmp_path, stop_at=2, **config))
    before = names(tmp_path)
    left = [f".{CHECKPOINT}.a1b2c3d4", ".metrics.jsonl.a1b2c3d4", ".curve.png.a1b2c3d4"]
    left += [f"{flow}/.{name}.a1b2c3d4" for flow in ("model", "best") for name in ("model.safetensors", "config.json")]
    left += ["model/.train.json.a1b2c3d4", "samples/.step_0000002.png.a1b2c3d4"]
    mine = [".notes", "model/.gitattributes", "samples/.step_back"]
    for name in left + mine:
        (tmp_path / name).write_bytes(b"half")
    train(tiny(tmp_path, stop_at=2, **config))
    assert names(tmp_path) == sorted(before + mine)


# ---------------------------------------------------------------- a fresh start


def test_a_fresh_start_keeps_nothing_of_the_run_before(tmp_path):
    """It is stopped before it has written anything of its own, and then there is nothing to be taken for its own."""
    train(tiny(tmp_path, stop_at=4, holdout=0.1, eval_every=2, sample_every=2, curve=True))
    assert {"model/model.safetensors", "best/train.json", "samples/step_0000002.png"} <= set(names(tmp_path))
    mine = ["notes.txt", "samples/mine.png", "best/why.md"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    with pytest.raises(FloatingPointError):
        train(tiny(tmp_path, resume="none", lr=1e30, warmup=0.0, epochs=9.0))
    assert names(tmp_path) == sorted([*mine, "metrics.jsonl"]) and not (tmp_path / "model").exists()
    run = train(tiny(tmp_path, resume="none", stop_at=1, seed=1))
    assert names(tmp_path) == sorted(
        [*mine, CHECKPOINT, "metrics.jsonl", "samples/step_0000001.png"]
        + [f"model/{name}" for name in ("config.json", "model.safetensors", "train.json")]
    )
    assert json.loads((run.model / "train.json").read_text())["config"]["seed"] == 1


def test_a_flow_without_its_checkpoint_is_not_overwritten_unasked(tmp_path):
    run = train(tiny(tmp_path, stop_at=2))
    (tmp_path / CHECKPOINT).unlink()
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    for change in ({}, {"dry_run": True}):
        with pytest.raises(ValueError) as raised:
            train(tiny(tmp_path, stop_at=2, **change))
        assert str(raised.value) == (
            f"train: resume must find {tmp_path / CHECKPOINT} beside the flow in {run.model}, got no such file; "
            "--resume none starts afresh and removes the flow, another --out keeps it"
        )
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    assert train(tiny(tmp_path, stop_at=1, resume="none")).steps == 1


def test_a_best_flow_from_before_the_first_checkpoint_is_measured_again(tmp_path, monkeypatch):
    """The process was killed after it kept a best flow, and before its first checkpoint: the same command goes on."""
    values = iter([2.0, 3.0])
    monkeypatch.setattr(Trainer, "evaluate", lambda self: next(values))
    config = dict(holdout=0.1, eval_every=1, stop_at=1)
    train(tiny(tmp_path, **config))
    (tmp_path / CHECKPOINT).unlink()
    for path in (tmp_path / "model").iterdir():
        path.unlink()
    train(tiny(tmp_path, **config))
    assert json.loads((tmp_path / "best" / "train.json").read_text())["result"]["heldout_bits_per_dim"] == 3.0


@pytest.mark.parametrize("change", [{}, {"seed": 1}])
def test_a_checkpoint_that_lay_elsewhere_brings_its_own_past(tmp_path, monkeypatch, change):
    """The best flow in the folder is of a later step, or of another run. It is not the best of this run."""
    values = iter([5.0, 1.0, 4.0])
    monkeypatch.setattr(Trainer, "evaluate", lambda self: next(values))
    train(tiny(tmp_path / "elsewhere", stop_at=1, holdout=0.1, eval_every=1))
    train(tiny(tmp_path / "run", stop_at=3, holdout=0.1, eval_every=3, **change))
    best = tmp_path / "run" / "best" / "train.json"
    assert json.loads(best.read_text())["result"]["steps"] == 3
    checkpoint = str(tmp_path / "elsewhere" / CHECKPOINT)
    train(tiny(tmp_path / "run", stop_at=2, holdout=0.1, eval_every=2, resume=checkpoint))
    result = json.loads(best.read_text())["result"]
    assert (result["steps"], result["heldout_bits_per_dim"]) == (2, 4.0)


# ---------------------------------------------------------------- images a second


def test_speed_counts_the_steps_of_this_process_alone(tmp_path, monkeypatch):
    """By a clock on which a step takes one second, all lines tell 32 images a second, after resuming as well."""
    clock = [0.0]
    step = Trainer.step

    def timed_step(*args, **options):
        clock[0] += 1.0
        return step(*args, **options)

    monkeypatch.setattr(Trainer, "step", timed_step)
    monkeypatch.setattr("tarflow_fast.training.report.time.perf_counter", lambda: clock[0])
    train(tiny(tmp_path / "whole", log_every=4, stop_at=8))
    config = tiny(tmp_path / "killed", log_every=4, checkpoint_every=3, stop_at=8)
    killed(config, step=3)  # after the checkpoint at step 3, whose losses no line told yet
    run = train(config)
    assert metrics(tmp_path / "killed", "step", "images_per_second") == [(4, 32.0), (8, 32.0)]
    assert run.result["images_per_second"] == 32.0
    told = metrics(tmp_path / "killed", "step", "mean_loss")
    assert told == metrics(tmp_path / "whole", "step", "mean_loss")  # which do count the losses from before


# ---------------------------------------------------------------- TensorBoard


@pytest.fixture
def shown():
    """Reads what TensorBoard shows of a folder: the steps and values of a tag, and the steps of the pictures."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(folder):
        events = accumulator.EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        scalars = [(event.step, event.value) for event in events.Scalars("loss")]
        return scalars, [image.step for image in events.Images("samples")]

    return read


def test_the_board_has_no_gap_and_no_repeats(tmp_path, shown):
    """A process is killed, with what it had not yet written, after its checkpoint at step 4 and before step 6."""
    config = tiny(tmp_path, tensorboard=True, checkpoint_every=4, sample_every=2, stop_at=8)
    killed(config, step=5)
    for _ in range(2):  # it goes on, and once more when nothing is left to train
        time.sleep(1.1)  # TensorBoard reads the files in the order of the seconds in their names
        train(config)
    scalars, pictures = shown(tmp_path)
    assert scalars == [(step, pytest.approx(loss)) for step, loss in metrics(tmp_path, "step", "loss")]
    assert [step for step, _ in scalars] == [1, 2, 3, 4, 5, 6, 7, 8] and pictures == [2, 4, 6, 8]


def test_a_fresh_start_clears_the_board(tmp_path, shown):
    train(tiny(tmp_path, tensorboard=True, stop_at=3))
    train(tiny(tmp_path, tensorboard=True, stop_at=1, resume="none"))
    scalars, pictures = shown(tmp_path)
    assert [step for step, _ in scalars] == pictures == [1]


def test_the_last_picture_reaches_the_board_after_a_kill_before_it(tmp_path, shown, monkeypatch):
    config = tiny(tmp_path, tensorboard=True, stop_at=2)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "samples", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    train(config)
    assert shown(tmp_path)[1] == [2]


# ---------------------------------------------------------------- layers that draw


def drawing_flow() -> TarFlow:
    """A flow with dropout and noise between its layers' modules."""
    torch.manual_seed(0)
    model = TarFlow(1, 8, 4, 64, 2, 2)
    for block in model.blocks:
        block.attn_blocks[0].mlp.register_forward_hook(lambda _, __, out: F.dropout(out, 0.5))
        block.attn_blocks[1].attention.register_forward_hook(lambda _, __, out: out + torch.randn_like(out))
        torch.nn.init.normal_(block.proj_out.weight, std=0.05)  # at its first value, 0, the layers get no gradient
    return model


def test_recomputed_layers_draw_the_same_again():
    images = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weights = []
    for recompute in (False, True):
        model = drawing_flow()
        fit(model, images, recompute=recompute, epochs=4.0, batch_size=16, stop_at=3, lr=1e-2, curve=False, ema=0.0)
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_recomputed_inversion_draws_the_same_again():
    """The gradient by z of reverse, which inverts each block once more in the backward pass, against finite steps.

    A flow draws the same at each call here, since the generator starts from one seed.
    """
    model = drawing_flow().double()
    z, direction = torch.randn(2, 2, 4, 16, dtype=torch.float64)

    def value(z):
        torch.manual_seed(1)
        return model.reverse(z, differentiable=True).square().sum()

    z.requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(z), z)
    with torch.no_grad():
        finite = (value(z + 1e-6 * direction) - value(z - 1e-6 * direction)) / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(finite.item(), rel=1e-5)


def test_a_resumed_run_draws_on(tmp_path):
    """What layers draw comes from torch's generator, whose state is in the checkpoint."""
    images = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings = dict(epochs=4.0, batch_size=16, lr=1e-2, curve=False, recompute=True)
    fit(drawing_flow(), images, out=tmp_path / "whole", stop_at=4, **settings)
    for stop_at in (2, 4):
        torch.randn(3)
        fit(drawing_flow(), images, out=tmp_path / "parts", stop_at=stop_at, **settings)
    assert (tmp_path / "parts" / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()
