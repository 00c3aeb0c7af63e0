"""The fused layer: numbers, gradients and training of a whole model against the reference, and when it is not used."""

import os
import re

import pytest
import torch
from compare import same_bits
from flows import random_flow, random_images, twin
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from tarflow_fast.engines.fused import fused_layers, takes_fused_layer, why_not_fused
from tarflow_fast.ops.registry import OPS
from tarflow_fast.verify.layer import verify_layer
from tarflow_fast.verify.rule import largest_error_and_bound

CONFIG = dict(in_channels=3, img_size=(4, 10), patch_size=2, channels=64, num_blocks=2, num_classes=3)
Y = torch.tensor([1, -1])
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def model(device):
    if why_not := OPS["attention"].why_not("triton", device, torch.float32):
        pytest.skip(why_not)
    model = random_flow(**CONFIG).to(device)
    model.backend = "triton"
    return model


@pytest.fixture
def calls(monkeypatch):
    """Counts the kernel launches of each op."""
    from tarflow_fast.kernels.triton import attention, bias_gelu, bias_residual, layer_norm

    count = dict.fromkeys(("attention", "bias_gelu", "bias_residual", "layer_norm"), 0)

    def counting(name, function):
        def call(*arguments, **named):
            count[name] += 1
            return function(*arguments, **named)

        return call

    for module in (attention, bias_gelu, bias_residual, layer_norm):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, name + "_forward", counting(name, getattr(module, name + "_forward")))
    return count


def images_for(model):
    return random_images(model).to(model.var.device)


def everything(model, x, parameters=True):
    """[z, logdets, dx, gradients of the parameters ...], where the gradients are those of the training loss."""
    x = x.detach().requires_grad_()
    z, _, logdets = model(x, Y.to(x.device))
    wanted = [x, *(model.parameters() if parameters else ())]
    return [z.detach(), logdets.detach(), *torch.autograd.grad(model.get_loss(z, logdets), wanted)]


def judged(model, x, values=None):
    """The values of `everything` with the log-determinants of 24 images, because two are too few numbers to judge."""
    values = values or everything(model, x)
    images = torch.randn(24, *x.shape[1:], generator=torch.Generator().manual_seed(3)).to(x)
    with torch.no_grad():
        values[1] = model(images, Y.repeat(12).to(x.device))[2]
    return values


def assert_within_rule(got, truth, plain):
    """The error rule by tensor: a model carries the rounding of one number to all that follow it."""
    for number, (ours, exact, theirs) in enumerate(zip(got, truth, plain, strict=True)):
        error, allowed = largest_error_and_bound(ours, exact, theirs)
        assert error <= allowed, f"tensor {number}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.interpreter
def test_model_is_the_reference(model, calls, device):
    reference, plain, x = twin(model).to(device), twin(model, torch.float32).to(device), images_for(model)
    got = everything(model, x)
    assert calls == {"attention": 2, "bias_gelu": 2, "bias_residual": 4, "layer_norm": 4}
    assert_within_rule(judged(model, x, got), judged(reference, x.double()), judged(plain, x))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, model, calls, device):
    if why_not := OPS["attention"].why_not("triton", device, dtype):
        pytest.skip(why_not)
    plain, x = twin(model, torch.float32).to(device), images_for(model)
    truth = judged(twin(model).to(device), x.double())
    with torch.autocast(device.type, dtype):
        got = everything(model, x)
        assert calls["attention"] == 2
        got, reference = judged(model, x, got), judged(plain, x)
    assert {t.dtype for t in got} == {torch.float32}
    assert all((ours - exact).abs().max() > 1e-7 for ours, exact in zip(got[:3], truth[:3], strict=True)), (
        "autocast was not honoured: the result is too exact for 16 bits"
    )
    assert_within_rule(got, truth, reference)


@pytest.mark.interpreter
def test_frozen_weights_give_the_same_input_gradients(model, device, monkeypatch):
    x = images_for(model)
    expected = everything(model, x)[2]
    model.requires_grad_(False)
    from tarflow_fast.kernels.triton import columns

    monkeypatch.setattr(columns, "sum_kernel", None)  # no weight's gradient is summed
    assert same_bits(everything(model, x, parameters=False)[2], expected)


