"""block_inverse: the native engine against float64, against plain PyTorch, and against itself, bit for bit.

TARFLOW_SWEEP=2000 draws that many blocks instead of a few, in every test that draws.
"""

import copy
import ctypes
import os
from contextlib import nullcontext

import pytest
import torch
from compare import assert_accurate, same_bits
from engine_cases import BlockCase, draw_case, in_torch, random_block
from flows import random_flow, random_noise
from torch import nn

from tarflow_fast import MetaBlock, TarFlow, native
from tarflow_fast.inverse import Guidance, InverseCall, invert_block
from tarflow_fast.inverse.eligibility import inspect, why_not
from tarflow_fast.inverse.engine import Engine
from tarflow_fast.inverse.plan import Plan, Sizes, Workspace, run_pass
from tarflow_fast.ops import explain
from tarflow_fast.verify import error_and_bound

SWEEP = int(os.environ.get("TARFLOW_SWEEP", 12))
PRECISIONS = ("fp32", "bf16", "int8")
pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "native")


def run(case, precision="fp32", **options):
    block, z, y, guidance = case
    return Engine(precision, **options).invert(block, z, y, guidance)


def small_case(seed=0, B=5, **sizes):
    generator = torch.Generator().manual_seed(seed)
    sizes = dict(token_size=6, channels=128, num_tokens=21, num_layers=2, num_classes=3, flip=True) | sizes
    block = random_block(generator, **sizes)
    z = torch.randn(B, sizes["num_tokens"], sizes["token_size"], generator=generator)
    y = torch.arange(B) % 4 - 1 if sizes["num_classes"] else None
    return BlockCase(block, z, y, Guidance(1.5, "ab", 0.8, True))


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
    """Against float64 on the weights it stores, int8 is held to the rule of bf16, the precision of its cache."""
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
        x, log_det = invert_block(block, z, case.y, case.guidance)
        assert x.dtype == dtype and log_det.dtype == torch.float32
        widened = case._replace(block=copy.deepcopy(block).float(), z=z.float())
        expected = run(widened, precision)
        assert torch.equal(x, expected[0].to(dtype)) and torch.equal(log_det, expected[1])
    with torch.autocast("cpu", torch.bfloat16):
        x, _ = invert_block(case.block, case.z, case.y, case.guidance)
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
    for channels, head_size in ((128, 64), (96, 32), (144, 48)):  # heads that do and do not divide among the threads
        case = small_case(channels=channels, head_size=head_size, B=9)
        threads(1)
        x, log_det = run(case, precision)
        sizes = Sizes.of(case.block, inspect(case.block), precision)
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
    """One row, whose threads go on from any stage at which another number of them stopped."""
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
    strange = torch.full_like(case.z[:1], torch.inf)  # a neighbour that overflows
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
    first = engine.invert(*case)[0]
    assert all(same_bits(engine.invert(*case)[0], first) for _ in range(1000))


def test_the_first_run_in_a_used_workspace_finds_nothing_of_the_last():
    case, engine = small_case(), Engine("fp32")
    engine.invert(case.block, torch.full_like(case.z, torch.nan), case.y, case.guidance)
    assert same_bits(engine.invert(*case)[0], run(case)[0])


# ---- windows -------------------------------------------------------------------------------------------------------


def net(case, precision, cuts, rows=3):
    """ab of every token of `rows` rows, the sequence cut into passes at `cuts`."""
    block, T = case.block, case.z.size(1)
    weights = inspect(block)
    sizes = Sizes.of(block, weights, precision)
    plan, space = Plan(sizes).pack(weights), Workspace(sizes, rows, window=max(b - a for a, b in cuts))
    tokens = case.z[:rows].flip(1) if block.flip else case.z[:rows]
    parts = [run_pass(plan, space, tokens[:, a:b], a, labels=case.y[:rows], flip=block.flip) for a, b in cuts]
    assert sum(b - a for a, b in cuts) == T
    return torch.cat(parts, dim=1)


@pytest.mark.every_isa
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("channels, head_size", [(128, 64), (96, 24)])
def test_windows_have_the_bits_of_single_tokens(precision, channels, head_size):
    case = small_case(num_tokens=70, channels=channels, head_size=head_size)
    single = net(case, precision, [(t, t + 1) for t in range(70)])
    for cuts in ([(0, 70)], [(0, 3), (3, 40), (40, 41), (41, 70)], [(t, t + 10) for t in range(0, 70, 10)]):
        assert same_bits(net(case, precision, cuts), single), cuts


