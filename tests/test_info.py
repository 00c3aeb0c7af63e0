"""The commands info and verify: what they report when all is well, and when it is not."""

import json

import pytest
import torch
from flows import random_flow, random_noise
from torch import nn

from tarflow_fast import info, native, verify
from tarflow_fast.cli import main
from tarflow_fast.ops.registry import OPS


def test_info_is_json_and_text():
    facts = json.loads(json.dumps(info.info()))
    assert facts["native"]["isa"] in facts["native"]["isas"]
    assert {(row["op"], row["backend"]) for row in facts["ops"]} >= {("affine", name) for name in ("torch", "cpu")}
    text = info.format_info()
    assert f"in use: {native.isa()}" in text and facts["cpu"]["model"] in text
    # Builds of one version differ in a suffix such as +cpu or +cu130, and the package's metadata may leave it out.
    assert facts["versions"]["torch"] == torch.__version__ and f"  torch        {torch.__version__}\n" in text


def test_info_tells_of_a_failed_build(monkeypatch):
    error = "the native CPU library is missing: its build failed: no C++ compiler found"
    monkeypatch.setattr(native, "_load", lambda: native.NativeUnavailable(error))
    monkeypatch.setattr(native, "build_report", lambda: {"ok": False, "error": "no C++ compiler found"})
    text = info.format_info()
    assert "NOT available: " + error in text and "affine         cpu      no: " + error in text
    assert info.info()["native"]["isas"] == []


def test_verify_is_ok_here():
    rows, ok = verify.run("cpu")
    assert ok and {row["backend"] for row in rows if row["name"] == "affine"} == {"torch", "cpu"}


@pytest.mark.parametrize("wrong", [1e-3, torch.nan])
def test_verify_notices_a_wrong_kernel(monkeypatch, wrong):
    backends = OPS["affine"].backends
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
    assert bound.tolist()[:2] == [2 * eps, 2 * 512 * eps]  # plain is exact, so the bounds are 2 ulp of 1 and of 1000
    off = plain * (1 + 4 * eps)
    error, bound = verify.error_and_bound(off, truth, plain)
    assert (error > bound).tolist() == [True, True, False]  # what is past float32's range is not judged
    error, bound = verify.error_and_bound(off, truth, plain * (1 + 2 * eps))
    assert (error <= bound).all()


# ---- which path a block takes ----------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A Linear plus a low-rank update, as adapters have it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, h):
        return self.base(h) + self.up(self.down(h))


def adapted():
    """A flow of three blocks, with an adapter in block 1 and a hook in block 2."""
    model = random_flow(num_blocks=3)
    model.blocks[1].attn_blocks[0].attention.qkv = Adapter(model.blocks[1].attn_blocks[0].attention.qkv)
    model.blocks[2].proj_in.register_forward_hook(lambda *_: None)
    return model


REASONS = ["", "attn_blocks.0.attention.qkv is a Adapter", "proj_in has hooks"]


@pytest.mark.skipif(not native.available(), reason=native.reason() or "native")
def test_blocks_left_to_pytorch_are_listed_with_the_reason(fresh_warnings, monkeypatch):
    model = adapted()
    rows = json.loads(json.dumps(info.blocks(model)))
    assert [row["block"] for row in rows] == [0, 1, 2]
    assert [row["inverse"] for row in rows] == ["cpu", "torch", "torch"]
    assert [row["inverse_reason"] for row in rows] == REASONS
    text = info.format_blocks(model)
    assert "  0   inverse: cpu\n" in text and f"  1   inverse: torch ({REASONS[1]})\n" in text
    model.backend = "cpu"
    rows = info.blocks(model)
    assert [row["inverse"] for row in rows] == ["cpu", "none", "none"]
    assert rows[1]["inverse_reason"] == f"block_inverse: backend 'cpu' cannot run: {REASONS[1]}"
    asked = {"backend 'torch' was asked for"}
    model.backend = "torch"
    assert {row["inverse_reason"] for row in info.blocks(model)} == asked
    model.backend = "auto"
    with monkeypatch.context() as environment:
        environment.setenv("TARFLOW_FAST_BACKEND", "torch")
        assert {row["inverse_reason"] for row in info.blocks(model)} == asked
    model.double()
    assert {row["inverse_reason"] for row in info.blocks(model)} == {"z is a Tensor of torch.float64"}
    monkeypatch.setattr(native, "_load", lambda: native.NativeUnavailable("no compiler was found"))
    with pytest.warns(RuntimeWarning, match="no compiler was found"):
        assert {row["inverse_reason"] for row in info.blocks(model)} == {"no compiler was found"}


@pytest.mark.skipif(not native.available(), reason=native.reason() or "native")
def test_a_block_left_to_pytorch_is_told_once(fresh_warnings, recwarn):
    model = adapted()
    for _ in range(2):
        model.reverse(random_noise(model))
    (warning,) = recwarn
    assert warning.category is RuntimeWarning and str(warning.message) == (
        f"tarflow_fast inverts block 2 on 'torch' instead of 'cpu': {REASONS[2]} "
        "(tarflow_fast.info.blocks(model) lists every block)"
    )
    model.backend = "torch"
    model.reverse(random_noise(model))
    random_flow(dtype=torch.float64).reverse(random_noise(model, dtype=torch.float64))
    assert len(recwarn) == 1
    model.blocks[1].reverse(random_noise(model))
    assert str(recwarn[1].message).startswith(f"tarflow_fast inverts a block on 'torch' instead of 'cpu': {REASONS[1]}")
    model.backend = "cpu"
    with pytest.raises(RuntimeError, match=f"^block_inverse: backend 'cpu' cannot run: {REASONS[2]}$"):
        model.reverse(random_noise(model))


def test_info_of_a_flow_on_the_command_line(fresh_warnings, capsys):
    assert main(["info", "digits"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("tarflow_fast ") and "Blocks of the flow (cpu, float32)" in text
    assert text.count("inverse: ") == text.count("layers:  modules (not wanted for backend 'auto' on cpu tensors)") == 4
    assert main(["info", "digits", "--json"]) == 0
    assert [row["block"] for row in json.loads(capsys.readouterr().out)["blocks"]] == [0, 1, 2, 3]
    assert main(["info", "nowhere"]) == 2
    told = capsys.readouterr().err
    assert "open_flow: name must be a flow that ships (digits, fashion" in told and "got 'nowhere'" in told
