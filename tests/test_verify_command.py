"""`tarflow-fast verify FLOW`: what it measures on, what it prints, exit codes, and one clean line for every mistake."""

import json

import numpy as np
import pytest
import torch
from flows import random_flow
from reports import check_json
from tokens import random_tokens_flow
from training import write_image

from tarflow_fast.cli import main
from tarflow_fast.data import dequantize, generator, load_digits
from tarflow_fast.flows import open_flow
from tarflow_fast.verify import verify_flow


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


def test_json_of_a_report():
    report = verify_flow(random_flow(scale=0.05), n=4)
    text = json.dumps(report.json(), allow_nan=False)
    check_json(json.loads(text))
    assert json.loads(text)["rows"] == report.rows


def run(capsys, *args):
    code = main(["verify", *map(str, args)])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_command_without_data_draws_every_class(capsys):
    code, out, _ = run(capsys, "digits", "--n", 20, "--seed", 4)
    flow, _ = open_flow("digits")
    assert code == 0 and out == verify_flow(flow, y=torch.arange(20) % 10, n=20, seed=4).table() + "\n"


def test_command_on_a_data_set(capsys):
    code, out, _ = run(capsys, "digits", "--data", "digits", "--n", 12, "--dtype", "float64", "--json")
    rows = torch.randperm(1797, generator=generator(0, "verify, rows"))[:12].sort().values
    images, y = load_digits().fetch(rows)
    x = dequantize(images, torch.rand(images.shape, generator=generator(0, "verify, dequantise")), 17)
    flow, _ = open_flow("digits", dtype=torch.float64)
    assert -1 <= x.min() and x.max() < 1 and code == 0
    assert json.loads(out) == verify_flow(flow, x.double(), y).json()


def test_command_on_files_of_numbers(tmp_path, capsys):
    flow, _ = open_flow("digits")
    x, y = flow.sample(6, 3, seed=1), np.full(6, 3)
    np.save(tmp_path / "x.npy", x.numpy())
    np.savez(tmp_path / "x.npz", x=x.double().numpy(), y=y, other=np.zeros(2))
    pixels = np.arange(6 * 64, dtype=np.int64).reshape(6, 1, 8, 8) % 256
    np.save(tmp_path / "pixels.npy", pixels)
    code, out, _ = run(capsys, "digits", "--data", tmp_path / "x.npy")
    assert code == 0 and out == verify_flow(flow, x).table() + "\n"
    code, out, _ = run(capsys, "digits", "--data", tmp_path / "x.npz")
    assert code == 0 and out == verify_flow(flow, x, 3).table() + "\n"
    code, out, _ = run(capsys, "digits", "--data", tmp_path / "pixels.npy", "--json")
    noise = torch.rand(6, 1, 8, 8, generator=generator(0, "verify, dequantise"))
    assert json.loads(out) == verify_flow(flow, dequantize(torch.from_numpy(pixels), noise, 256)).json()


def test_command_on_a_folder_of_images(tmp_path, capsys):
    flow = random_flow(scale=0.05)
    flow.save_pretrained(tmp_path / "flow")
    for number in range(3):
        write_image(tmp_path / "images" / f"{number}.png", np.full((8, 8), 80 * number))
    code, out, _ = run(capsys, tmp_path / "flow", "--data", tmp_path / "images")
    assert code == 0 and "x: 3 rows, given" in out


def test_command_on_a_flow_over_tokens(tmp_path, capsys):
    flow = random_tokens_flow()
    flow.save_pretrained(tmp_path / "flow")
    np.save(tmp_path / "x.npy", np.arange(60).reshape(4, 5, 3) % 3)
    code, out, _ = run(capsys, tmp_path / "flow", "--data", tmp_path / "x.npy")
    assert code == 0 and out == verify_flow(flow, torch.arange(60.0).view(4, 5, 3) % 3).table() + "\n"
    weights = random_tokens_flow(head_size=32).state_dict()
    del weights["var"]  # other packages keep flows over tokens without it
    torch.save({"ema": weights, "other": weights}, tmp_path / "flow.pth")
    code, out, _ = run(capsys, tmp_path / "flow.pth", "--key", "ema", "--head_size", 32, "--n", 4)
    assert code == 0 and out.startswith("TokenFlow of 2 blocks, 5 tokens of 3 numbers, float32")
    code, _, err = run(capsys, tmp_path / "flow", "--data", "digits")
    expected = "load_tokens: the data of a flow over tokens must be a .npz or .npy file, got 'digits'"
    assert (code, err) == (2, f"error: {expected}\n")


@pytest.mark.parametrize(
    "args, message",
    [
        (["--n", "3"], "verify: n must come with a flow: tarflow-fast verify FLOW"),
        (["--data", "digits", "--json"], "verify: data, json must come with a flow: tarflow-fast verify FLOW"),
        (["digits", "--n", "0"], "verify: n must be >= 1, got 0"),
        (["digits", "--seed", "-1"], "verify_flow: seed must be >= 0, got -1"),
        (["digits", "--jacobian_rows", "-1"], "verify_flow: jacobian_rows must be >= 0, got -1"),
        (["digits", "--data", "{0}/no.npy"], "load_tokens: path must be a file, got {0}/no.npy"),
        (["digits", "--data", "{0}/no"], "load_folder: there is no folder {0}/no (and the only "),
        (["digits", "--data", "{0}/broken.npz"], "load_tokens: {0}/broken.npz is not a whole file of numbers: "),
        (["digits", "--data", "{0}/words.npy"], "load_tokens: x must hold real numbers, got <U1"),
        (["digits", "--data", "{0}/labels.npz"], "load_tokens: y must hold 2 integers, one label a row, got "
         "int64 (3,)"),
        (["digits", "--data", "{0}/pixels.npy"], "verify: integers in {0}/pixels.npy must be in [0, 256), got "
         "[0, 300]"),
        (["digits", "--data", "{0}/shape.npy"], "load_tokens: x must have shape (N, 1, 8, 8), got (2, 8, 8)"),
        (["digits", "--data", "{0}/number.npy"], "load_tokens: x must have shape (N, 1, 8, 8), got ()"),
        (["digits", "--data", "{0}/nan.npy"], "load_tokens: x must be finite, got 1 rows that are not, the "
         "first is row 1"),
        (["digits", "--data", "{0}/two"], "verify: images must have the flow's 10 classes, got 2 ({0}/two)"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, args, message):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    np.save(tmp_path / "words.npy", np.full((2, 1, 8, 8), "a"))
    np.savez(tmp_path / "labels.npz", x=np.zeros((2, 1, 8, 8)), y=np.zeros(3, dtype=int))
    np.save(tmp_path / "pixels.npy", np.arange(0, 301, 300).repeat(64).reshape(2, 1, 8, 8))
    np.save(tmp_path / "shape.npy", np.zeros((2, 8, 8), dtype=np.float32))
    np.save(tmp_path / "number.npy", np.zeros(()))
    np.save(tmp_path / "nan.npy", np.stack([np.zeros((1, 8, 8)), np.full((1, 8, 8), np.nan)]))
    for name in ("a", "b"):
        write_image(tmp_path / "two" / name / "1.png", np.zeros((8, 8)))
    code, out, err = run(capsys, *(arg.format(tmp_path) for arg in args))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: " + message.format(tmp_path))
