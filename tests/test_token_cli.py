"""The command line on flows over tokens: what it writes and prints, and one clean line for every mistake."""

import json
import math
import re

import numpy as np
import pytest
import torch
from flows import random_flow
from safetensors.torch import load_file
from tokens import draw_rows, random_tokens_flow

from tarflow_fast import info
from tarflow_fast.cli import main


@pytest.fixture(scope="module")
def flow():
    model = random_tokens_flow(4)
    model.var.fill_(1.0)
    return model


@pytest.fixture(scope="module")
def folder(flow, tmp_path_factory):
    """A folder of flows, and of weight files in the form that other packages use. One file has two flows."""
    folder = tmp_path_factory.mktemp("tokens")
    flow.save_pretrained(folder / "flow")
    state = {key.replace("main.2", "main.3"): value for key, value in flow.state_dict().items() if key != "var"}
    torch.save(state, folder / "flow.pth")
    torch.save({"state_dict": state, "ema": state}, folder / "two.ckpt")
    labelled = random_tokens_flow(num_classes=3, channels=48, head_size=16)
    labelled.save_pretrained(folder / "labelled")
    torch.save({key: value for key, value in labelled.state_dict().items() if key != "var"}, folder / "small.pth")
    images = random_flow()
    images.save_pretrained(folder / "images")
    return folder


def run(capsys, *args):
    """Runs a command in this process and returns (exit code, standard output, standard error)."""
    code = main([str(arg) for arg in args])
    output = capsys.readouterr()
    return code, output.out, output.err


# ---------------------------------------------------------------- sample


@pytest.mark.parametrize("name", ["flow", "flow.pth"])
def test_samples_and_their_density_in_one_file(tmp_path, capsys, flow, folder, name):
    path = tmp_path / "new" / "out.npz"
    args = ["sample", "--model", folder / name, "--n", 7, "--seed", 5, "--save", path]
    assert run(capsys, *args) == (0, f"{path}: x (7, 5, 3) float32, log_prob (7,) float32\n", "")
    x, log_prob = flow.sample_and_log_prob(7, seed=5)
    with np.load(path) as saved:
        assert sorted(saved) == ["log_prob", "x"]
        assert np.array_equal(saved["x"], x.numpy()) and np.array_equal(saved["log_prob"], log_prob.numpy())
    assert [*path.parent.iterdir()] == [path]


def test_the_batch_size_is_honoured(tmp_path, capsys, monkeypatch, folder, flow):
    seen, invert = [], type(flow)._invert

    def counted(self, z, *args):
        seen.append(len(z))
        return invert(self, z, *args)

    monkeypatch.setattr(type(flow), "_invert", counted)
    for flags, parts in ((("--batch_size", 3), [3, 3, 1]), ((), [7])):
        seen.clear()
        args = ["sample", "--model", folder / "flow", "--n", 7, "--save", tmp_path / "out.npz", *flags]
        assert run(capsys, *args)[0] == 0 and seen == parts
        assert np.array_equal(np.load(tmp_path / "out.npz")["x"], flow.sample(7, seed=0).numpy())


def test_other_files_of_numbers(tmp_path, capsys, flow, folder):
    x, log_prob = flow.sample_and_log_prob(4, seed=0)
    args = ["sample", "--model", folder / "flow", "--n", 4, "--save"]
    assert run(capsys, *args, tmp_path / "a.npy")[:2] == (0, f"{tmp_path}/a.npy: (4, 5, 3) float32\n")
    assert np.array_equal(np.load(tmp_path / "a.npy"), x.numpy())
    assert run(capsys, *args, tmp_path / "a.safetensors")[0] == 0
    saved = load_file(tmp_path / "a.safetensors")
    assert torch.equal(saved["x"], x) and torch.equal(saved["log_prob"], log_prob) and len(saved) == 2
    code, out, _ = run(capsys, *args, tmp_path / "a.npz", "--dtype", "bfloat16")
    assert code == 0 and out == f"{tmp_path}/a.npz: x (4, 5, 3) float32, log_prob (4,) float32\n"
    assert np.load(tmp_path / "a.npz")["x"].dtype == np.float32