@pytest.mark.interpreter
def test_compile_without_a_graph_break(model, calls):
    torch._dynamo.reset()
    x = images_for(model)
    got = everything(torch.compile(model, fullgraph=True, backend="aot_eager"), x, parameters=False)
    assert calls["attention"] >= 2
    torch.testing.assert_close(got, everything(model, x, parameters=False), rtol=1e-5, atol=1e-6)


@pytest.mark.interpreter
def test_data_parallel(model, device, tmp_path):
    expected = everything(model, images_for(model))[3:]
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        z, _, logdets = parallel(images_for(model), Y.to(device))
        model.get_loss(z, logdets).backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


@pytest.mark.interpreter
def test_auto_follows_the_variable(model, calls, device, monkeypatch):
    model.backend, x = "auto", images_for(model)
    z = model(x)[0]
    assert calls["attention"] == (0 if device.type == "cpu" else 2)
    monkeypatch.setenv("TARFLOW_FAST_BACKEND", "triton")
    before = calls["attention"]
    torch.testing.assert_close(model(x)[0], z, rtol=1e-5, atol=1e-5)
    assert calls["attention"] == before + 2
    monkeypatch.setenv("TARFLOW_FAST_BACKEND", "torch")
    model(x)
    assert calls["attention"] == before + 2


@pytest.mark.interpreter
def test_verify_holds(model, device):
    rows = verify_layer(device.type)
    assert {row["name"] for row in rows} == {"attention", "layer_norm", "bias_gelu", "bias_residual"}
    assert all(row["ok"] for row in rows), rows


# ---- stepping aside --------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.delta = base, nn.Linear(64, 192)

    def forward(self, h):
        return self.base(h) + 0.1 * self.delta(h)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Marked(torch.Tensor):
    """A stand-in for quantized and sharded weights, whose tensors have a class of their own."""


def patch(layer):
    original = layer.mlp.norm.forward
    layer.mlp.norm.forward = lambda h: original(h) * 2


def replace(module, name, value):
    setattr(module, name, value)


