"""A sampling step in an arbitrary order of the tokens gives the values of the permuted problem, bit for bit.

The order is a permutation in device memory: order[i] is the place in x, z and pos_embed of the i-th token that the net
sees. So a step on (x, z, pos_embed) in that order must give what a step on (x, z, pos_embed)[order] gives when it takes
the tokens from first to last.
"""

import copy

import pytest
import torch
from compare import same_bits
from test_graph_inverse import ANNEALED, GUIDED, make_block, no_grad, noise, triton_device  # noqa: F401
from test_step_kernels import ORDERS, STARTS, draw, dtype  # noqa: F401

from tarflow_fast.engines.triton import invert_graph
from tarflow_fast.engines.triton_graph import GraphWorkspace
from tarflow_fast.engines.weights import inspect
from tarflow_fast.net import Order
from tarflow_fast.transforms import Guidance

pytestmark = pytest.mark.interpreter
T, B = 10, 3
ORDER = ORDERS["any"]  # it is not its own inverse, so reading it the wrong way round fails


def table(order, device):
    return torch.tensor(order, dtype=torch.int32, device=device)


@pytest.mark.parametrize("W", [1, 4])
def test_embed(W, dtype, device):  # noqa: F811
    from tarflow_fast.kernels.triton.step_embed import embed

    D, C = 12, 48
    x, weight, bias = draw(B, T, D, device=device), draw(C, D, device=device, dtype=dtype), draw(C, device=device)
    pos, classes = draw(T, C, device=device), draw(B, C, device=device)
    now = torch.tensor(STARTS[B], dtype=torch.int32, device=device)

    def run(x, pos, order):
        h = torch.full((B * W, C), torch.nan, device=device)
        embed(
            x=x, weight=weight, bias=bias, pos_embed=pos, classes=classes, h=h, starts=now.repeat(2, 1),
            order=table(order, device), W=W,
        )  # fmt: skip
        return h

    got, straight = run(x, pos, ORDER), range(T)
    assert same_bits(got, run(x[:, ORDER].contiguous(), pos[ORDER].contiguous(), straight))
    assert got.isfinite().all() and not same_bits(got, run(x, pos, straight))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("W", [1, 4])
def test_affine_inverse(W, guided, dtype, device):  # noqa: F811
    from tarflow_fast.kernels.triton import tuning_step
    from tarflow_fast.kernels.triton.affine_inverse import affine_inverse

    D, C, R = 20, 32, B * (1 + guided)
    h, guidance = draw(R * W, C, device=device, scale=0.3), draw(2, T, device=device).abs()
    weight, bias = draw(2 * D, C, device=device, dtype=dtype, scale=C**-0.5), draw(2 * D, device=device)
    x, z = draw(B, T, D, device=device), draw(B, T, D, device=device)
    starts = torch.tensor(STARTS[B] * (1 + guided), dtype=torch.int32, device=device).repeat(2, 1)

    def run(x, z, order):
        sums = torch.zeros(tuning_step.tail_tiles(C, D, dtype), B, T, device=device)
        solved = x.clone()
        affine_inverse(
            h=h, weight=weight, bias=bias, z=z, x=solved, sums=sums, starts=starts.clone(),
            order=table(order, device), guidance=guidance, W=W, guided=guided,
        )  # fmt: skip
        return solved, sums

    got, sums = run(x, z, ORDER)
    expected, its_sums = run(x[:, ORDER].contiguous(), z[:, ORDER].contiguous(), range(T))
    assert same_bits(got[:, ORDER], expected) and same_bits(sums, its_sums)
    solved = (got != x).any(dim=2)
    for row, start in enumerate(STARTS[B]):
        assert solved[row].nonzero().flatten().tolist() == sorted(ORDER[start + 1 : start + 1 + W])


CASES = {
    "plain": ({}, None, Guidance(), 1),
    "guided": ({"num_classes": 3, "num_layers": 2}, [2, -1, 0], GUIDED, 1),
    "shift-only": ({"nvp": False}, None, ANNEALED, 1),
    "window": ({}, None, GUIDED, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_block(case, triton_device):  # noqa: F811
    config, labels, guidance, W = CASES[case]
    order = [2, 0, 3, 1]
    block, z = make_block(T=4, **config).to(triton_device), noise(T=4).to(triton_device)
    y = None if labels is None else torch.tensor(labels, device=triton_device)
    permuted = copy.deepcopy(block)
    permuted.pos_embed.copy_(block.pos_embed[order])
    shuffled = copy.deepcopy(block)
    shuffled.order = Order(4, places=order)
    workspace = GraphWorkspace(inspect(block), B, guidance.active, torch.float32, window=W)
    expected, log_det = invert_graph(permuted.bijection, z[:, order].contiguous(), y, guidance, workspace)
    got, its_log_det = invert_graph(shuffled.bijection, z, y, guidance, workspace)
    assert same_bits(got[:, order], expected) and same_bits(its_log_det, log_det)
    assert got.isfinite().all() and same_bits(got[:, order[0]], z[:, order[0]])
    assert not (got == z).all(dim=2)[:, order[1:]].any(), "every later token must have been solved"
