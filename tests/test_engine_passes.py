"""What a pass of the native engine computes: windows of tokens, and the class embeddings that labels stand for."""

import copy

import pytest
import torch
from compare import same_bits
from engine_cases import small_case
from flows import random_flow

from tarflow_fast import MetaBlock, native
from tarflow_fast.engines.cpu import Engine
from tarflow_fast.engines.cpu_native import PRECISIONS, Following, Plan, Sizes, Workspace, run_pass
from tarflow_fast.engines.cpu_steps import CpuSteps
from tarflow_fast.engines.weights import inspect
from tarflow_fast.transforms import Guidance

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "native")


def net(case, precision, cuts, rows=3):
    """ab of every token of `rows` rows. Each pair in `cuts` is the range of tokens of one pass."""
    block, T = case.block, case.z.size(1)
    weights = inspect(block)
    sizes = Sizes.of(weights, block.transform, precision)
    plan, space = Plan(sizes).pack(weights), Workspace(sizes, rows, window=max(b - a for a, b in cuts))
    tokens = case.z[:rows].flip(1) if block.flip else case.z[:rows]
    order = torch.arange(T - 1, -1, -1, dtype=torch.int32) if block.flip else None
    parts = [run_pass(plan, space, tokens[:, a:b], a, labels=case.y[:rows], order=order) for a, b in cuts]
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
        z[:, : 40 - last - 1] = torch.nan  # the block flips, so these come after `last`
        assert same_bits(net(case._replace(z=z), precision, [(0, 40)])[:, : last + 1], clean[:, : last + 1])


def test_a_window_may_be_run_again_with_other_values():
    case = small_case()
    weights = inspect(case.block)
    sizes = Sizes.of(weights, case.block.transform, "fp32")
    plan, space = Plan(sizes).pack(weights), Workspace(sizes, 3, window=21)
    tokens = case.z[:3].contiguous()
    right = run_pass(plan, space, tokens, 0)
    run_pass(plan, space, tokens[:, :8] * torch.nan, 0)
    run_pass(plan, space, tokens[:, :8], 0)
    assert same_bits(run_pass(plan, space, tokens[:, 8:], 8), right[:, 8:])


@pytest.mark.every_isa
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("guided", [False, True])
def test_rows_at_places_of_their_own_have_the_same_bits(precision, guided, threads):
    """Some rows, each from a place of its own on, and the tokens that follow: as the whole inversion finds them."""
    case = small_case(num_tokens=40)
    block, y, guidance = case.block, case.y[:4], Guidance(1.5, "ab", 0.8, True) if guided else Guidance()
    z = case.z[:4].float()
    weights = inspect(block)
    with torch.no_grad():
        x, log_det = Engine(precision).invert(block.bijection, z, y, guidance)
    x, z = block.order.take(x), block.order.take(z)
    sizes = Sizes.of(weights, block.transform, precision)
    plan, space = Plan(sizes).pack(weights), Workspace(sizes, 4 * (1 + guided), window=13, threads=4)
    steps = CpuSteps(plan, space, block.bijection, y, 4, guidance)
    every, sums = torch.arange(4), torch.zeros(4, 39, dtype=torch.float64)
    for number, place in enumerate(range(0, 39, 13)):
        threads(number + 1)
        begin = torch.full((4,), place)
        v, sums[:, place : place + 13], _ = steps.step(
            x[:, place : place + 13], z[:, place + 1 : place + 14], begin, every
        )
        assert same_bits(v, x[:, place + 1 : place + 14])
    assert same_bits(sum(sums.unbind(1)).float(), log_det)
    rows, begin = torch.tensor([0, 2, 3]), torch.tensor([28, 3, 17])
    inputs = begin[:, None] + torch.arange(9)
    for number in (1, 2, 3):
        threads(number)
        spoiled = x[rows[:, None], inputs].clone()
        spoiled[1, 5:] = torch.nan  # later tokens of its own row, and the other rows, are none of its business
        v, _, _ = steps.step(spoiled, z[rows[:, None], inputs + 1], begin, rows)
        right = x[rows[:, None], inputs + 1]
        assert same_bits(v[[0, 2]], right[[0, 2]]) and same_bits(v[1, :5], right[1, :5]) and v[1, 5:].isnan().all()
        v, _, _ = steps.step(x[rows[:, None], inputs], z[rows[:, None], inputs + 1], begin, rows)
        assert same_bits(v, right)