@pytest.mark.every_isa
@pytest.mark.parametrize("precision", PRECISIONS)
def test_windows_of_few_rows_have_the_same_bits_on_any_number_of_threads(precision, threads):
    case = small_case(num_tokens=12, channels=256)
    for rows, cuts in ((1, [(t, t + 1) for t in range(12)]), (1, [(0, 2), (2, 4), (4, 12)]), (2, [(0, 1), (1, 12)])):
        threads(1)
        single = net(case, precision, cuts, rows)
        for number in (2, 3, 4):
            threads(number)
            assert same_bits(net(case, precision, cuts, rows), single), (rows, cuts, number)


@pytest.mark.every_isa
def test_one_window_is_the_forward_net():
    case = small_case(num_tokens=70)
    block, tokens = copy.deepcopy(case.block).double(), case.z[:3].double().flip(1)
    with torch.no_grad():
        h = block.embed(tokens, block.pos_embed.flip(0), block.class_embedding(case.y[:3]))
        for layer in block.attn_blocks:
            h = layer(h)
        truth = block.proj_out(h)
    assert (net(case, "fp32", [(0, 70)]) - truth).abs().max() < 2e-6


@pytest.mark.every_isa
@pytest.mark.parametrize("precision", PRECISIONS)
def test_later_tokens_of_a_window_cannot_touch_earlier_ones(precision):
    case = small_case(num_tokens=40)
    clean = net(case, precision, [(0, 40)])
    for last in (0, 15, 16, 30):
        z = case.z.clone()
        z[:, : 40 - last - 1] = torch.nan  # flipped: the tokens after `last`
        assert same_bits(net(case._replace(z=z), precision, [(0, 40)])[:, : last + 1], clean[:, : last + 1])


def test_a_window_may_be_run_again_with_other_values():
    case = small_case()
    weights = inspect(case.block)
    sizes = Sizes.of(case.block, weights, "fp32")
    plan, space = Plan(sizes).pack(weights), Workspace(sizes, 3, window=21)
    tokens = case.z[:3].contiguous()
    right = run_pass(plan, space, tokens, 0)
    run_pass(plan, space, tokens[:, :8] * torch.nan, 0)
    run_pass(plan, space, tokens[:, :8], 0)
    assert same_bits(run_pass(plan, space, tokens[:, 8:], 8), right[:, 8:])


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_class_embeddings_are_those_of_the_labels_or_their_mean(dtype):
    """With everything else zero, h is the class embedding and proj_out, an identity, shows it."""
    generator = torch.Generator().manual_seed(0)
    block = MetaBlock(32, 64, 3, False, 1, head_size=16, num_classes=20)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.class_embed.copy_(torch.randn(20, 1, 64, generator=generator))
        block.proj_out.weight.copy_(torch.eye(64))
    block.to(dtype)
    weights, y = inspect(block), torch.tensor([4, -1, 0, -7])
    sizes = Sizes.of(block, weights, "fp32")
    plan, space = Plan(sizes).pack(weights), Workspace(sizes, 8)
    embeddings = block.class_embed.detach().float()[:, 0]
    mean = embeddings.mean(dim=0)
    right = torch.stack([embeddings[4], mean, embeddings[0], mean])
    tokens = torch.zeros(4, 1, 32)
    assert same_bits(run_pass(plan, space, tokens, 0, labels=y)[:, 0], right)
    assert same_bits(run_pass(plan, space, tokens, 0)[:, 0], mean.expand(4, -1))
    guided = run_pass(plan, space, tokens, 0, labels=y, guided=True)[:, 0]
    assert same_bits(guided[::2], right) and same_bits(guided[1::2], mean.expand(4, -1))


def test_a_label_past_the_classes_is_refused():
    block, z = random_flow(num_classes=3).blocks[0], torch.randn(2, 16, 4)
    with pytest.raises(ValueError, match=r"^block_inverse: y must be below num_classes = 3$"):
        Engine("fp32").invert(block, z, torch.tensor([0, 3]), Guidance())
    many, y = torch.randn(600, 16, 4), torch.zeros(600, dtype=torch.int64)  # more than one group of rows
    y[-1] = 3
    with pytest.raises(ValueError, match=r"^block_inverse: y must be below num_classes = 3$"):
        Engine("fp32").invert(block, many, y, Guidance())
    with pytest.raises(ValueError, match=r"^block_inverse: y must be int64 on cpu, got torch.float32 on cpu$"):
        invert_block(block, z, torch.tensor([0.0, 1.0]), Guidance())


