"""The command line: what it writes and prints, its exit codes, and one clean line for every mistake."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training import command, metrics, tiny, tiny_flags, write_image

import tarflow_fast
from tarflow_fast import info, verify
from tarflow_fast.cli import main
from tarflow_fast.data import load_digits
from tarflow_fast.data.images import make_grid
from tarflow_fast.evaluate import classification, evaluate, histogram_bits
from tarflow_fast.flows import open_flow, training_noise
from tarflow_fast.model import TarFlow
from tarflow_fast.training.run import train


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """The folder of a tiny flow trained on digits."""
    return train(tiny(tmp_path_factory.mktemp("flow"), epochs=1.0)).model


def run(capsys, *args):
    """Runs a command in this process and returns (exit code, standard output, standard error)."""
    code = main([str(arg) for arg in args])
    output = capsys.readouterr()
    return code, output.out, output.err


# ---------------------------------------------------------------- train


def test_train_takes_the_originals_flags(tmp_path, capsys):
    flags = [
        "--dataset", "digits", "--img_size", "8", "--channel_size", "1", "--patch_size", "4", "--channels", "64",
        "--blocks", "1", "--layers_per_block", "1", "--noise_std", "0.3", "--batch_size", "16", "--nvp", "--cfg", "0.5",
        "--drop_label", "0.2", "--lr", "1e-3", "--noise_type", "gaussian",
    ]  # fmt: skip
    code, _, _ = run(capsys, "train", *flags, "--out", tmp_path, "--stop-at", "1", "--log-every", "1")
    assert code == 0
    config = json.loads((tmp_path / "model" / "train.json").read_text())["config"]
    expected = dict(in_channels=1, patch_size=4, channels=64, num_blocks=1, layers_per_block=1, noise_std=0.3)
    assert {name: config[name] for name in expected} == expected and config["sample_guidance"] == 0.5
    assert config["drop_label"] == 0.2 and config["lr"] == 1e-3 and config["nvp"] is True


def test_train_writes_what_the_library_writes(tmp_path, capsys):
    code, _, _ = run(capsys, *tiny_flags(tmp_path / "cli", stop_at=2))
    assert code == 0
    train(tiny(tmp_path / "library", stop_at=2))
    for name in ("checkpoint.safetensors", "model/model.safetensors"):
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "library" / name).read_bytes()


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_settings_from_a_file_and_the_command_line_wins(tmp_path, capsys, suffix):
    if suffix == ".toml" and sys.version_info < (3, 11):
        pytest.skip("TOML needs Python 3.11")
    path = tmp_path / f"settings{suffix}"
    values = {"patch_size": 4, "channels": 64, "num_blocks": 1, "batch_size": 16, "betas": [0.8, 0.9], "nvp": False}
    if suffix == ".json":
        path.write_text(json.dumps(values))
    else:
        path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
    code, _, _ = run(capsys, "train", "--config", path, "--batch_size", 8, "--out", tmp_path / "run", "--stop_at", 1)
    config = json.loads((tmp_path / "run" / "model" / "train.json").read_text())["config"]
    assert code == 0 and config["batch_size"] == 8
    assert (config["patch_size"], config["num_blocks"], config["betas"], config["nvp"]) == (4, 1, [0.8, 0.9], False)


# ---------------------------------------------------------------- sample


def test_sample_draws_what_the_model_draws(tmp_path, capsys, flow):
    code, out, _ = run(
        capsys, "sample", "--model", flow, "--out", tmp_path / "s.png", "--save", tmp_path / "s.npy", "--n", 6,
        "--class", 3, 5, "--guidance", 1.5, "--seed", 7, "--no_denoise", "--scale", 2,
    )  # fmt: skip
    model, y = TarFlow.from_pretrained(flow), torch.tensor([3, 3, 3, 5, 5, 5])
    expected = model.sample(6, y, guidance=1.5, seed=7)
    assert code == 0 and np.array_equal(np.load(tmp_path / "s.npy"), expected.numpy())
    assert np.array_equal(np.asarray(Image.open(tmp_path / "s.png")), make_grid(expected, 3, scale=2).numpy())
    assert out == f"{tmp_path}/s.png: 6 images 8x8, 3 in a row, not denoised\n{tmp_path}/s.npy: (6, 1, 8, 8) float32\n"


def test_sample_denoises_with_the_recorded_noise(tmp_path, capsys, flow):
    path = tmp_path / "s.safetensors"
    code, out, _ = run(capsys, "sample", "--model", flow, "--n", 10, "--out", tmp_path / "s.png", "--save", path)
    model, y = TarFlow.from_pretrained(flow), torch.arange(10)
    expected = model.denoise(model.sample(10, y, seed=0), y, noise_std=0.1)
    assert code == 0 and torch.equal(load_file(path)["images"], expected)
    assert "10 images 8x8, 1 in a row, denoised (sigma 0.1)" in out


def test_sample_from_a_checkpoint_of_the_original(tmp_path, capsys, flow):
    model = TarFlow.from_pretrained(flow)
    model.backend = "torch"
    torch.save(model.state_dict(), tmp_path / "original.pth")
    args = ["--model", tmp_path / "original.pth", "--in_channels", 1, "--n", 4, "--labels", -1, "--backend", "torch"]
    code, _, _ = run(capsys, "sample", *args, "--out", tmp_path / "s.png", "--save", tmp_path / "s.npy")
    assert code == 0 and np.array_equal(np.load(tmp_path / "s.npy"), model.sample(4, -1, seed=0).numpy())


def test_sample_in_a_precision(tmp_path, capsys, flow):
    code, _, _ = run(
        capsys, "sample", "--model", flow, "--n", 2, "--labels", 1, "--precision", "bf16", "--no_denoise", "--out",
        tmp_path / "s.png", "--save", tmp_path / "s.npy",
    )  # fmt: skip
    expected = TarFlow.from_pretrained(flow).sample(2, 1, seed=0, precision="bf16")
    assert code == 0 and np.array_equal(np.load(tmp_path / "s.npy"), expected.numpy())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--device", "tpu9"), "sample: device must be auto, cpu, cuda or cuda:<number>, got 'tpu9'"),
        (("--nrow", 0), "sample: nrow must be >= 1, got 0"),
        (("--scale", 0), "sample: scale must be >= 1, got 0"),
        (("--out", "."), "sample: . is a folder, name a file in it"),
        (("--out", "x.jpg"), "sample: out must end in .png, got x.jpg"),
    ],
)
def test_sample_refuses_before_it_works(tmp_path, capsys, monkeypatch, flow, flags, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "sample", "--model", flow, "--n", 2, *flags)
    assert (code, out, err) == (2, "", f"error: {message}\n") and not [*tmp_path.iterdir()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["sample", "evaluate", "info digits", "verify"])
def test_a_gpu_that_is_not_there(capsys, command):
    code, _, err = run(capsys, *command.split(), "--device", "cuda")
    assert code == 2 and re.fullmatch(
        rf"error: {command.split()[0]}: device 'cuda' was asked for, and torch .* sees no GPU\n", err
    )


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"tarflow_fast {tarflow_fast.__version__}\n", "")


# ---------------------------------------------------------------- evaluate, info, verify


def test_evaluate_prints_the_models_bits(capsys, flow):
    code, out, _ = run(capsys, "evaluate", "--model", flow, "--holdout", 0.05, "--n_draws", 2, "--classify", 20)
    known, part = load_digits().split(0.05)
    model, record = open_flow(flow)
    bits = evaluate(model, part, n_draws=2)
    found = classification(model, part, 20, noise_std=training_noise(record))
    assert code == 0 and out == (
        "note: the flow was trained with --holdout 0 of these images\n"
        "digits, held out 0.05: 90 images, 17 levels\n"
        f"{'':22}     value        +-  standard error over what was measured\n"
        f"bits/dim              {bits.mean:10.4f}  {bits.standard_error:8.4f}  90 images\n"
        f"  a histogram a pixel {histogram_bits(known, part):10.4f}            90 images\n"
        f"accuracy              {found.mean:10.4f}  {found.standard_error:8.4f}  20 images, Bayes' rule\n"
    )


def test_evaluate_is_the_mean_of_bits_per_dim(flow):
    model, digits = TarFlow.from_pretrained(flow), load_digits().subset(torch.arange(70))
    bits = evaluate(model, digits, n_draws=40, batch_size=32)
    expected = model.bits_per_dim(digits.images, digits.labels, levels=17, n_draws=40, seed=123)
    spread = (bits.bits - expected).std() / 70**0.5  # of the difference of two estimates of the same mean
    assert bits.bits.shape == (70,) and abs(bits.mean - expected.mean().item()) < 5 * spread
    unlabeled = evaluate(model, digits, conditional=False)
    assert unlabeled.mean != bits.mean


GROWTH = """
import torch
from tarflow_fast.data import ImageSet
from tarflow_fast.evaluate import histogram_bits
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
known = ImageSet(torch.randint(256, (40000, 1, 32, 32), dtype=torch.uint8), None, (), 256, "")
images = ImageSet(known.images[:4], None, (), 256, "")
histogram_bits(images, images)
before = peak()
histogram_bits(known, known)
print(peak() - before, known.images.numel())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the test reads /proc")
def test_histogram_bits_takes_less_memory_than_twice_the_images():
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    grown, size = map(int, done.stdout.split())
    assert grown < 2 * size