def test_labels_head_size_and_key_are_handed_on(tmp_path, capsys, folder, flow):
    path = tmp_path / "a.npz"
    args = ["--model", folder / "labelled", "--n", 4, "--labels", 2, 0, "--guidance", 0.5, "--save", path]
    assert run(capsys, "sample", *args)[0] == 0
    model = type(flow).from_pretrained(folder / "labelled")
    expected = model.sample_and_log_prob(4, torch.tensor([2, 2, 0, 0]), guidance=0.5, seed=0)
    with np.load(path) as saved:
        assert np.array_equal(saved["x"], expected[0].numpy())
        assert np.array_equal(saved["log_prob"], expected[1].numpy())
    args = ["--model", folder / "small.pth", "--head_size", 16, "--n", 4, "--labels", -1, "--save", path]
    assert run(capsys, "sample", *args)[0] == 0
    model.var.fill_(1.0)
    assert np.array_equal(np.load(path)["x"], model.sample(4, -1, seed=0).numpy())
    assert run(capsys, "sample", "--model", folder / "two.ckpt", "--key", "ema", "--n", 2, "--save", path)[0] == 0
    assert np.array_equal(np.load(path)["x"], flow.sample(2, seed=0).numpy())


def test_images_and_their_density(tmp_path, capsys, folder):
    """The picture shows denoised images. The file holds the images before denoising, as the density belongs to them."""
    path, model = tmp_path / "a.npz", random_flow()
    args = ["sample", "--model", folder / "images", "--n", 4, "--noise_std", 0.1, "--out", tmp_path / "a.png"]
    code, out, _ = run(capsys, *args, "--save", path)
    assert code == 0 and out == (
        f"{tmp_path}/a.png: 4 images 8x8, 2 in a row, denoised (sigma 0.1)\n"
        f"{path}: x (4, 1, 8, 8) float32, log_prob (4,) float32\n"
    )
    x, log_prob = model.sample_and_log_prob(4, seed=0)
    with np.load(path) as saved:
        assert np.array_equal(saved["x"], x.numpy()) and np.array_equal(saved["log_prob"], log_prob.numpy())


def test_the_picture_has_a_name_of_its_own(tmp_path, capsys, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "sample", "--model", folder / "images", "--n", 4)
    assert code == 0 and out == "samples.png: 4 images 8x8, 2 in a row, not denoised\n"
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]


@pytest.mark.parametrize("when", ["sampling", "writing"])
def test_samples_are_whole_or_not_there(tmp_path, capsys, monkeypatch, folder, flow, when):
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")

    def interrupted(*args, **kwargs):
        if when == "writing":
            args[0].write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(*((np, "savez") if when == "writing" else (type(flow), "_invert")), interrupted)
    assert run(capsys, "sample", "--model", folder / "flow", "--n", 2, "--save", path)[0] == 130
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_a_bar_is_shown_at_a_terminal(tmp_path, capsys, monkeypatch, folder):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    code, _, err = run(capsys, "sample", "--model", folder / "flow", "--n", 9, "--save", tmp_path / "a.npz")
    assert code == 0 and "sample_and_log_prob: " in err and "0/9 " in err
    np.save(tmp_path / "x.npy", np.zeros((9, 5, 3)))
    code, _, err = run(capsys, "evaluate", "--model", folder / "flow", "--dataset", tmp_path / "x.npy")
    assert code == 0 and "log-likelihood: " in err and "0/9 " in err


# ---------------------------------------------------------------- evaluate, info


