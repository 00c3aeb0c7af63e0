"""block_inverse: the native engine is compared with float64, with plain PyTorch, and bit for bit with itself.

TARFLOW_SWEEP=2000 makes every test that draws blocks draw 2000 of them instead of a few.
"""

import copy
import ctypes
import os
from contextlib import nullcontext

import pytest
import torch
from compare import assert_accurate, same_bits
from engine_cases import draw_case, given, in_torch, refusal, run, small_case
from flows import random_flow, random_noise
from torch import nn

from tarflow_fast import TarFlow, native
from tarflow_fast.engines.call import Call
from tarflow_fast.engines.cpu import Engine
from tarflow_fast.engines.cpu_native import Plan, Sizes, Workspace
from tarflow_fast.engines.weights import inspect
from tarflow_fast.ops import explain
from tarflow_fast.transforms import Guidance
from tarflow_fast.verify.rule import error_and_bound

SWEEP = int(os.environ.get("TARFLOW_SWEEP", 12))
PRECISIONS = ("fp32", "bf16", "int8")
pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "native")


# ---- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.every_isa
def test_error_rule_over_drawn_blocks():
    worst = {"fp32": (0.0, -1), "bf16": (0.0, -1)}
    for seed in range(SWEEP):
        case = draw_case(seed)
        truth = in_torch(case, torch.float64)
        for precision in worst:
            plain = in_torch(case, autocast=precision == "bf16")
            for name, ours, exact, theirs in zip(("x", "log_det"), run(case, precision), truth, plain, strict=True):
                error, bound = error_and_bound(ours, exact, theirs)
                ratio = (error / bound.clamp(min=1e-30)).max().item()
                worst[precision] = max(worst[precision], (ratio, seed))
                if SWEEP < 100:
                    assert_accurate(f"{name} of case {seed} in {precision}", ours, exact, theirs)
    print(f"\n{native.isa()}: {SWEEP} blocks, (worst share of the bound, case): {worst}")
    assert max(worst.values())[0] <= 1.0, worst