def test_places_and_slots_out_of_range_are_refused():
    case = small_case(num_tokens=12)
    weights = inspect(case.block)
    sizes = Sizes.of(weights, case.block.transform, "fp32")
    plan, space, tokens = Plan(sizes).pack(weights), Workspace(sizes, 3, window=4), case.z[:2, :4].float()
    noise = Following(tokens)
    for position, slots, following in (
        (torch.tensor([0, 9]), None, None),
        (torch.tensor([0, -1]), None, None),
        (torch.tensor([0, 8]), None, noise),  # nothing follows the last token
        (0, torch.tensor([1, 0]), None),
        (0, torch.tensor([1, 1]), None),
        (0, torch.tensor([0, 3]), None),
        (0, torch.tensor([-1, 0]), None),
    ):
        with pytest.raises(ValueError, match=r"^run_pass: 2 rows of 4 tokens from .* do not fit"):
            run_pass(plan, space, tokens, position, slots=slots, following=following)
    with pytest.raises(ValueError, match=r"^run_pass: slots must be \(2,\) of torch.int64, got \(3,\) of torch.int64$"):
        run_pass(plan, space, tokens, 0, slots=torch.arange(3))
    with pytest.raises(ValueError, match=r"^run_pass: following must hold noise"):
        run_pass(plan, space, tokens, 0, following=Following(tokens[:1]))


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_class_embeddings_are_those_of_the_labels_or_their_mean(dtype):
    """All other weights are zero, so h is the class embedding, and proj_out is the identity, so the result shows h."""
    generator = torch.Generator().manual_seed(0)
    block = MetaBlock(32, 64, 3, False, 1, head_size=16, num_classes=20)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.class_embed.copy_(torch.randn(20, 1, 64, generator=generator))
        block.proj_out.weight.copy_(torch.eye(64))
    block.to(dtype)
    weights, y = inspect(block), torch.tensor([4, -1, 0, -7])
    sizes = Sizes.of(weights, block.transform, "fp32")
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
        Engine("fp32").invert(block.bijection, z, torch.tensor([0, 3]), Guidance())
    many, y = torch.randn(600, 16, 4), torch.zeros(600, dtype=torch.int64)  # the rows make more than one group
    y[-1] = 3
    with pytest.raises(ValueError, match=r"^block_inverse: y must be below num_classes = 3$"):
        Engine("fp32").invert(block.bijection, many, y, Guidance())
    with pytest.raises(ValueError, match=r"^block_inverse: y must be int64 on cpu, got torch.float32 on cpu$"):
        block.invert(z, torch.tensor([0.0, 1.0]), Guidance())


def test_labels_are_read_once(monkeypatch):
    """Another thread may change the caller's labels while the engine runs.

    The engine must neither mix old and new labels nor read past its table of classes.
    """
    block, z, y = random_flow(num_classes=3).blocks[0], torch.randn(3, 16, 4), torch.tensor([0, 1, 2])
    right, run_native = Engine("fp32").invert(block.bijection, z, y, Guidance())[0], Engine._run

    def scribble(*arguments):
        y.fill_(1 << 40)
        return run_native(*arguments)

    monkeypatch.setattr(Engine, "_run", scribble)
    assert same_bits(Engine("fp32").invert(block.bijection, z, y, Guidance())[0], right)


def test_annealed_guidance_of_windows_is_that_of_tokens_one_by_one():
    """g_i = weight i / (T - 1) for the token after i - 1; a sequence of one token has no later one, and no division."""
    guidance, like = Guidance(3.0, annealed=True), torch.zeros(1)
    for T in (1, 2, 5):
        together = guidance.strength(0, T, T, like)
        alone = torch.tensor([guidance.strength(i, 1, T, like) for i in range(T)])
        torch.testing.assert_close(torch.as_tensor(together).float().reshape(T), alone)
        assert alone[0] == 3.0 / max(T - 1, 1)
