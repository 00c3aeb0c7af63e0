"""bias_gelu: what follows the first Linear of an MLP, in one pass (arXiv 2412.06329, section 2).

    out = u Phi(u),   u = x + bias,   Phi(u) = (1 + erf(u / sqrt(2))) / 2

x is the matrix product without its bias. Backward, one pass gives dx and the sum over rows that dbias is.
"""

import torch
from torch.nn import functional as F

from tarflow_fast.dtypes import wide_dtype
from tarflow_fast.ops import checks
from tarflow_fast.ops.registry import LIBRARY, Backend, Op, choose, register, triton_missing, triton_refuses

__all__ = ["bias_gelu", "bias_gelu_ref"]

Pair = tuple[torch.Tensor, torch.Tensor]


def bias_gelu(x: torch.Tensor, bias: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """Exact (erf) GELU of x + bias, formula above.

    Args:
        x: (..., N), N at least 1; float64, float32, bfloat16 or float16.
        bias: (N,), dtype of x, or float32.
        backend: auto, torch or triton (tarflow_fast.ops.registry).

    Returns:
        (..., N), dtype of x, contiguous. Computed in float32 (float64 for float64) and rounded once.

    Differentiable once in x and bias; with backend "torch", which torch.func transforms take by themselves, as often as
    one likes. Only the gradients asked for are computed; all are the same bits in every run.

    Raises:
        TypeError: not tensors, or other dtypes. ValueError: shapes, devices or an unknown backend.
        RuntimeError: a backend asked for by name cannot run.
    """
    _check(x, bias)
    chosen = choose(_OP, backend, x)
    if chosen == "torch":
        return bias_gelu_ref(x, bias)
    return torch.ops.tarflow_fast.bias_gelu.default(x, bias, chosen)


def bias_gelu_ref(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The definition, in plain PyTorch."""
    compute = wide_dtype(x)
    return F.gelu(x.to(compute) + bias.to(compute)).to(x.dtype).contiguous()


# ---- backends ------------------------------------------------------------------------------------------------------


def _empty_gradients(x: torch.Tensor, bias: torch.Tensor, bias_too: bool) -> Pair:
    return x.new_empty(x.shape), bias.new_empty(bias.shape if bias_too else (0,))


def _forward_triton(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    from tarflow_fast.kernels.triton.bias_gelu import bias_gelu_forward

    out = x.new_empty(x.shape)
    bias_gelu_forward(x.contiguous(), bias.contiguous(), out)
    return out


def _backward_triton(dout: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, bias_too: bool) -> Pair:
    from tarflow_fast.kernels.triton.bias_gelu import bias_gelu_backward

    dx, dbias = _empty_gradients(x, bias, bias_too)
    bias_gelu_backward(dout.contiguous(), x.contiguous(), bias.contiguous(), dx, dbias if bias_too else None)
    return dx, dbias


_OP = register(
    Op(
        "bias_gelu",
        {
            "torch": Backend(bias_gelu_ref),
            "triton": Backend(_forward_triton, _backward_triton, triton_missing, triton_refuses),
        },
        auto={"cpu": ("torch",), "cuda": ("triton", "torch")},
    )
)


# ---- the op as torch sees it -----------------------------------------------------------------------------------------

# Never called with backend "torch": its plain form stands outside (registry.choose).
LIBRARY.define("bias_gelu(Tensor x, Tensor bias, str backend) -> Tensor")
LIBRARY.define("bias_gelu_backward(Tensor dout, Tensor x, Tensor bias, bool bias_too, str backend) -> (Tensor, Tensor)")


def _bias_gelu(x, bias, backend):  # noqa: ANN001, ANN202
    _check(x, bias)
    return _OP.resolve(backend, x.device, x.dtype).forward(x, bias)


def _bias_gelu_backward(dout, x, bias, bias_too, backend):  # noqa: ANN001, ANN202
    return _OP.resolve(backend, x.device, x.dtype).backward(dout, x, bias, bias_too)


LIBRARY.impl("bias_gelu", _bias_gelu, "CompositeExplicitAutograd")
LIBRARY.impl("bias_gelu_backward", _bias_gelu_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("tarflow_fast::bias_gelu", lib=LIBRARY)
def _(x, bias, backend):  # noqa: ANN001, ANN202
    return x.new_empty(x.shape)


@torch.library.register_fake("tarflow_fast::bias_gelu_backward", lib=LIBRARY)
def _(dout, x, bias, bias_too, backend):  # noqa: ANN001, ANN202
    return _empty_gradients(x, bias, bias_too)


def _setup_context(ctx, inputs, output):  # noqa: ANN001, ANN202
    x, bias, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, dout):  # noqa: ANN001, ANN202
    x, bias = ctx.saved_tensors
    bias_too = ctx.needs_input_grad[1]
    dx, dbias = torch.ops.tarflow_fast.bias_gelu_backward.default(dout, x, bias, bias_too, ctx.backend)
    return dx, dbias if bias_too else None, None


def _no_second_derivative(ctx, *grads):  # noqa: ANN001, ANN002, ANN202
    raise RuntimeError("bias_gelu: only backend 'torch' has a second derivative; call bias_gelu(..., backend='torch')")


torch.library.register_autograd("tarflow_fast::bias_gelu", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("tarflow_fast::bias_gelu_backward", _no_second_derivative, lib=LIBRARY)


# ---- checks --------------------------------------------------------------------------------------------------------


def _check(x: torch.Tensor, bias: torch.Tensor) -> None:
    checks.check_rows("bias_gelu", "x", x)
    checks.check_vector("bias_gelu", "bias", bias, "x", x)