@pytest.mark.every_isa
def test_int8_is_the_block_with_rounded_weights():
    """int8 is compared with float64 on the rounded weights that it stores.

    It must meet the bound of bf16, because its cache is bf16.
    """
    for seed in range(1000, 1000 + max(SWEEP // 4, 6)):
        case = draw_case(seed)
        rounded = copy.deepcopy(case.block)
        for layer in rounded.attn_blocks:
            for linear in (layer.attention.qkv, layer.attention.proj, layer.mlp.main[0], layer.mlp.main[2]):
                weight = linear.weight.data
                scale = weight.abs().amax(dim=1, keepdim=True) / 127
                weight.copy_((weight / scale).round() * scale)
        same = case._replace(block=rounded)
        truth, plain = in_torch(same, torch.float64), in_torch(same, autocast=True)
        for name, ours, exact, theirs in zip(("x", "log_det"), run(case, "int8"), truth, plain, strict=True):
            assert_accurate(f"{name} of case {seed}", ours, exact, theirs)


@pytest.mark.every_isa
def test_bf16_and_half_models_follow_their_dtype():
    case = small_case()
    for dtype, precision in ((torch.bfloat16, "bf16"), (torch.float16, "fp32")):
        block, z = copy.deepcopy(case.block).to(dtype), case.z.to(dtype)
        x, log_det = block.invert(z, case.y, case.guidance)
        assert x.dtype == dtype and log_det.dtype == torch.float32
        widened = case._replace(block=copy.deepcopy(block).float(), z=z.float())
        expected = run(widened, precision)
        assert torch.equal(x, expected[0].to(dtype)) and torch.equal(log_det, expected[1])
    with torch.autocast("cpu", torch.bfloat16):
        x, _ = case.block.invert(case.z, case.y, case.guidance)
    assert x.dtype == torch.float32 and same_bits(x, run(case, "bf16")[0])


def test_log_det_is_that_of_the_forward_pass():
    case = small_case()._replace(guidance=Guidance())
    x, log_det = run(case)
    with torch.no_grad():
        z, mean = case.block.double()(x.double(), case.y)
    assert (z - case.z).abs().max() < 1e-4
    assert torch.allclose(-mean * x[0].numel(), log_det.double(), atol=1e-4)


# ---- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.every_isa
@pytest.mark.parametrize("precision", PRECISIONS)
def test_bits_do_not_depend_on_threads_split_or_grouping(precision, threads):
    for channels, head_size in ((128, 64), (96, 32), (144, 48)):  # heads can or cannot be divided evenly among threads
        case = small_case(channels=channels, head_size=head_size, B=9)
        threads(1)
        x, log_det = run(case, precision)
        sizes = Sizes.of(inspect(case.block), case.block.transform, precision)
        three_rows = Plan.bytes_of(sizes) + Workspace.bytes_of(sizes, 6, threads=4)
        for number in (1, 2, 3, 4):
            threads(number)
            for options in ({"split": "columns"}, {"split": "rows"}, {"memory_limit": three_rows}):
                again = run(case, precision, **options)
                assert same_bits(x, again[0]) and same_bits(log_det, again[1]), (number, options)


@pytest.mark.every_isa
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("guided", [False, True])
def test_bits_of_few_rows_whose_threads_share_sums(precision, guided, threads, monkeypatch):
    """The bits of one row do not change when a call stops at any stage and goes on with another number of threads."""
    for sizes in (dict(channels=128), dict(channels=256), dict(channels=160, head_size=32)):
        case = small_case(B=1, num_tokens=9, num_classes=0, **sizes)
        case = case._replace(guidance=Guidance(1.5, attn_temp=0.8) if guided else Guidance())
        threads(1)
        x, log_det = run(case, precision, split="columns")
        for number in (2, 3, 4, 6):
            threads(number)
            again = run(case, precision, split="columns")
            assert same_bits(x, again[0]) and same_bits(log_det, again[1]), number

        def stop_and_go(engine, job, *_):
            plan, stage = engine._plan, ctypes.c_int64(0)
            arguments, turn = (ctypes.byref(job), ctypes.byref(stage), 0.0), 0
            while stage.value < 8 * (plan.sizes.layers + 2):
                before, turn = stage.value, turn + 1
                number = (1, 2, 4, 3, 2, 1, 1, 4)[turn % 8]
                assert plan.library.tf_invert(plan.handle, engine._workspace.handle, *arguments, number) == 0
                assert stage.value in (before + 1, before + 2)

        threads(4)
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_run", stop_and_go)
            again = run(case, precision, split="columns")
        assert same_bits(x, again[0]) and same_bits(log_det, again[1])


@pytest.mark.every_isa
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_has_the_same_bits_in_any_company(precision):
    case = small_case(B=7)
    x, log_det = run(case, precision)
    order = torch.tensor([4, 0, 6, 6, 2])
    strange = torch.full_like(case.z[:1], torch.inf)  # this neighbouring row overflows
    mixed = case._replace(z=torch.cat([strange, case.z[order]]), y=torch.cat([case.y[:1], case.y[order]]))
    got = run(mixed, precision)
    assert same_bits(got[0][1:], x[order]) and same_bits(got[1][1:], log_det[order])
    assert not torch.isfinite(got[0][0]).all()
    for row in range(7):
        alone = case._replace(z=case.z[row : row + 1], y=case.y[row : row + 1])
        assert same_bits(run(alone, precision)[0][0], x[row])


@pytest.mark.every_isa
def test_a_thousand_runs_have_the_same_bits():
    case, engine = small_case(num_tokens=4, num_layers=1), Engine("fp32")
    first = engine.invert(*given(case))[0]
    assert all(same_bits(engine.invert(*given(case))[0], first) for _ in range(1000))


def test_the_first_run_in_a_used_workspace_finds_nothing_of_the_last():
    case, engine = small_case(), Engine("fp32")
    engine.invert(case.block.bijection, torch.full_like(case.z, torch.nan), case.y, case.guidance)
    assert same_bits(engine.invert(*given(case))[0], run(case)[0])


# ---- which engine runs ---------------------------------------------------------------------------------------------


def test_every_block_of_a_model_is_inverted_natively_by_default():
    model = TarFlow(1, 8, 2, 64, 2, 1)
    assert [refusal(block) for block in model.blocks] == ["", ""]
    rows = {row["backend"]: row for row in explain() if row["op"] == "block_inverse"}
    assert rows["cpu"]["available"] and rows["torch"]["available"] and not rows["cuda"]["available"]


@pytest.mark.filterwarnings("ignore:tarflow_fast inverts")
def test_what_a_hook_does_to_a_later_block_is_seen():
    """Block 1 is inverted first, by its modules, because it has a hook. The hook changes the last Linear of block 0.

    It gives the weight another layout, or it puts a `Scaled` in the place of the Linear.
    """
    model = random_flow()
    z, last = random_noise(model), model.blocks[0].proj_out
    layout, scaled = last.weight.data.t().contiguous().t(), Scaled(64, last.out_features)
    scaled.weight, scaled.bias = last.weight, last.bias
    for change in (lambda: setattr(last.weight, "data", layout), lambda: setattr(model.blocks[0], "proj_out", scaled)):
        hook = model.blocks[1].proj_in.register_forward_hook(lambda *_, change=change: change())
        x = model.reverse(z)
        hook.remove()
        assert (x - model.reverse(z)).abs().max() < 1e-5


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(change):
    block = small_case().block
    change(block)
    return block


STRANGERS = {
    "a subclass of Linear": (
        lambda b: b.attn_blocks[1].attention.__setattr__("qkv", Scaled(128, 384)),
        "attn_blocks.1.attention.qkv is a Scaled",
    ),
    "a hook": (lambda b: b.proj_in.register_forward_hook(lambda *_: None), "proj_in has hooks"),
    "a pre-hook": (lambda b: b.attn_blocks[0].mlp.register_forward_pre_hook(lambda *_: None), "attn_blocks.0.mlp has"),
    "a parametrization": (
        lambda b: nn.utils.parametrizations.weight_norm(b.proj_out), "proj_out is a ParametrizedLinear",
    ),
    "tanh GELU": (
        lambda b: b.attn_blocks[0].mlp.main.__setitem__(1, nn.GELU("tanh")),
        "attn_blocks.0.mlp.main.1 is not the exact GELU",
    ),
    "another epsilon": (
        lambda b: setattr(b.attn_blocks[0].mlp.norm, "eps", 1e-6), "attn_blocks.0.mlp.norm has eps 1e-06",
    ),
    "float64": (lambda b: b.double(), "its parameters are torch.float64"),
    "mixed dtypes": (lambda b: b.proj_in.bfloat16(), "a parameter is torch.bfloat16 on cpu, pos_embed torch.float32"),
    "a forward of its own": (
        lambda b: setattr(b.proj_in, "forward", lambda x: x), "proj_in has a forward of its own",
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", STRANGERS)
def test_the_engine_steps_aside_and_says_why(name, fresh_warnings):
    change, reason = STRANGERS[name]
    block = replaced(change)
    assert refusal(block).startswith(reason)
    z = torch.randn(2, 21, 6, dtype=block.pos_embed.dtype)
    with pytest.raises(RuntimeError, match="block_inverse: backend 'cpu' cannot run: "):
        block.invert(z, None, Guidance(), Call("cpu"))
    with pytest.raises(RuntimeError, match="precision 'int8' needs an engine that computes in it: "):
        block.invert(z, None, Guidance(), Call(precision="int8"))
    if name not in ("mixed dtypes", "a forward of its own"):  # no engine runs those two
        float64 = name == "float64"  # the engine never computes in float64, so this block gives no warning
        with nullcontext() if float64 else pytest.warns(RuntimeWarning, match=f"instead of 'cpu': {reason}"):
            x, _ = block.invert(z, None, Guidance())
        assert same_bits(x, block.invert(z, None, Guidance(), Call("torch"))[0])


def test_a_differentiable_inverse_is_not_native():
    case = small_case()
    z = case.z.clone().requires_grad_()
    x, _ = case.block.invert(z, case.y, case.guidance, Call(differentiable=True))
    assert x.requires_grad
    with pytest.raises(RuntimeError, match="cannot run: it has no gradient"):
        case.block.invert(z, case.y, case.guidance, Call("cpu", differentiable=True))


@torch.no_grad()
def test_the_environment_chooses(monkeypatch):
    case = small_case()
    native_x, torch_x = run(case)[0], in_torch(case)[0]
    assert not same_bits(native_x, torch_x)
    for name, expected in (("torch", torch_x), ("cpu", native_x), ("", native_x)):
        monkeypatch.setenv("TARFLOW_FAST_BACKEND", name)
        assert same_bits(case.block.invert(*case[1:])[0], expected)


def test_weights_are_read_anew_by_every_call():
    case = small_case()
    before = case.block.invert(*case[1:])[0]
    with torch.no_grad():
        case.block.attn_blocks[0].mlp.main[2].weight.data.mul_(1.5)  # .data moves no version counter
    after = case.block.invert(*case[1:])[0]
    assert not same_bits(before, after) and same_bits(after, run(case)[0])


def test_a_lazy_minus_sign_is_seen():
    model = random_flow(channels=64)
    z = random_noise(model)
    assert same_bits(model.blocks[0].reverse(torch._neg_view(z)), model.blocks[0].reverse(-z))
