"""The inverse by fused step kernels: whole blocks and models against reference.py, and when it is not used."""

import contextlib
import copy
import dataclasses
import inspect
import os
import warnings

import pytest
import torch
from compare import assert_accurate, same_bits
from flows import random_flow, random_noise, twin
from torch import nn

from tarflow_fast import reference
from tarflow_fast.block import MetaBlock
from tarflow_fast.engines.call import Call
from tarflow_fast.engines.triton import TritonEngine, invert_graph, prepare_graph
from tarflow_fast.engines.triton_graph import GraphWorkspace
from tarflow_fast.engines.weights import inspect as weights_of
from tarflow_fast.ops.registry import triton_missing, triton_refuses, warn_once
from tarflow_fast.transforms import Guidance

GUIDED = Guidance(1.5, "ab", attn_temp=0.6)
ANNEALED = Guidance(0.8, "a", attn_temp=1.7, annealed=True)
B, T, D = 3, 4, 5


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def triton_device(device):
    if why_not := triton_refuses(device, torch.float32) or triton_missing():
        pytest.skip(why_not)
    return device


def make_block(seed=0, flip=False, nvp=True, num_classes=0, num_layers=1, T=T, C=16):
    """A block with every parameter drawn. It is small, because the interpreter runs a program for each row and head.

    Its log-scales are one or two tenths. If they were twice as large, one token in 200 would have an error far above
    all others. Our arithmetic and PyTorch's would have it at different tokens, and the error rule would compare two
    accidents.
    """
    block = MetaBlock(D, C, T, flip, num_layers, head_size=16, nvp=nvp, num_classes=num_classes)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in block.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        is_matrix = parameter.ndim == 2 and "embed" not in name
        parameter.copy_(draw / parameter.shape[-1] ** 0.5 if is_matrix else 0.3 * draw)
        if "norm.weight" in name:
            parameter.add_(1.0)
    block.proj_out.weight.mul_(0.08)
    block.proj_out.bias.mul_(0.3)
    return block.requires_grad_(False)


def reference_block(block, dtype):
    """The same block in reference.py."""
    layers, (T, C) = len(block.attn_blocks), block.pos_embed.shape
    plain = reference.MetaBlock(D, C, T, block.flip, layers, block.nvp, block.num_classes, head_size=16)
    plain.load_state_dict(block.state_dict())
    return plain.to(dtype)


def noise(seed=1, rows=B, T=T):
    return torch.randn(rows, T, D, generator=torch.Generator().manual_seed(seed))


