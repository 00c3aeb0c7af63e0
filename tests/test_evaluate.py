"""Classification by Bayes' rule, and the table that `tarflow-fast evaluate` prints."""

import re
import warnings

import numpy as np
import pytest
import torch
from fid_cases import MODEL, net, pictures

from tarflow_fast.cli import main
from tarflow_fast.data import dequantize, generator
from tarflow_fast.evaluate import classification
from tarflow_fast.fid import fid, image_statistics, load_statistics
from tarflow_fast.model import TarFlow


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def test_classification_counts_what_classify_finds():
    """The images that the seed draws, with uniform noise, or with that of the training."""
    images = pictures(50)
    found = classification(MODEL, images, 20, seed=2, batch_size=20)
    chosen = torch.randperm(50, generator=generator(2, "classify"))[:20]
    noise = torch.rand(20, 1, 8, 8, generator=generator(2, "classify noise", 0))
    scores = MODEL.classify(dequantize(images.images[chosen], noise, 256))
    assert torch.equal(found.right, scores.argmax(1) == images.labels[chosen])
    expected = found.right.double()
    assert found.mean == expected.mean().item() and found.standard_error == (expected.std() / 20**0.5).item()
    assert not torch.equal(found.right, classification(MODEL, images, 20, seed=2, noise_std=3.0).right)
    assert len(classification(MODEL, images, 1000).right) == 50
    with pytest.raises(ValueError, match="with the flow's 3 classes, got 50 with 0"):
        classification(MODEL, images.unlabelled())


def test_a_class_without_a_likelihood_counts_as_wrong(monkeypatch):
    scores = torch.tensor([[0.0, float("nan"), -1.0]]).expand(9, 3)
    monkeypatch.setattr(TarFlow, "classify", lambda self, x: scores)
    assert classification(MODEL, pictures(9)).mean == 0


# ---------------------------------------------------------------- the command


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a flow, a labelled data set in two files, and the small network in Inception's place."""
    MODEL.save_pretrained(tmp_path / "flow")
    for name, seed in (("data.npz", 0), ("more.npz", 1)):
        images = pictures(45, seed=seed)
        np.savez(tmp_path / name, x=images.images.numpy(), y=images.labels.numpy())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tarflow_fast.fid.inception_features", lambda path, device: net)
    return tmp_path


def run(capsys, *args):
    code = main(["evaluate", *(str(arg) for arg in args)])
    output = capsys.readouterr()
    return code, output.out, output.err


ARGS = ["flow", "--dataset", "data.npz", "--device", "cpu"]


def test_evaluate_prints_one_table(capsys, place):
    args = [*ARGS, "--classify", 20, "--fid", "more.npz", "--fid_save", "kept/stats.npz", "--fid_samples", 40]
    code, out, err = run(capsys, *args, "--guidance", 0.5, "--noise_std", 0.1)
    reference = image_statistics(pictures(45, seed=1), net)
    expected = fid(MODEL, reference, net, n=40, guidance=0.5, noise_std=0.1).distance
    accuracy = classification(MODEL, pictures(45), 20, noise_std=0.1)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "data.npz, all: 45 images, 256 levels"
    assert re.fullmatch(r"bits/dim +\d+\.\d{4} +\d\.\d{4}  45 images", lines[2])
    assert re.fullmatch(r"  a histogram a pixel +\d\.\d{4} +45 images", lines[3])
    found = re.fullmatch(r"accuracy +(\d\.\d{4}) +(\d\.\d{4})  20 images, Bayes' rule", lines[4])
    assert [float(each) for each in found.groups()] == [
        round(accuracy.mean, 4), round(accuracy.standard_error, 4)
    ]  # fmt: skip
    tail = r"40 samples against more.npz, guidance 0.5 annealed, denoised \(sigma 0.1\)"
    found = re.fullmatch(rf"FID +(\d+\.\d{{4}}) +{tail}", lines[5])
    assert float(found[1]) == pytest.approx(expected, abs=1e-4) and len(lines) == 6
    kept = load_statistics("kept/stats.npz")
    assert torch.equal(kept.covariance, reference.covariance) and kept.count == 45
    again = run(capsys, *ARGS, "--fid", "kept/stats.npz", *args[-2:], "--guidance", 0.5, "--noise_std", 0.1)
    assert again[1].splitlines()[-1].split()[:2] == lines[5].split()[:2]


