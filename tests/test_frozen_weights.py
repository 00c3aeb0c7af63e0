"""With frozen weights, a backward pass computes only the input's gradient: no kernel runs for a weight's gradient."""

import collections

import pytest
import torch
from flows import random_flow, random_images
from torch.utils._python_dispatch import TorchDispatchMode

from tarflow_fast.ops.registry import OPS

LAYERS, BLOCKS = 2, 2
KERNELS = {"attention_backward": ("query", "key"), "layer_norm": ("backward",), "bias_gelu": ("backward",)}
KERNELS |= {"bias_residual": ("backward",), "columns": ("sum",), "affine": ("backward",)}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return function(*arguments, **(options or {}))


class Launches:
    """Stands in front of a kernel and counts its launches by their flags."""

    def __init__(self, name, kernel, seen):
        self.name, self.kernel, self.seen = name, kernel, seen

    def __getitem__(self, grid):
        def launch(*arguments, **settings):
            flags = {key: settings[key] for key in ("WEIGHTS", "BIAS", "INPUT") if key in settings}
            self.seen[(self.name, *sorted(flags.items()))] += 1
            return self.kernel[grid](*arguments, **settings)

        return launch


@pytest.fixture
def seen(device, monkeypatch):
    if why_not := OPS["attention"].why_not("triton", device, torch.float32):
        pytest.skip(why_not)
    from tarflow_fast.kernels.triton import affine, attention_backward, bias_gelu, bias_residual, columns, layer_norm

    found, modules = collections.Counter(), (affine, attention_backward, bias_gelu, bias_residual, columns, layer_norm)
    for module in modules:
        name = module.__name__.rpartition(".")[2]
        for part in KERNELS[name]:
            kernel = getattr(module, part + "_kernel")
            monkeypatch.setattr(module, part + "_kernel", Launches(f"{name} {part}", kernel, found))
    return found


def backward(device, seen, frozen, dtype):
    """The kernel launches of the backward pass, its number of matrix products, and dx."""
    model = random_flow(img_size=4, layers_per_block=LAYERS, num_blocks=BLOCKS, backend="triton").to(device)
    model.requires_grad_(not frozen)
    x = random_images(model).to(device).requires_grad_()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        z, _, logdets = model(x)
        loss = model.get_loss(z, logdets)
    seen.clear()
    with Products() as products:
        loss.backward()
    assert all((parameter.grad is None) == frozen for parameter in model.parameters())
    return dict(seen), products.count, x.grad


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_frozen_weights_launch_nothing_for_a_weight(dtype, seen, device):
    every, products, dx = backward(device, seen, False, dtype)
    frozen, fewer_products, same_dx = backward(device, seen, True, dtype)
    layers = LAYERS * BLOCKS
    expected = {
        ("affine backward",): BLOCKS,
        ("attention_backward query",): layers,
        ("attention_backward key",): layers,
    }
    expected |= {("layer_norm backward", ("WEIGHTS", False)): 2 * layers}
    expected |= {("bias_gelu backward", ("BIAS", False)): layers}
    if dtype != torch.float32:  # the input's dtype is not the stream's, so its gradient is written; nothing else is
        expected |= {("bias_residual backward", ("BIAS", False), ("INPUT", True)): 2 * layers}
    assert frozen == expected
    assert every[("columns sum",)] == 5 * layers, "unfrozen, a layer sums the gradients of two norms and three biases"
    # A layer has four Linears, and a block has proj_in and proj_out. Each needs dx and dw, or dx alone if frozen.
    linears = 4 * layers + 2 * BLOCKS
    assert (products, fewer_products) == (2 * linears, linears)
    assert torch.equal(dx, same_dx)