def test_evaluate_prints_the_mean_log_likelihood(tmp_path, capsys, flow, folder):
    x = draw_rows(10, 5, 3, seed=8)
    np.savez(tmp_path / "data.npz", x=x.numpy().astype(np.float64), other=np.array(["a"], dtype=object))
    np.save(tmp_path / "data.npy", x.numpy())
    with torch.no_grad():
        nats = flow.log_prob(x).double()
    for name, batch_size in (("data.npz", 64), ("data.npy", 3)):
        args = ["--model", folder / "flow.pth", "--dataset", tmp_path / name, "--batch_size", batch_size]
        code, out, err = run(capsys, "evaluate", *args)
        assert (code, err) == (0, "")
        found = re.fullmatch(
            re.escape(f"{tmp_path}/{name}: 10 rows of 5 tokens of size 3\n")
            + r"log-likelihood (-\d+\.\d{4}) \+- (\d\.\d{4}) nats \(standard error over rows\)\n"
            r"nats/dim (-\d\.\d{4})\n",
            out,
        )
        expected = [nats.mean().item(), nats.std().item() / math.sqrt(10), nats.mean().item() / 15]
        assert [float(number) for number in found.groups()] == pytest.approx(expected, abs=1e-4)


def test_evaluate_with_labels(tmp_path, capsys, folder, flow):
    x, y = draw_rows(6, 5, 3), np.array([0, 1, 2, -1, 1, 0], dtype=np.int32)
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y)
    model = type(flow).from_pretrained(folder / "labelled")
    for flags, labels in (((), torch.tensor(y)), (("--unconditional",), None)):
        code, out, _ = run(
            capsys, "evaluate", "--model", folder / "labelled", "--dataset", tmp_path / "data.npz", *flags
        )
        with torch.no_grad():
            expected = model.log_prob(x, labels).mean().item()
        assert code == 0 and float(re.search("log-likelihood (.*?) ", out)[1]) == pytest.approx(expected, abs=1e-4)


def test_evaluate_honours_the_batch_size(tmp_path, capsys, monkeypatch, folder, flow):
    seen, log_prob = [], type(flow).log_prob

    def counted(self, x, y=None):
        seen.append(len(x))
        return log_prob(self, x, y)

    monkeypatch.setattr(type(flow), "log_prob", counted)
    np.save(tmp_path / "x.npy", np.zeros((5, 5, 3), np.float32))
    args = ["evaluate", "--model", folder / "flow", "--dataset", tmp_path / "x.npy", "--batch_size", 2]
    assert run(capsys, *args)[0] == 0 and seen == [2, 2, 1]


def test_evaluate_tells_of_rows_without_a_likelihood(tmp_path, capsys, folder):
    x = np.zeros((3, 5, 3))
    x[1] = 1e30
    np.save(tmp_path / "x.npy", x)
    code, out, _ = run(capsys, "evaluate", "--model", folder / "flow", "--dataset", tmp_path / "x.npy")
    assert code == 0 and out.endswith("note: log p is not finite in 1 rows, the first is row 1\n")


def test_info_of_a_flow_over_tokens(capsys, folder, flow):
    for args in (["flow"], ["small.pth", "--head_size", "16"], ["two.ckpt", "--key", "ema"]):
        code, out, _ = run(capsys, "info", folder / args[0], *args[1:], "--json")
        blocks = json.loads(out)["blocks"]
        assert code == 0 and [row["block"] for row in blocks] == [0, 1]
    assert blocks == json.loads(json.dumps(info.blocks(flow)))


# ---------------------------------------------------------------- mistakes