CASES = {  # the block, the guidance, and how many tokens a step solves
    "plain": ({}, Guidance(), 1),
    "flip-classes-guided": ({"flip": True, "num_classes": 3, "num_layers": 2}, GUIDED, 1),
    "shift-only-annealed": ({"nvp": False}, ANNEALED, 1),
    "annealed-scale": ({"flip": True, "C": 32}, ANNEALED, 1),
    "window": ({"num_classes": 3, "T": 4}, Guidance(), 3),
    "window-flip-guided": ({"flip": True, "T": 4}, Guidance(0.7, "b", attn_temp=0.6), 2),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_a_block_is_that_of_the_reference(case, storage, triton_device):
    config, guidance, W = CASES[case]
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[storage]
    if why_not := triton_refuses(triton_device, dtype):
        pytest.skip(why_not)
    if triton_device.type == "cpu" and storage == "fp16" and case not in ("flip-classes-guided", "window"):
        pytest.skip("two cases of this type are enough for an interpreter")
    block = make_block(**{"T": 3} | config).to(triton_device)
    T = block.pos_embed.size(0)
    # A log_det is one number a row. PyTorch's largest error, the measure of ours, is mere luck among 3 rows: 8 of 100
    # draws failed.
    rows = 24
    z = noise(rows=rows, T=T).to(triton_device)
    y = torch.arange(rows, device=triton_device) % 4 - 1 if block.num_classes else None
    kept = z.clone()
    autocast = torch.autocast(triton_device.type, dtype, enabled=storage != "fp32")
    arguments = (guidance.weight, guidance.what, guidance.attn_temp, guidance.annealed)
    truth = reference_block(block, torch.float64).to(triton_device).reverse(z.double(), y, *arguments)
    exact_log_det = copy.deepcopy(block).double().invert(z.double(), y, guidance, Call("torch"))[1]
    with autocast:
        plain_log_det = block.invert(z, y, guidance, Call("torch"))[1]
        plain = reference_block(block, torch.float32).to(triton_device).reverse(z, y, *arguments)
        workspace = GraphWorkspace(weights_of(block), rows, guidance.active, dtype, window=W)
        workspace.prepare()
        x, log_det = invert_graph(block.bijection, z, y, guidance, workspace)
    assert_accurate("x", x.cpu(), truth.cpu(), plain.cpu())
    assert_accurate("log_det", log_det.cpu(), exact_log_det.cpu(), plain_log_det.cpu())
    assert torch.equal(z, kept), "the caller's noise must not be written"
    # A guided net has no forward pass. Without guidance, the forward pass must give back the noise and -log_det.
    if not guidance.active:
        back, mean = reference_block(block, torch.float64).to(triton_device)(x.double(), y)
        slack = {"fp32": 1e-4, "fp16": 0.1, "bf16": 1.0}[storage]
        torch.testing.assert_close(back, z.double(), rtol=0, atol=slack)
        torch.testing.assert_close(-mean * T * D, log_det.double(), rtol=0, atol=slack * 3)


@pytest.mark.interpreter
def test_a_workspace_serves_every_block_and_remembers_nothing(triton_device):
    first, second = (make_block(seed, flip=bool(seed), T=3).to(triton_device) for seed in (0, 1))
    z, ticks = noise(T=3).to(triton_device), []
    workspace = prepare_graph(weights_of(first), z, Guidance())
    once = invert_graph(first.bijection, z, None, Guidance(), workspace, lambda: ticks.append(1))
    assert len(ticks) == 2
    other = invert_graph(second.bijection, z, None, Guidance(), workspace)
    assert not torch.equal(other[0], once[0])
    for block, expected in ((first, once), (second, other)):
        again = invert_graph(block.bijection, z, None, Guidance(), workspace)
        fresh = invert_graph(block.bijection, z, None, Guidance())
        assert all(map(same_bits, again, expected)) and all(map(same_bits, fresh, expected))
    with pytest.raises(ValueError, match=r"^invert_graph: workspace must be one of this block's shapes"):
        invert_graph(first.bijection, noise(rows=2, T=3).to(triton_device), None, Guidance(), workspace)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy, which warns
def test_a_row_that_overflows_leaves_the_others_alone(triton_device):
    block, z = make_block().to(triton_device), noise().to(triton_device)
    clean, clean_log_det = invert_graph(block.bijection, z, None, Guidance())
    z[1, 2] = torch.nan
    x, log_det = invert_graph(block.bijection, z, None, Guidance())
    assert x[1, 2:].isnan().all() and same_bits(x[1, :2], clean[1, :2]) and log_det[1].isnan()
    assert same_bits(x[[0, 2]], clean[[0, 2]]) and same_bits(log_det[[0, 2]], clean_log_det[[0, 2]])


@pytest.mark.interpreter
def test_no_rows_and_one_token(triton_device):
    block = make_block().to(triton_device)
    x, log_det = block.invert(noise(rows=0).to(triton_device), None, GUIDED, Call("triton"))
    assert x.shape == (0, T, D) and log_det.shape == (0,)
    short = make_block(T=1).to(triton_device)
    z = noise(T=1).to(triton_device)
    x, log_det = short.invert(z, None, Guidance(), Call("triton"))
    assert torch.equal(x, z) and x is not z and not log_det.any()


@pytest.mark.interpreter
def test_a_whole_model(triton_device):
    # At scale 0.3 some draws reach 1e8, and then the largest of a few errors is luck: 3 of 14 draws of noise exceeded
    # the rule. At 0.2 none of 12 did, and the worst took 0.78 of its bound.
    model = random_flow(img_size=(2, 6), num_classes=3, scale=0.2, backend="triton").to(triton_device)
    reference_model, z = twin(model).to(triton_device), random_noise(model, 16).to(triton_device)
    y, arguments = torch.arange(16, device=triton_device) % 4 - 1, {"guidance": 1.2, "attn_temp": 0.8}
    got, truth = model.reverse(z, y, **arguments), reference_model.reverse(z.double(), y, **arguments)
    plain = twin(model, torch.float32).to(triton_device).reverse(z, y, **arguments)
    assert_accurate("images", got.cpu(), truth.cpu(), plain.cpu())
    tokens, _, _ = model(model.sample(2, seed=5))
    drawn = torch.randn(2, *model.var.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close((tokens / model.var.sqrt()).cpu(), drawn, rtol=0, atol=1e-4)


# ---- stepping aside ------------------------------------------------------------------------------------------------


class Adapter(nn.Linear):
    pass


def with_adapter(block):
    block.attn_blocks[1].attention.qkv = Adapter(16, 48)


def with_hook(block):
    block.attn_blocks[0].register_forward_hook(lambda *_: None)


def with_parametrization(block):
    nn.utils.parametrizations.weight_norm(block.attn_blocks[0].mlp.main[0])


def with_tanh_gelu(block):
    block.attn_blocks[0].mlp.main[1] = nn.GELU(approximate="tanh")


def with_half_a_layer(block):
    block.attn_blocks[1].mlp.main.half()


def without_bias(block):
    block.attn_blocks[0].attention.proj = nn.Linear(16, 16, bias=False)


def with_own_forward(block):
    block.attn_blocks[0].mlp.forward = lambda h: h


def without_norm_weights(block):
    block.attn_blocks[0].mlp.norm = nn.LayerNorm(16, elementwise_affine=False)


OBJECTIONS = {
    with_adapter: "attn_blocks.1.attention.qkv is a Adapter",
    with_hook: "attn_blocks.0 has hooks",
    with_parametrization: "attn_blocks.0.mlp.main.0 is a ParametrizedLinear",
    with_tanh_gelu: "attn_blocks.0.mlp.main.1 is not the exact GELU",
    with_half_a_layer: "a parameter is torch.float16 on cpu, pos_embed torch.float32 on cpu",
    without_bias: "there is no attn_blocks.0.attention.proj.bias",
    without_norm_weights: "there is no attn_blocks.0.mlp.norm.weight",
    with_own_forward: "attn_blocks.0.mlp has a forward of its own",
}


def by_name(block, z, **choices):
    return block.invert(z, None, Guidance(), Call("triton", **choices))


@pytest.mark.interpreter
@pytest.mark.parametrize("change", OBJECTIONS, ids=lambda change: change.__name__)
def test_what_is_not_fused(change, triton_device):
    block = make_block(num_layers=2)
    change(block)
    block = block.to(triton_device)
    with pytest.raises(RuntimeError) as caught:
        by_name(block, noise().to(triton_device))
    said = str(caught.value).replace("cuda:0", "cpu").replace("on cuda", "on cpu")
    assert said == "block_inverse: backend 'triton' cannot run: " + OBJECTIONS[change]


def workspace_of(call):
    """The workspace that the engine keeps for a call that has run."""
    return call.state("triton", None).workspace


def refusal(block, z):
    return TritonEngine().why_not(block.bijection, weights_of(block), z, Call())


@pytest.mark.interpreter
def test_what_it_cannot_compute(triton_device):
    block, z = make_block().to(triton_device), noise().to(triton_device)
    assert refusal(block, z) == ""
    cannot = r"^block_inverse: backend 'triton' cannot run: "
    with pytest.raises(RuntimeError, match=cannot + "z is a Tensor of torch.float64$"):
        by_name(block.double(), z.double())
    block = block.float()
    with pytest.raises(RuntimeError, match=cannot + "it has no precision 'int8'$"):
        by_name(block, z, precision="int8")
    with pytest.raises(RuntimeError, match=cannot + "it has no gradient, and a differentiable inverse was asked for$"):
        by_name(block, z, differentiable=True)
    odd = MetaBlock(D, 48, T, num_layers=1, head_size=24).to(triton_device)
    assert refusal(odd, z) == "head size 24 is not 16, 32, 64 or 128, or the MLP no multiple of 16"


@pytest.mark.interpreter
def test_layers_may_share_weights(triton_device):
    block, z = make_block(T=3, num_layers=2).to(triton_device), noise(T=3).to(triton_device)
    first, second = block.attn_blocks[:2]
    second.attention.proj.weight, second.mlp = first.attention.proj.weight, first.mlp
    apart = copy.deepcopy(block)
    apart.load_state_dict({name: value.clone() for name, value in block.state_dict().items()}, assign=True)
    assert len([*apart.parameters()]) > len([*block.parameters()])
    assert same_bits(by_name(block, z)[0], by_name(apart, z)[0])
    workspace = prepare_graph(weights_of(block), z, Guidance())
    workspace.load(block.bijection, weights_of(block), z, None, Guidance())
    assert not any(weight.requires_grad for weight in workspace.weights.values())


@pytest.mark.interpreter
def test_precision_chooses_the_storage(triton_device):
    block, z = make_block().to(triton_device), noise().to(triton_device)
    with torch.autocast(triton_device.type, torch.float16):
        call = Call("triton", "fp32")
        x, _ = block.invert(z, None, Guidance(), call)
    assert workspace_of(call).dtype == torch.float32 and workspace_of(call).nbytes > 0
    assert same_bits(x, by_name(block, z)[0])


@pytest.mark.interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU a graph can be captured")
def test_without_a_graph_the_same_kernels_run(triton_device):
    block, z = make_block(T=3), noise(T=3)
    workspace = GraphWorkspace(weights_of(block), B, False, torch.float32)
    workspace.capture = True
    with pytest.warns(RuntimeWarning, match="^tarflow_fast runs its GPU inverse without a CUDA graph: "):
        workspace.prepare()
    assert workspace.graph is None
    assert same_bits(invert_graph(block.bijection, z, None, Guidance(), workspace)[0], by_name(block, z)[0])


@pytest.mark.interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="the test stands in for CUDA")
def test_one_graph_is_captured_and_replayed(triton_device, monkeypatch):
    """CUDA is asked to warm the kernels up, then to capture one graph per call, and then only to replay it."""
    block, z, seen = make_block(T=3), noise(T=3), []
    expected, workspace = by_name(block, z), GraphWorkspace(weights_of(block), B, False, torch.float32)
    step = workspace.step
    monkeypatch.setattr(workspace, "step", lambda: seen.append("step") or step())

    class Graph:
        def replay(self):
            seen.append("replay")
            step()

    @contextlib.contextmanager
    def within(*arguments, **options):
        capture = isinstance(arguments[0], Graph)
        if capture:
            signature.bind(*arguments, **options)
            seen.append(f"begin {options['capture_error_mode']}")
        yield
        seen.extend(["end"] * capture)

    signature = inspect.signature(torch.cuda.graph)
    for name, stand_in in {"CUDAGraph": Graph, "Stream": torch.device, "stream": within, "graph": within}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    workspace.capture = True
    workspace.prepare()
    workspace.prepare()
    assert seen == ["step", "begin thread_local", "step", "end"] and workspace.graph is not None
    for _ in range(2):
        seen.clear()
        assert all(map(same_bits, invert_graph(block.bijection, z, None, Guidance(), workspace), expected))
        assert seen == ["replay"] * 2, "every token but the last needs one replay"


@pytest.mark.interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="the table is changed for CPU tensors")
def test_kernels_that_cannot_be_prepared(triton_device, monkeypatch, fresh_warnings):
    """If triton was asked for by name, the call raises. auto leaves the block to PyTorch, and warns."""
    from tarflow_fast.engines import table
    from tarflow_fast.engines import triton as engine

    def fails(*arguments):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(engine, "prepare_graph", fails)
    monkeypatch.setattr(table, "TABLE", dataclasses.replace(table.TABLE, auto={"cpu": ("triton", "torch")}))
    block, z = make_block(T=3), noise(T=3)
    with pytest.raises(RuntimeError, match=r"^out of shared memory$"):
        by_name(block, z)
    with pytest.warns(RuntimeWarning, match=r"inverts on 'torch' instead of 'triton' \(cpu tensors\): out of shared"):
        x, _ = block.invert(z, None, Guidance())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the next block or call does not warn again
        block.invert(z, None, Guidance())
    assert same_bits(x, block.invert(z, None, Guidance(), Call("torch"))[0])
    said = r"^block_inverse: precision 'fp32' needs an engine that computes in it: out of shared memory$"
    warn_once.cache_clear()
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match=said) as raised:
        warnings.simplefilter("error")  # nothing may be inverted on 'torch' instead
        block.half().invert(z.half(), None, Guidance(), Call(precision="fp32"))
    assert str(raised.value.__cause__) == "out of shared memory"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_without_an_interpreter_it_needs_a_gpu():
    with pytest.raises(RuntimeError, match=r"^block_inverse: backend 'triton' cannot run: it needs GPU tensors"):
        by_name(make_block(), noise())