def test_histogram_bits_is_the_cross_entropy():
    digits = load_digits().subset(torch.arange(200))
    columns = digits.images.flatten(1).numpy()
    cost = 0.0
    for pixel in range(64):
        counts = np.bincount(columns[:, pixel], minlength=17) + 1.0
        cost -= np.log2(counts / counts.sum())[columns[:, pixel]].mean() / 64
    assert histogram_bits(digits, digits) == pytest.approx(cost, rel=1e-12)


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0 and out == info.format_info() + "\n" and torch.__version__ in out
    code, out, _ = run(capsys, "info", "--json")
    assert code == 0 and json.loads(out) == json.loads(json.dumps(info.info()))


@pytest.mark.parametrize("ok, code", [(True, 0), (False, 1)])
def test_verify_exits_with_what_it_found(capsys, monkeypatch, ok, code):
    rows = [{"name": "affine", "worst_error": 1.25e-7, "ok": ok}]
    monkeypatch.setattr(verify, "run", lambda device: (rows, ok))
    assert run(capsys, "verify") == (
        code,
        f"| name | worst_error | ok |\n| --- | --- | --- |\n| affine | 1.25e-07 | {ok} |\n"
        + ("all within their limits\n" if ok else "NOT all within their limits\n"),
        "",
    )


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["sample", "--model", "{0}/nothing"],
            "error: from_pretrained: folder must exist, got '{0}/nothing' "
            "(a Hub id needs: pip install 'tarflow-fast[hub]')\n",
        ),
        (["sample", "--n", "0"], "error: sample: n must be >= 1, got 0\n"),
        (["sample", "--save", "x.txt"], "error: sample: save must end in .npz, .npy or .safetensors, got x.txt\n"),
        (
            ["sample", "--model", "{flow}", "--labels", "3", "10"],
            "error: sample: y must be below num_classes = 10 (negative: no label), got 10\n",
        ),
        (["train", "--dataset", "{0}/none"], "error: load_dataset: there is no folder {0}/none (built in are digits, "
         "fashion-mnist and photographs)\n"),
        (["train", "--channels", "65"], "error: train: channels must be a multiple of 64, got 65\n"),
        (["train", "--config", "{0}/unknown.json"], "error: train: {0}/unknown.json sets width, which is none of "),
        (["train", "--config", "{0}/broken.json"], "error: train: cannot read the settings in {0}/broken.json: "),
        (["train", "--config", "{0}/no.json"], "error: [Errno 2] No such file or directory: '{0}/no.json'\n"),
        (["evaluate", "--model", "{flow}", "--dataset", "{0}/two"], "error: evaluate: images must have the flow's 10 "
         "classes, got 2 ({0}/two); conditional=False leaves labels out\n"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, flow, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unknown.json").write_text('{"width": 3}')
    (tmp_path / "broken.json").write_text("{")
    for name in ("a", "b"):
        write_image(tmp_path / "two" / name / "1.png", np.zeros((8, 8)))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *(arg.format(tmp_path, flow=flow) for arg in args))
    assert code == 2 and out == "" and err.count("\n") == 1
    expected = message.format(tmp_path)
    assert err == expected if message.endswith("\n") else err.startswith(expected)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("args", [["fly"], ["sample", "--backend", "gpu"], ["train", "--wings", "2"], []])