def test_evaluate_leaves_out_what_was_not_asked_for(capsys, place):
    for flags in (["--classify", 0], ["--unconditional"]):
        code, out, _ = run(capsys, *ARGS, *flags)
        assert code == 0 and "bits/dim" in out and "accuracy" not in out and "FID" not in out
    assert "300 images" not in out and "45 images, Bayes" in run(capsys, *ARGS)[1]


def test_evaluate_tells_of_samples_that_are_not_finite(capsys, place, monkeypatch):
    sample = TarFlow.sample

    def broken(self, *args, **kwargs):
        x = sample(self, *args, **kwargs)
        x[0] = float("nan")
        return x

    monkeypatch.setattr(TarFlow, "sample", broken)
    code, out, _ = run(capsys, *ARGS, "--classify", 0, "--fid", "more.npz", "--fid_samples", 20)
    assert code == 0 and out.endswith("note: 1 of 20 samples are not finite and were left out\n")
    assert "19 samples" in out


def test_evaluate_draws_as_sample_does(capsys, place, monkeypatch):
    """Every option that `sample` has of how to draw reaches the flow."""
    seen, sample = {}, TarFlow.sample
    monkeypatch.setattr(TarFlow, "sample", lambda self, n, y, **how: seen.update(how) or sample(self, n, y, **how))
    how = {
        "guidance": 0.5, "guide_what": "a", "attn_temp": 0.8, "solver": "windows", "tolerance": 1e-4, "window": 4,
        "precision": "fp32",
    }  # fmt: skip
    flags = [part for name, value in how.items() for part in (f"--{name}", value)]
    code, *_ = run(
        capsys, *ARGS, "--classify", 0, "--fid", "more.npz", "--fid_samples", 20, *flags, "--no_annealed_guidance"
    )
    assert code == 0 and {name: seen[name] for name in how} == how and seen["annealed_guidance"] is False


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--fid", "data.npz", "--window", 0], "evaluate: window must be >= 1, got 0"),
        (["--guidance", 2, "--fid_samples", 9], "evaluate: fid_samples, guidance must come with --fid"),
        (["--fid", "x.npz", "--fid_save", "x.pt"], "evaluate: fid_save must name a .npz file, got x.pt"),
        (["--fid", "stats.npz", "--fid_save", "x.npz"], "evaluate: fid_save is for the statistics of a data set, and "),
        (["--fid", "data.npz", "--guidance", -1], "evaluate: guidance must be finite and >= 0, got -1.0"),
        (["--fid", "data.npz", "--fid_samples", 1], "evaluate: fid_samples must be >= 2, got 1"),
        (["--noise_std", -1], "evaluate: noise_std must be finite and >= 0, got -1.0"),
        (["--classify", -1], "evaluate: classify must be >= 0, got -1"),
        (["--model", "other"], "evaluate: name the flow once, got flow and --model other"),
        (["--fid", "none"], "load_dataset: there is no folder none"),
        (["--fid", "none.pt"], "load_tensors: path must be a file, got none.pt"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(capsys, place, monkeypatch, flags, message):
    np.savez("stats.npz", mu=np.zeros(2), sigma=np.eye(2))
    monkeypatch.setattr(TarFlow, "bits_per_dim", lambda *args, **kwargs: pytest.fail("measured"))
    before = sorted(place.rglob("*"))
    code, out, err = run(capsys, *ARGS, *flags)
    assert code == 2 and out == "" and err.startswith("error: " + message) and err.count("\n") == 1
    assert sorted(place.rglob("*")) == before


def test_missing_weights_are_told_before_anything_is_measured(capsys, place, monkeypatch):
    def missing(path, device):
        raise FileNotFoundError("fid: Inception's weights are not at /x")

    monkeypatch.setattr("tarflow_fast.fid.inception_features", missing)
    monkeypatch.setattr(TarFlow, "bits_per_dim", lambda *args, **kwargs: pytest.fail("measured"))
    assert run(capsys, *ARGS, "--fid", "more.npz") == (2, "", "error: fid: Inception's weights are not at /x\n")


def test_the_commands_warning_is_no_error(capsys, place):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        code, out, _ = run(capsys, *ARGS, "--classify", 0, "--fid", "more.npz", "--fid_samples", 4)
    assert code == 0 and "FID" in out and any("fewer samples than features" in str(each.message) for each in caught)
