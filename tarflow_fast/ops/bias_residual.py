"""bias_residual: what follows the last Linear of a branch, in one pass (arXiv 2412.06329, section 2).

    out = residual + (x + bias)

x is the matrix product without its bias. Under autocast x is 16-bit and the residual stream float32. Backward,
dresidual is dout itself; one pass over it gives dx, in x's dtype, and the sum over rows that dbias is.
"""

import torch

from tarflow_fast.dtypes import wide_dtype
from tarflow_fast.ops import checks
from tarflow_fast.ops.registry import LIBRARY, Backend, Op, choose, register, triton_missing, triton_refuses

__all__ = ["bias_residual", "bias_residual_ref"]

Pair = tuple[torch.Tensor, torch.Tensor]


def bias_residual(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """residual + x + bias.

    Args:
        x: (..., N), N at least 1; float64, float32, bfloat16 or float16.
        bias: (N,), dtype of x, or float32.
        residual: shape of x; dtype of x, or float32.
        backend: auto, torch or triton (tarflow_fast.ops.registry).

    Returns:
        (..., N), dtype of residual, contiguous. Computed in float32 (float64 for float64) and rounded once.

    Differentiable once in all three; with backend "torch", which torch.func transforms take by themselves, as often as
    one likes. Only the gradients asked for are computed; all are the same bits in every run.

    Raises:
        TypeError: not tensors, or other dtypes. ValueError: shapes, devices or an unknown backend.
        RuntimeError: a backend asked for by name cannot run.
    """
    _check(x, bias, residual)
    chosen = choose(_OP, backend, x)
    if chosen == "torch":
        return bias_residual_ref(x, bias, residual)
    return torch.ops.tarflow_fast.bias_residual.default(x, bias, residual, chosen)


def bias_residual_ref(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The definition, in plain PyTorch."""
    compute = wide_dtype(x)
    return (residual.to(compute) + (x.to(compute) + bias.to(compute))).to(residual.dtype).contiguous()


# ---- backends ------------------------------------------------------------------------------------------------------


def _empty_gradients(
    dout: torch.Tensor, dtype: torch.dtype, bias_dtype: torch.dtype, input_too: bool, bias_too: bool
) -> Pair:
    dx = dout.new_empty(dout.shape if input_too else (0,), dtype=dtype)
    return dx, dout.new_empty(dout.shape[-1:] if bias_too else (0,), dtype=bias_dtype)


def _forward_triton(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    from tarflow_fast.kernels.triton.bias_residual import bias_residual_forward

    out = residual.new_empty(residual.shape)
    bias_residual_forward(x.contiguous(), bias.contiguous(), residual.contiguous(), out)
    return out


def _backward_triton(
    dout: torch.Tensor, dtype: torch.dtype, bias_dtype: torch.dtype, input_too: bool, bias_too: bool
) -> Pair:
    from tarflow_fast.kernels.triton.bias_residual import bias_residual_backward

    dx, dbias = _empty_gradients(dout, dtype, bias_dtype, input_too, bias_too)
    bias_residual_backward(dout.contiguous(), dx if input_too else None, dbias if bias_too else None)
    return dx, dbias


_OP = register(
    Op(
        "bias_residual",
        {
            "torch": Backend(bias_residual_ref),
            "triton": Backend(_forward_triton, _backward_triton, triton_missing, triton_refuses),
        },
        auto={"cpu": ("torch",), "cuda": ("triton", "torch")},
    )
)


# ---- the op as torch sees it -----------------------------------------------------------------------------------------

# Never called with backend "torch": its plain form stands outside (registry.choose).
LIBRARY.define("bias_residual(Tensor x, Tensor bias, Tensor residual, str backend) -> Tensor")
LIBRARY.define(
    "bias_residual_backward(Tensor dout, ScalarType dtype, ScalarType bias_dtype, bool input_too, bool bias_too, "
    "str backend) -> (Tensor, Tensor)"
)


def _bias_residual(x, bias, residual, backend):  # noqa: ANN001, ANN202
    _check(x, bias, residual)
    return _OP.resolve(backend, x.device, x.dtype).forward(x, bias, residual)


def _bias_residual_backward(dout, dtype, bias_dtype, input_too, bias_too, backend):  # noqa: ANN001, ANN202
    return _OP.resolve(backend, dout.device, dtype).backward(dout, dtype, bias_dtype, input_too, bias_too)


LIBRARY.impl("bias_residual", _bias_residual, "CompositeExplicitAutograd")
LIBRARY.impl("bias_residual_backward", _bias_residual_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("tarflow_fast::bias_residual", lib=LIBRARY)
def _(x, bias, residual, backend):  # noqa: ANN001, ANN202
    return residual.new_empty(residual.shape)


@torch.library.register_fake("tarflow_fast::bias_residual_backward", lib=LIBRARY)
def _(dout, dtype, bias_dtype, input_too, bias_too, backend):  # noqa: ANN001, ANN202
    return _empty_gradients(dout, dtype, bias_dtype, input_too, bias_too)


def _setup_context(ctx, inputs, output):  # noqa: ANN001, ANN202
    x, bias, _, ctx.backend = inputs
    ctx.dtype, ctx.bias_dtype = x.dtype, bias.dtype


def _backward(ctx, dout):  # noqa: ANN001, ANN202
    x_too, bias_too, _, _ = ctx.needs_input_grad[:4]
    dx, dbias, input_too = dout, None, x_too and ctx.dtype != dout.dtype
    if input_too or bias_too:
        backward = torch.ops.tarflow_fast.bias_residual_backward.default
        written, dbias = backward(dout, ctx.dtype, ctx.bias_dtype, input_too, bias_too, ctx.backend)
        dx = written if input_too else dout
    return dx if x_too else None, dbias if bias_too else None, dout, None


def _no_second_derivative(ctx, *grads):  # noqa: ANN001, ANN002, ANN202
    raise RuntimeError(
        "bias_residual: only backend 'torch' has a second derivative; call bias_residual(..., backend='torch')"
    )


torch.library.register_autograd("tarflow_fast::bias_residual", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("tarflow_fast::bias_residual_backward", _no_second_derivative, lib=LIBRARY)


# ---- checks --------------------------------------------------------------------------------------------------------


def _check(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> None:
    checks.check_rows("bias_residual", "x", x)
    checks.check_vector("bias_residual", "bias", bias, "x", x)
    checks.check_tensor("bias_residual", "residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"bias_residual: residual must have the shape of x, {checks.show_shape(x.shape)}, "
            f"got {checks.show_shape(residual.shape)}"
        )
    if residual.dtype not in checks.dtypes_beside(x):
        allowed = " or ".join(map(str, checks.dtypes_beside(x)))
        raise TypeError(f"bias_residual: residual must have dtype {allowed}, got {residual.dtype}")
    checks.check_same_device("bias_residual", "residual", residual, "x", x)
