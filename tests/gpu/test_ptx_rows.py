"""The kernels of training and density that work on rows: their compiled PTX against float64 by the error rule."""

import pytest
import torch
from compare import Judged
from torch.nn import functional as F

ROWS, N = 37, 100


def gradients(function, dout, *inputs):
    """[result, gradient of each input]."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def judge(function, got, dout, *inputs):
    """got: result and gradients, in the order of the inputs. The vectors' gradients are small: they are drawn on."""
    truth, plain = gradients(function, dout.double(), *(x.double() for x in inputs)), gradients(function, dout, *inputs)
    judged = Judged()
    for number, (ours, exact, theirs) in enumerate(zip(got, truth, plain, strict=True)):
        judged.add(f"output {number}", ours, exact, theirs)
    judged.check()


@pytest.fixture
def tensors(dtype):
    """x, dout and room for a result and for a gradient, all (ROWS, N); gain, shift, and room for theirs, all (N,)."""
    x, dout = torch.randn(ROWS, N).to(dtype), torch.randn(ROWS, N).to(dtype)
    gain, shift = (1 + 0.2 * torch.randn(N)).to(dtype), torch.randn(N).to(dtype)
    return (
        x,
        dout,
        torch.empty_like(x),
        torch.empty_like(x),
        gain,
        shift,
        torch.empty_like(gain),
        torch.empty_like(gain),
    )


def test_bias_gelu(tensors, machine):
    from tarflow_fast.kernels.triton.bias_gelu import bias_gelu_backward, bias_gelu_forward

    x, dout, out, dx, _, bias, _, dbias = tensors
    machine.undefine(out, dx, dbias)
    bias_gelu_forward(x, bias, out)
    bias_gelu_backward(dout, x, bias, dx, dbias)
    assert machine.all_defined(out, dx, dbias)
    judge(lambda x, bias: F.gelu(x + bias), (out, dx, dbias), dout, x, bias)


def test_bias_residual(tensors, machine):
    from tarflow_fast.kernels.triton.bias_residual import bias_residual_backward, bias_residual_forward

    x, dout, out, _, _, bias, _, dbias = tensors
    residual = torch.randn(ROWS, N)
    out = torch.empty_like(residual)
    machine.undefine(out, dbias)
    bias_residual_forward(x, bias, residual, out)
    bias_residual_backward(dout, dbias=dbias)
    assert machine.all_defined(out, dbias)

    def function(bias):
        return residual.to(bias.dtype if bias.dtype == torch.float64 else torch.float32) + (x.to(bias.dtype) + bias)

    truth = residual.double() + x.double() + bias.double()
    judged = Judged()
    judged.add("out", out, truth, residual + (x.float() + bias.float()))
    judged.add("dbias", dbias, dout.double().sum(0), dout.sum(0))
    judged.check()


def test_layer_norm(tensors, machine):
    from tarflow_fast.kernels.triton.layer_norm import layer_norm_backward, layer_norm_forward

    x, dout, out, dx, gain, shift, dgain, dshift = tensors
    mean, rstd = torch.empty(ROWS), torch.empty(ROWS)
    machine.undefine(out, mean, rstd, dx, dgain, dshift)
    layer_norm_forward(x, gain, shift, out, mean, rstd, 1e-5)
    layer_norm_backward(dout, x, gain, mean, rstd, dx, dgain, dshift)
    assert machine.all_defined(out, mean, rstd, dx, dgain, dshift)
    judge(lambda x, w, b: F.layer_norm(x, (N,), w, b, 1e-5), (out, dx, dgain, dshift), dout, x, gain, shift)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_affine(scale, flip, dtype, machine):
    from tarflow_fast.kernels.triton.affine import affine_backward, affine_forward

    from tarflow_fast.ops.affine import affine_ref

    B, T, D = 3, 200, 12  # the tokens of a row fall into two tiles
    x, dz = torch.randn(B, T, D).to(dtype), torch.randn(B, T, D).to(dtype)
    ab, dlog_det = (0.5 * torch.randn(B, T, D * (1 + scale))).to(dtype), torch.randn(B)
    z, log_det, dx, dab = torch.empty_like(x), torch.empty(B), torch.empty_like(x), torch.empty_like(ab)
    machine.undefine(z, dx, dab)
    affine_forward(x, ab, z, log_det, flip)
    affine_backward(dz, dlog_det, x, ab, dx, dab, flip)
    assert machine.all_defined(z, dx, dab)

    def run(kind):
        leaves = [tensor.to(kind).requires_grad_() for tensor in (x, ab)]
        z, log_det = affine_ref(*leaves, flip)
        found = torch.autograd.grad((z * dz.to(kind)).sum() + (log_det * dlog_det.to(log_det.dtype)).sum(), leaves)
        return z.detach(), log_det.detach(), *found

    judged, wide = Judged(), torch.float32 if dtype != torch.float32 else dtype
    for name, got, truth, plain in zip(
        ("z", "log_det", "dx", "dab"), (z, log_det, dx, dab), run(torch.float64), run(wide), strict=True
    ):
        if name != "log_det" or scale:
            judged.add(name, got, truth, plain.to(got.dtype))
    if scale:
        assert abs(log_det - run(torch.float64)[1]).max() < 1e-2
        del judged.outputs["log_det"]  # three numbers are too few for the rule
    judged.check()