def test_unknown_words_exit_with_2(capsys, args):
    with pytest.raises(SystemExit) as raised:
        main(args)
    assert raised.value.code == 2


def test_an_unexpected_error_keeps_its_traceback_on_request(capsys, monkeypatch):
    monkeypatch.setattr(verify, "run", lambda device: (_ for _ in ()).throw(RuntimeError("lost")))
    assert run(capsys, "verify") == (2, "", "error: lost (TARFLOW_FAST_TRACEBACK=1 shows where)\n")
    monkeypatch.setenv("TARFLOW_FAST_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="lost"):
        main(["verify"])


def test_interrupt_exits_with_130(capsys, monkeypatch):
    monkeypatch.setattr(verify, "run", lambda device: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(capsys, "verify") == (130, "", "interrupted\n")


# ---------------------------------------------------------------- as a program


def test_help_does_not_wait_for_torch():
    _, options = command("tarflow_fast")
    check = "import sys; from tarflow_fast import cli; sys.argv = ['tarflow-fast', '--help']\n"
    check += "try: cli.main()\nfinally: print(sorted({'torch', 'numpy', 'PIL', 'tqdm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], **options)
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stdout
    assert all(name in done.stdout for name in ("demo", "train", "sample", "evaluate", "score", "info", "verify"))


def test_python_m_tarflow_fast_is_the_tool(tmp_path):
    args, options = command("tarflow_fast", *tiny_flags(tmp_path, stop_at=1))
    done = subprocess.run(args, **options)
    assert done.returncode == 0, done.stdout
    assert [step for (step,) in metrics(tmp_path, "step")] == [1]
    assert "step 1/57  loss " in done.stdout and f"the flow is in {tmp_path}/model" in done.stdout
    args, options = command("tarflow_fast", "train", "--channels", "65")
    done = subprocess.run(args, **options)
    assert (done.returncode, done.stdout) == (2, "error: train: channels must be a multiple of 64, got 65\n")
