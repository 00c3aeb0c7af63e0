"""A whole layer, and a whole small flow, chained on compiled PTX in bf16 and judged by the error rule.

The kernels share scratch memory, counters and positions, so what one of them leaves behind is what the next one finds.
"""

import os

import numpy as np
import pytest
import torch
from compare import Judged, assert_accurate, same_bits
from flows import random_flow, random_noise, twin
from torch.nn import functional as F

from tarflow_fast.block import MetaBlock
from tarflow_fast.engines.triton import invert_graph
from tarflow_fast.engines.triton_graph import GraphWorkspace
from tarflow_fast.engines.weights import inspect
from tarflow_fast.transforms import Guidance

BF16, POSITION = torch.bfloat16, 70
SHAPES = [(128, 12, 1, 1, True), (128, 12, 2, 16, True)]  # C, D, B, W, guided
PUBLISHED = [(768, 12, 1, 1, False), (768, 12, 1, 16, True), (1024, 48, 1, 1, True), (1024, 48, 1, 16, False)]
if os.environ.get("TARFLOW_GPU_PROOF"):  # make gpu-proof
    SHAPES += PUBLISHED


@pytest.fixture(autouse=True)
def executed(machine):
    with torch.no_grad():
        yield
    assert machine.executed


def draw(generator, *shape):
    return torch.randn(shape, generator=generator)


def loaded(C, D, B, W, guided):
    """A workspace of a block of one layer that stands at POSITION, with a drawn cache, tokens and weights."""
    T, generator = 128, torch.Generator().manual_seed(C + W)
    block = MetaBlock(D, C, T, num_layers=1)
    for name, p in block.named_parameters():
        scale = p.shape[-1] ** -0.5 if p.ndim == 2 and "embed" not in name else 0.2
        p.copy_(scale * draw(generator, *p.shape) + ("norm.weight" in name))
    guidance = Guidance(1.5, "ab", attn_temp=0.6) if guided else Guidance()
    workspace = GraphWorkspace(inspect(block), B, guided, BF16, window=W)
    workspace.load(block.bijection, inspect(block), draw(generator, B, T, D), None, guidance)
    workspace.cache.copy_(draw(generator, *workspace.cache.shape))
    workspace.starts[1] = POSITION
    return workspace


def layer(workspace, x, kind):
    """h of the queries at POSITION .. POSITION + W, in PyTorch with products in `kind`."""
    wide, W, (_, _, R, H, _, E) = torch.promote_types(kind, torch.float32), workspace.W, workspace.cache.shape
    w, eps = workspace.weights, workspace.eps[0]
    here = slice(POSITION, POSITION + W)

    def linear(x, name):
        return F.linear(x.to(kind), w[f"{name}.weight"].to(kind), w[f"{name}.bias"].to(kind))

    def norm(x, name, eps):
        name = f"attn_blocks.0.{name}.norm"
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"].to(wide), w[f"{name}.bias"].to(wide), eps)

    h = linear(x.repeat(R // len(x), 1, 1)[:, here], "proj_in").to(wide) + workspace.pos_embed[here].to(wide)
    q, k, v = (
        linear(norm(h, "attention", eps[0]), "attn_blocks.0.attention.qkv").view(R, W, 3, H, E).permute(2, 0, 3, 1, 4)
    )
    keys, values = (
        torch.cat([old.to(kind), new], 2)
        for old, new in zip(workspace.cache[0, :, :, :, :POSITION], (k, v), strict=True)
    )
    mask = torch.ones(W, POSITION + W, dtype=torch.bool).tril(POSITION)
    scale = (workspace.scale / workspace.scale[0]).view(R, 1, 1, 1).to(kind)
    heads = F.scaled_dot_product_attention(q * scale, keys, values, mask).transpose(1, 2).flatten(2)
    h = h + linear(heads, "attn_blocks.0.attention.proj").to(wide)
    middle = F.gelu(linear(norm(h, "mlp", eps[1]), "attn_blocks.0.mlp.main.0"))
    return (h + linear(middle, "attn_blocks.0.mlp.main.2").to(wide)).flatten(0, 1)


@pytest.mark.parametrize("C, D, B, W, guided", SHAPES)
def test_a_layer(C, D, B, W, guided):
    workspace = loaded(C, D, B, W, guided)
    truth, plain = (layer(workspace, workspace.x.to(kind), kind) for kind in (torch.float64, BF16))
    workspace.net()
    assert_accurate("h", workspace.h, truth, plain)
    assert not workspace.scratch["counters"].any()


@pytest.mark.parametrize("C, D, B, W, guided", SHAPES[:2])
def test_a_layer_in_twenty_orders(C, D, B, W, guided, machine):
    def run(seed):
        machine.order = None if seed is None else np.random.default_rng(seed)
        workspace = loaded(C, D, B, W, guided)
        workspace.step()
        return workspace.h, workspace.x, workspace.sums, workspace.cache

    expected = run(None)
    for seed in range(20):
        assert all(same_bits(ours, theirs) for ours, theirs in zip(run(seed), expected, strict=True))


def test_a_small_flow():
    """Every token of every block of a small flow is solved, and x is that of reference.py."""
    flow = random_flow(channels=64, img_size=4, patch_size=2, num_blocks=2)  # 4 tokens of 4 numbers
    z, judged = random_noise(flow, B=24), Judged()
    exact, plain = twin(flow), twin(flow, torch.float32)
    got, true, rough = (z * flow.var.sqrt(), z.double() * exact.var.sqrt(), z * plain.var.sqrt())
    for number in reversed(range(len(flow.blocks))):
        got = invert_graph(flow.blocks[number].bijection, got, None, Guidance(), workspace_of(flow.blocks[number], 24))[
            0
        ]
        true = exact.blocks[number].reverse(true)
        with torch.autocast("cpu", BF16):
            rough = plain.blocks[number].reverse(rough)
    judged.add("x", got, true, rough.float())
    judged.check()


def workspace_of(block, B):
    return GraphWorkspace(inspect(block), B, False, BF16)
