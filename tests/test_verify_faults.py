"""verify_flow finds planted faults, names their block, and reports them in its JSON and exit code."""

import json
import math

import pytest
import torch
from flows import random_flow
from reports import by_block, check_json, section

from tarflow_fast.cli import main
from tarflow_fast.transforms import Affine
from tarflow_fast.verify import verify_flow


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


class WrongInverse(Affine):
    def inverse(self, z, parameters):
        x, log_det = super().inverse(z, parameters)
        return x * (1 + 2e-5), log_det


class WrongLogDet(Affine):
    """Its forward and inverse agree with each other, but neither agrees with the Jacobian."""

    def forward(self, x, parameters, flip=False, backend="auto"):
        z, log_det = super().forward(x, parameters, flip, backend)
        return z, log_det + 1e-3

    def inverse(self, z, parameters):
        x, log_det = super().inverse(z, parameters)
        return x, log_det - 1e-3 / 15  # this is called for each of 16 tokens but the first


class OneSidedLogDet(Affine):
    def inverse(self, z, parameters):
        x, log_det = super().inverse(z, parameters)
        return x, log_det * (1 + 1e-3)


def planted(transform, block=1):
    flow = random_flow(scale=0.05, num_blocks=3)
    flow.backend, flow.blocks[block].transform = "torch", transform
    return flow


def failing(report):
    return {(row["section"], row["name"]) for row in report.rows if not row["ok"]}


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_wrong_inverse_fails_and_its_block_is_named(block):
    report = verify_flow(planted(WrongInverse(), block), n=16)
    assert failing(report) >= {("round trip", "x -> z -> x"), ("round trip", "z -> x -> z")}
    assert report.failed[0].startswith("x -> z -> x: the error is ")
    assert all(sentence.endswith(f"it grows most in block {block}") for sentence in report.failed[:2])
    assert not report.ok and "\nNOT all within their limits\n- x -> z -> x" in report.table()


def test_a_wrong_log_det_fails_against_autograd():
    report = verify_flow(planted(WrongLogDet()), n=16)
    assert failing(report) == {("log-determinant", "forward - autograd"), ("jacobian by block", "block 1")}
    total, block = report.failed
    assert total.startswith("forward - autograd: up to 0.001 nats, the limit is ") and total.endswith("in block 1")
    assert block.startswith("block 1: the log-determinant is 0.001 nats off autograd's, the limit is ")


def test_a_log_det_wrong_on_one_side_does_not_cancel():
    report = verify_flow(planted(OneSidedLogDet()), n=16)
    assert {name for where, name in failing(report) if where == "log-determinant"} == {
        "forward + inverse, x -> z -> x",
        "forward + inverse, z -> x -> z",
    }
    assert all(sentence.endswith("most in block 1") for sentence in report.failed)


def test_a_net_that_looks_ahead_is_not_triangular():
    flow = random_flow(scale=0.05)
    flow.backend = "torch"
    flow.blocks[1].proj_out.register_forward_hook(lambda _module, _inputs, out: out + 0.1 * out.mean(1, keepdim=True))
    report = verify_flow(flow, n=4)
    above = by_block(report, "above_diagonal")
    assert above[0] == 0 and above[1] > 1e-4 and not report.ok
    assert any(sentence.startswith("block 1: the Jacobian is not triangular, ") for sentence in report.failed)


def exploding(scale=60.0):
    """A flow of two blocks. Block 1 is inverted first, and multiplies by up to exp(scale / 10) and more."""
    flow = random_flow(scale=0.05)
    with torch.no_grad():
        flow.blocks[1].proj_out.weight.mul_(scale)
    return flow


def test_an_overflowing_inverse_fails_and_its_block_is_named(tmp_path, capsys):
    exploding().save_pretrained(tmp_path)
    assert main(["verify", str(tmp_path), "--n", "32"]) == 1
    out = capsys.readouterr().out
    assert "\nNOT all within their limits\n- block 1: the inverse overflows in 100 % of the rows, where abs(a)" in out
    assert "- z -> x -> z: 100 % of the rows do not come back finite\n" in out
    assert main(["verify", str(tmp_path), "--n", "32", "--json"]) == 1
    check_json(json.loads(capsys.readouterr().out))


def test_rows_that_overflow_are_counted():
    """The report counts the rows that overflow in block 1, among the noise and the samples that have a finite z."""
    flow = exploding(10.0)
    report = verify_flow(flow, n=64, jacobian_rows=0)
    z = torch.randn(64, 16, 4, generator=torch.Generator().manual_seed(0)) * flow.var.sqrt()
    x, _ = flow.inverse(z, nonfinite="ignore")
    with torch.no_grad():
        again = flow(flow.unpatchify(x))[0]
    again = again[again.isfinite().flatten(1).all(dim=1)]
    lost = torch.cat([~flow.blocks[1].reverse(rows).isfinite().flatten(1).all(dim=1) for rows in (z, again)])
    assert by_block(report, "inverse_overflow")[1] == lost.double().mean() and 0 < lost.sum() < 64
    assert section(report, "round trip")[1]["over_1e-2"] >= lost.sum().item() / 64
    percent = f"{100 * lost.double().mean().item():.3g}"
    assert report.failed[0].startswith(
        f"block 1: the inverse overflows in {percent} % of the rows, where abs(a) is up "
    )


def test_an_inverse_that_explodes_without_overflow_fails():
    report = verify_flow(random_flow(nvp=False, scale=1.0), n=32)
    row = section(report, "round trip")[1]
    assert not row["ok"] and row["limit"] == pytest.approx(math.sqrt(2**-23) * 4, rel=0.5)
    assert max(by_block(report, "inverse_stretch")) > 5
    assert any(by_block(report, "ok")) and sum(by_block(report, "inverse_overflow")) == 0