SAMPLE = ["sample", "--model", "{0}/flow", "--save", "out.npz"]
EVALUATE = ["evaluate", "--model", "{0}/flow", "--dataset"]
MISTAKES = [
    ([*SAMPLE, "--n", "0"], "sample: n must be >= 1, got 0"),
    ([*SAMPLE, "--n", "-3"], "sample: n must be >= 1, got -3"),
    ([*SAMPLE, "--batch_size", "0"], "sample: batch_size must be >= 1, got 0"),
    ([*SAMPLE, "--out", "a.png"], "sample: out is for images, and {0}/flow is a flow over tokens"),
    ([*SAMPLE, "--scale", "2"], "sample: scale is for images, and {0}/flow is a flow over tokens"),
    ([*SAMPLE, "--noise_std", "0.1"], "sample: noise_std is for images, and {0}/flow is a flow over tokens"),
    (SAMPLE[:3], "sample: {0}/flow is a flow over tokens and has no picture: name a file with --save"),
    ([*SAMPLE[:3], "--save", "a.txt"], "sample: save must end in .npz, .npy or .safetensors, got a.txt"),
    ([*SAMPLE[:3], "--save", "."], "sample: . is a folder, name a file in it"),
    ([*SAMPLE, "--labels", "1"], "sample_and_log_prob: y must be None for an unconditional flow (num_classes = 0), got "
     "labels"),
    (["sample", "--model", "{0}/flow.pth", "--in_channels", "1", "--save", "out.npz"],
     "open_flow: in_channels is of flows over images, {0}/flow.pth holds one over tokens"),
    (["sample", "--model", "{0}/small.pth", "--save", "out.npz"],
     "from_checkpoint: head_size must be given, because the shapes do not tell it and 64, the usual one, does not "
     "divide channels = 48"),
    (["sample", "--model", "{0}/two.ckpt", "--save", "out.npz"],
     "load_tensors: {0}/two.ckpt holds several state_dicts, choose one with key=: ['state_dict', 'ema']"),
    ([*EVALUATE, "digits"], "load_tokens: the data of a flow over tokens must be a .npz or .npy file, got 'digits'"),
    ([*EVALUATE, "none.npy"], "load_tokens: path must be a file, got none.npy"),
    ([*EVALUATE, "shape.npy"], "load_tokens: x must have shape (N, 5, 3), got (4, 3, 5)"),
    ([*EVALUATE, "flat.npy"], "load_tokens: x must have shape (N, 5, 3), got (15,)"),
    ([*EVALUATE, "empty.npy"], "load_tokens: x must hold at least one row, got 0"),
    ([*EVALUATE, "words.npy"], "load_tokens: x must hold real numbers, got <U1"),
    ([*EVALUATE, "nan.npy"], "load_tokens: x must be finite, got 2 rows that are not, the first is row 1"),
    ([*EVALUATE, "absent.npz"], "load_tokens: absent.npz must hold an array x, got a, b"),
    ([*EVALUATE, "labels.npz"], "load_tokens: y must hold 4 integers, one label a row, got float64 (4,)"),
    ([*EVALUATE, "cut.npz"], "load_tokens: cut.npz is not a whole file of numbers: "),
    ([*EVALUATE, "pickle.npy"], "load_tokens: pickle.npy is not a whole file of numbers: "),
    ([*EVALUATE, "good.npy", "--batch_size", "0"], "evaluate: batch_size must be >= 1, got 0"),
    ([*EVALUATE, "good.npy", "--holdout", ".5"], "evaluate: holdout is for images, and {0}/flow is a flow over tokens"),
    ([*EVALUATE, "good.npy", "--n_draws", "2"], "evaluate: n_draws is for images, and {0}/flow is a flow over tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch, folder, args, message):
    monkeypatch.chdir(tmp_path)
    good = np.zeros((4, 5, 3), np.float32)
    bad = good.copy()
    bad[1, 2, 0], bad[3] = np.nan, np.inf
    arrays = {
        "good": good, "shape": good.transpose(0, 2, 1), "flat": good[0].ravel(), "empty": good[:0], "nan": bad,
        "words": np.full((4, 5, 3), "a"), "pickle": np.full((4, 5, 3), None),
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(f"{name}.npy", array)
    np.savez("absent.npz", a=good, b=good)
    np.savez("labels.npz", x=good, y=np.zeros(4))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "absent.npz").read_bytes()[:-30])
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *(arg.format(folder) for arg in args))
    expected = f"error: {message.format(folder)}"
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(expected) if message.endswith(": ") else err == f"{expected}\n"
    assert sorted(tmp_path.rglob("*")) == before
