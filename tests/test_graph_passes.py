"""A pass of the Triton engine over given tokens: the parameters of PyTorch's passes, however the tokens are cut.

PyTorch's passes in float64 are the truth, and in float32, or under autocast, the measure of the error rule.
"""

import copy

import pytest
import torch
from compare import assert_accurate, same_bits
from test_graph_inverse import ANNEALED, GUIDED, D, make_block, no_grad, noise, triton_device  # noqa: F401

from tarflow_fast.engines.call import Call
from tarflow_fast.engines.table import open_passes
from tarflow_fast.net import Order
from tarflow_fast.ops.registry import triton_refuses
from tarflow_fast.solvers.sequential import solve_sequentially
from tarflow_fast.transforms import Guidance

pytestmark = pytest.mark.interpreter
T, ROWS = 5, 24


def labels(block, rows=ROWS):
    return torch.arange(rows, device=block.pos_embed.device) % 4 - 1 if block.num_classes else None


def passes_of(backend, block, z, guidance=GUIDED, precision=None):
    return open_passes(block.bijection, z, labels(block, len(z)), guidance, Call(backend, precision))


def in_windows(passes, tokens, cuts):
    """The parameters of all tokens (B, T, P D), as many at a time as `cuts` says."""
    ends = torch.tensor(cuts).cumsum(0).tolist()
    return torch.cat([passes.run(tokens[:, end - W : end], end - W) for W, end in zip(cuts, ends, strict=True)], dim=1)


def on_torch(kind, block, tokens, guidance):
    """PyTorch's parameters in one pass; kind: the dtype of the net."""
    tokens = tokens.to(kind)
    return passes_of("torch", copy.deepcopy(block).to(kind), tokens, guidance).run(tokens, 0)


CASES = {
    "plain": ({}, None, Guidance(), [T]),
    "classes-flip-guided": ({"num_classes": 3, "flip": True, "num_layers": 2, "T": 4}, None, GUIDED, [2, 2]),
    "order-classes": ({"num_classes": 3, "C": 32, "T": 4}, [2, 0, 3, 1], Guidance(), [1] * 4),
    "order-annealed-a": ({"T": 4}, [2, 0, 3, 1], ANNEALED, [1, 3]),
    "shift-guided": ({"nvp": False}, None, Guidance(0.7, "b", attn_temp=0.6), [T]),
    "one-token": ({"T": 1}, None, Guidance(), [1]),
}


@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_pytorch(case, storage, triton_device):  # noqa: F811
    config, places, guidance, cuts = CASES[case]
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[storage]
    if why_not := triton_refuses(triton_device, dtype):
        pytest.skip(why_not)
    if triton_device.type == "cpu" and storage == "fp16" and case != "order-annealed-a":
        pytest.skip("one case of this type is enough for an interpreter")
    block = make_block(**{"T": T} | config).to(triton_device)
    if places is not None:
        block.order = Order(len(places), places=places)
    tokens = noise(rows=ROWS, T=sum(cuts)).to(triton_device)
    truth = on_torch(torch.float64, block, tokens, guidance)
    with torch.autocast(triton_device.type, dtype, enabled=storage != "fp32"):
        plain = on_torch(torch.float32, block, tokens, guidance)
        got = in_windows(passes_of("triton", block, tokens, guidance), tokens, cuts)
    assert got.dtype == torch.float32
    assert_accurate("parameters", got.cpu(), truth.cpu(), plain.cpu())


def test_the_sequential_solver_finds_the_inverse(triton_device):  # noqa: F811
    """Every pass continues the cache of those before, through `run` as through the engine's own loop."""
    block = make_block(T=3, flip=True, num_classes=3).to(triton_device)
    z = noise(rows=ROWS, T=3).to(triton_device)
    exact, plain = (
        copy.deepcopy(block).to(kind).invert(z.to(kind), labels(block), GUIDED, Call("torch"))
        for kind in (torch.float64, torch.float32)
    )
    got = solve_sequentially(passes_of("triton", block, z), block.bijection, z)
    for name, *values in zip(("x", "log_det"), got, exact, plain, strict=True):
        assert_accurate(name, *(value.cpu() for value in values))


def test_a_pass_may_be_run_again_with_other_values(triton_device):  # noqa: F811
    """What it wrote is overwritten, tokens past it in the cache count for nothing, and another block's passes and the
    engine's own loop leave the cache alone."""
    block, tokens = make_block(T=T, num_classes=3).to(triton_device), noise(rows=3, T=T).to(triton_device)
    first, rest = tokens[:, :2], tokens[:, 2:]
    fresh, passes = (passes_of("triton", block, tokens) for _ in range(2))
    expected = fresh.run(first, 0), fresh.run(rest, 2)
    passes.run(tokens + 3, 0)
    assert not same_bits(passes.run(rest, 2), expected[1])
    assert same_bits(passes.run(first, 0), expected[0])
    other = passes_of("triton", make_block(1, T=T).to(triton_device), tokens)
    other.run(tokens, 0)
    passes.solve(tokens)
    assert same_bits(passes.run(rest, 2), expected[1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy
def test_neither_later_tokens_nor_other_rows_touch_a_token(triton_device):  # noqa: F811
    block, tokens = make_block(T=T).to(triton_device), noise(rows=3, T=T).to(triton_device)
    clean = passes_of("triton", block, tokens).run(tokens, 0)
    tokens[1, 3], tokens[2] = 1e6, torch.nan
    got = passes_of("triton", block, tokens).run(tokens, 0)
    assert same_bits(got[0], clean[0]) and same_bits(got[1, :3], clean[1, :3])
    assert (got[1, 3:] != clean[1, 3:]).any(dim=1).all() and got[2].isnan().all()


def test_precision_and_storage(triton_device):  # noqa: F811
    """The precision asked for holds under autocast, and half a model is computed in half: the error says in which."""
    block, tokens = make_block(T=T).to(triton_device), noise(rows=3, T=T).to(triton_device)
    expected = passes_of("triton", block, tokens).run(tokens, 0)
    with torch.autocast(triton_device.type, torch.float16):
        assert same_bits(passes_of("triton", block, tokens, precision="fp32").run(tokens, 0), expected)
        rounded = passes_of("triton", block, tokens).run(tokens, 0)
    assert rounded.dtype == torch.float32 and 1e-5 < (rounded - expected).abs().max() < 1e-2
    half = passes_of("triton", copy.deepcopy(block).half(), tokens.half()).run(tokens.half(), 0)
    assert half.dtype == torch.float32 and 1e-5 < (half - expected).abs().max() < 1e-2


def test_tokens_that_do_not_fit(triton_device):  # noqa: F811
    block, tokens = make_block(T=T).to(triton_device), noise(rows=3, T=T).to(triton_device)
    passes = passes_of("triton", block, tokens)
    shape = rf"^run: tokens must have shape \(3, W, {D}\), got "
    for wrong in (tokens[:2], tokens[..., 1:], tokens[0]):
        with pytest.raises(ValueError, match=shape):
            passes.run(wrong, 0)
    for position in (-1, 3):
        with pytest.raises(ValueError, match=rf"^run: position must be from 0 to 2 for 3 of 5 tokens, got {position}$"):
            passes.run(tokens[:, :3], position)
    assert passes.run(tokens[:, :0], T).shape == (3, 0, 2 * D)
    assert passes_of("triton", block, tokens[:0]).run(tokens[:0], 0).shape == (0, T, 2 * D)