def test_labels_are_read_once(monkeypatch):
    """Another thread may write the caller's while the engine runs: it then neither mixes nor reads past the table."""
    block, z, y = random_flow(num_classes=3).blocks[0], torch.randn(3, 16, 4), torch.tensor([0, 1, 2])
    right, run_native = Engine("fp32").invert(block, z, y, Guidance())[0], Engine._run

    def scribble(*arguments):
        y.fill_(1 << 40)
        return run_native(*arguments)

    monkeypatch.setattr(Engine, "_run", scribble)
    assert same_bits(Engine("fp32").invert(block, z, y, Guidance())[0], right)


# ---- which engine runs ---------------------------------------------------------------------------------------------


def test_every_block_of_a_model_is_inverted_natively_by_default():
    model = TarFlow(1, 8, 2, 64, 2, 1)
    assert [why_not(block) for block in model.blocks] == ["", ""]
    rows = {row["backend"]: row for row in explain() if row["op"] == "block_inverse"}
    assert rows["cpu"]["available"] and rows["torch"]["available"] and not rows["cuda"]["available"]


@pytest.mark.filterwarnings("ignore:tarflow_fast inverts")
def test_what_a_hook_does_to_a_later_block_is_seen():
    """Block 1 comes first, through its modules; its hook lays out block 0's last weight otherwise, or doubles it."""
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
        lambda b: b.attn_blocks[0].mlp.main.__setitem__(1, nn.GELU("tanh")), "attn_blocks.0.mlp.main is not Linear",
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
def test_the_engine_steps_aside_and_says_why(name, untold):
    change, reason = STRANGERS[name]
    block = replaced(change)
    assert why_not(block).startswith(reason)
    z = torch.randn(2, 21, 6, dtype=block.pos_embed.dtype)
    with pytest.raises(RuntimeError, match="block_inverse: backend 'cpu' cannot run: "):
        invert_block(block, z, None, Guidance(), InverseCall("cpu"))
    with pytest.raises(RuntimeError, match="precision 'int8' needs an engine that computes in it: "):
        invert_block(block, z, None, Guidance(), InverseCall(precision="int8"))
    if name not in ("mixed dtypes", "a forward of its own"):  # those run nowhere
        float64 = name == "float64"  # no precision of the engine's: nothing about this block to warn of
        with nullcontext() if float64 else pytest.warns(RuntimeWarning, match=f"instead of 'cpu': {reason}"):
            x, _ = invert_block(block, z, None, Guidance())
        assert same_bits(x, invert_block(block, z, None, Guidance(), InverseCall("torch"))[0])


def test_a_differentiable_inverse_is_not_native():
    case = small_case()
    z = case.z.clone().requires_grad_()
    x, _ = invert_block(case.block, z, case.y, case.guidance, InverseCall(differentiable=True))
    assert x.requires_grad
    with pytest.raises(RuntimeError, match="cannot run: it has no gradient"):
        invert_block(case.block, z, case.y, case.guidance, InverseCall("cpu", differentiable=True))


@torch.no_grad()
def test_the_environment_chooses(monkeypatch):
    case = small_case()
    native_x, torch_x = run(case)[0], in_torch(case)[0]
    assert not same_bits(native_x, torch_x)
    for name, expected in (("torch", torch_x), ("cpu", native_x), ("", native_x)):
        monkeypatch.setenv("TARFLOW_FAST_BACKEND", name)
        assert same_bits(invert_block(*case)[0], expected)


def test_weights_are_read_anew_by_every_call():
    case = small_case()
    before = invert_block(*case)[0]
    with torch.no_grad():
        case.block.attn_blocks[0].mlp.main[2].weight.data.mul_(1.5)  # through .data: no version counter moves
    after = invert_block(*case)[0]
    assert not same_bits(before, after) and same_bits(after, run(case)[0])


def test_a_lazy_minus_sign_is_seen():
    model = random_flow(channels=64)
    z = random_noise(model)
    assert same_bits(model.blocks[0].reverse(torch._neg_view(z)), model.blocks[0].reverse(-z))
