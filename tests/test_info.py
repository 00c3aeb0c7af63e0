"""info and verify: what they tell when all is well, and when it is not."""

import json

import pytest
import torch

from tarflow_fast import info, native, verify


def test_info_is_json_and_text():
    facts = json.loads(json.dumps(info.info()))
    assert facts["native"]["isa"] in facts["native"]["isas"]
    assert {(row["op"], row["backend"]) for row in facts["ops"]} >= {("affine", name) for name in ("torch", "cpu")}
    text = info.format_info()
    assert f"in use: {native.isa()}" in text and torch.__version__ in text and facts["cpu"]["model"] in text


def test_info_tells_of_a_failed_build(monkeypatch):
    error = "the native CPU library is missing: its build failed: no C++ compiler found"
    monkeypatch.setattr(native, "_load", lambda: native.NativeUnavailable(error))
    monkeypatch.setattr(native, "build_report", lambda: {"ok": False, "error": "no C++ compiler found"})
    text = info.format_info()
    assert "NOT available: " + error in text and "affine       cpu      no: " + error in text
    assert info.info()["native"]["isas"] == []


def test_verify_is_ok_here():
    rows, ok = verify.run("cpu")
    assert ok and {row["backend"] for row in rows if row["name"] == "affine"} == {"torch", "cpu"}


@pytest.mark.parametrize("wrong", [1e-3, torch.nan])
def test_verify_notices_a_wrong_kernel(monkeypatch, wrong):
    backends = verify.OPS["affine"].backends
    broken = backends["cpu"].__class__(
        lambda x, ab, flip: (backends["torch"].forward(x, ab, flip)[0], torch.full(x.shape[:1], wrong)),
        backends["cpu"].backward,
    )
    monkeypatch.setitem(backends, "cpu", broken)
    rows = verify.verify_ops("cpu")
    assert {row["backend"] for row in rows if not row["ok"]} == {"cpu"}


def test_error_rule():
    truth = torch.tensor([1.0, 1000.0, 1e300], dtype=torch.float64)
    plain = torch.tensor([1.0, 1000.0, torch.inf])
    eps = torch.finfo(torch.float32).eps
    _, bound = verify.error_and_bound(plain, truth, plain)
    assert bound.tolist()[:2] == [2 * eps, 2 * 512 * eps]  # plain is exact: 2 ulp, of 1 and of 1000
    off = plain * (1 + 4 * eps)
    error, bound = verify.error_and_bound(off, truth, plain)
    assert (error > bound).tolist() == [True, True, False]  # past the range nothing is measured
    error, bound = verify.error_and_bound(off, truth, plain * (1 + 2 * eps))
    assert (error <= bound).all()