CHANGES = {
    "attention.qkv is a Adapter": lambda layer: replace(layer.attention, "qkv", Adapter(layer.attention.qkv)),
    "attention.proj has hooks": lambda layer: layer.attention.proj.register_forward_hook(lambda m, i, o: 2 * o),
    "attention.norm has hooks": lambda layer: layer.attention.norm.register_forward_pre_hook(lambda m, i: (2 * i[0],)),
    "attention has hooks": lambda layer: layer.attention.register_forward_hook(lambda m, i, o: 2 * o),
    "mlp has hooks": lambda layer: layer.mlp.register_full_backward_hook(lambda m, i, o: None),
    "mlp.norm has a forward of its own": patch,
    "mlp.main.0 is a ParametrizedLinear": lambda layer: parametrize.register_parametrization(
        layer.mlp.main[0], "weight", Double()
    ),
    "mlp.main.2 is a ParametrizedLinear": lambda layer: weight_norm(layer.mlp.main[2]),
    "mlp.main.1 is a SiLU": lambda layer: replace(layer.mlp.main, "1", nn.SiLU()),
    "mlp.main.1 is not the exact GELU": lambda layer: replace(layer.mlp.main, "1", nn.GELU("tanh")),
    "mlp.main is not Linear, exact GELU, Linear": lambda layer: layer.mlp.main.append(nn.Dropout()),
    "mlp.norm has a bias that is a NoneType": lambda layer: replace(layer.mlp, "norm", nn.LayerNorm(64, bias=False)),
    "attention.norm has shape (10, 64), not (64,)": lambda layer: replace(
        layer.attention, "norm", nn.LayerNorm((10, 64))
    ),
    "attention.proj has a weight that is a Marked": lambda layer: replace(
        layer.attention.proj, "weight", nn.Parameter(layer.attention.proj.weight.detach().as_subclass(Marked))
    ),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_changed_layer_is_left_to_its_modules(reason, fresh_warnings):
    model = random_flow(**CONFIG)
    layer, other = model.blocks[0].attn_blocks[0], model.blocks[1].attn_blocks[0]
    assert why_not_fused(layer) == ""
    CHANGES[reason](layer)
    assert why_not_fused(layer) == reason and why_not_fused(other) == ""
    with pytest.warns(RuntimeWarning, match=f"by its modules instead of fused kernels: {re.escape(reason)} "):
        assert not takes_fused_layer(layer, torch.zeros(1, 2, 64), "triton")
    assert not takes_fused_layer(layer, torch.zeros(1, 2, 64), "triton"), "the warning must be given once"


def test_hooks_on_every_module_are_honoured():
    layer = random_flow(**CONFIG).blocks[0].attn_blocks[0]
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    assert why_not_fused(layer) == "every module has hooks"
    handle.remove()
    assert why_not_fused(layer) == ""


@pytest.mark.interpreter
def test_changed_layers_change_the_model(model, calls, fresh_warnings):
    """One layer has an adapter and runs by its modules, the other runs fused, and both change the result."""
    layer, x = model.blocks[1].attn_blocks[0], images_for(model)
    layer.attention.qkv = Adapter(layer.attention.qkv).to(x.device)
    with pytest.warns(RuntimeWarning, match="instead of fused kernels: attention.qkv is a Adapter"):
        z = model(x)[0]
    assert calls["attention"] == 1
    model.backend = "torch"
    torch.testing.assert_close(z, model(x)[0], rtol=1e-5, atol=1e-5)


def test_a_changed_layer_is_compiled_without_a_graph_break(fresh_warnings):
    layer, h = random_flow(**CONFIG).blocks[0].attn_blocks[0], torch.randn(2, 10, 64)
    layer.attention.qkv = Adapter(layer.attention.qkv)
    expected = layer(h)
    with pytest.warns(RuntimeWarning, match="instead of fused kernels: attention.qkv is a Adapter"):
        compiled = torch.compile(fused_layers, fullgraph=True, backend="eager")([layer], h, "triton")
    torch.testing.assert_close(compiled, expected, rtol=1e-6, atol=1e-6)


def test_cpu_tensors_are_left_to_the_modules():
    if INTERPRETED:
        pytest.skip("the interpreter takes CPU tensors")
    model, x = random_flow(**CONFIG), random_images(random_flow(**CONFIG))
    layer, h = model.blocks[0].attn_blocks[0], torch.randn(2, 10, 64)
    assert not takes_fused_layer(layer, h, "auto") and not takes_fused_layer(layer, h, "cpu")
    assert takes_fused_layer(layer, h, "triton"), "if asked for by name, the ops say why they cannot run"
    with pytest.raises(RuntimeError, match=r"^layer_norm: backend 'triton' cannot run"):
        model.backend = "triton"
        model(x)


def test_other_mixtures_of_dtypes_are_left_to_the_modules():
    layer = random_flow(**CONFIG).blocks[0].attn_blocks[0]
    assert takes_fused_layer(layer, torch.zeros(1, 2, 64, dtype=torch.bfloat16), "triton")
    layer.attention.norm.bfloat16()
    assert takes_fused_layer(layer, torch.zeros(1, 2, 64, dtype=torch.bfloat16), "triton")
    assert not takes_fused_layer(layer, torch.zeros(1, 2, 64), "triton")
    layer.float().attention.proj.half()
    assert not takes_fused_layer(layer, torch.zeros(1, 2, 64, dtype=torch.bfloat16), "triton")


def test_transforms_take_the_modules():
    layer = random_flow(**CONFIG).blocks[0].attn_blocks[0]
    seen = []
    torch.func.vmap(lambda h: seen.append(takes_fused_layer(layer, h, "triton")) or h)(torch.zeros(2, 3, 64))
    assert seen == [False]
