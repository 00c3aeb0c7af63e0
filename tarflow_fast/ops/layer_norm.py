"""layer_norm: LayerNorm over the last dimension, its statistics in float32 whatever the storage (arXiv 2412.06329).

    out = (x - mean) rstd weight + bias;   mean = sum_c x / C,   rstd = 1 / sqrt(sum_c (x - mean)^2 / C + eps)

The result may be stored in another dtype than x: under autocast the float32 residual stream goes in and what the next
Linear multiplies comes out, rounded once.
"""

import torch
from torch.nn import functional as F

from tarflow_fast.dtypes import wide_dtype
from tarflow_fast.ops import checks
from tarflow_fast.ops.registry import LIBRARY, Backend, Op, choose, register, triton_missing, triton_refuses

__all__ = ["layer_norm", "layer_norm_ref"]

MAX_WIDTH = 8192  # of the kernels, which hold a row in registers; PyTorch takes any
Tensors = tuple[torch.Tensor, ...]


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """LayerNorm, formula above.

    Args:
        x: (..., C), C at least 1; float64, float32, bfloat16 or float16.
        weight, bias: (C,), one dtype: that of x, or float32.
        eps: finite and >= 0.
        dtype: of the result, by default that of x. Computed in float32 (float64 for float64 x).
        backend: auto, torch or triton (tarflow_fast.ops.registry); "auto" leaves C past 8192 to PyTorch.

    Returns:
        (..., C), contiguous.

    Differentiable once in x, weight and bias; with backend "torch", which torch.func transforms take by themselves, as
    often as one likes. Only the gradients asked for are computed; all are the same bits in every run.

    Raises:
        TypeError: not tensors, or other dtypes. ValueError: shapes, devices, eps or an unknown backend.
        RuntimeError: a backend asked for by name cannot run.
    """
    dtype = x.dtype if dtype is None and isinstance(x, torch.Tensor) else dtype
    _check(x, weight, bias, eps, dtype)
    unable = "" if x.shape[-1] <= MAX_WIDTH else f"it takes rows of up to {MAX_WIDTH} numbers, got {x.shape[-1]}"
    chosen = choose(_OP, backend, x, unable)
    if chosen == "torch":
        return layer_norm_ref(x, weight, bias, eps, dtype)
    return torch.ops.tarflow_fast.layer_norm.default(x, weight, bias, float(eps), dtype, chosen)[0]


def layer_norm_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The definition, by PyTorch's own LayerNorm."""
    compute = wide_dtype(x)
    out = F.layer_norm(x.to(compute), x.shape[-1:], weight.to(compute), bias.to(compute), eps)
    return out.to(dtype or x.dtype).contiguous()


# ---- backends ------------------------------------------------------------------------------------------------------


def _empty(x: torch.Tensor, dtype: torch.dtype) -> Tensors:
    """(out, mean, rstd), what a forward returns."""
    statistics = x.new_empty(x.shape[:-1], dtype=wide_dtype(x))
    return x.new_empty(x.shape, dtype=dtype), statistics, torch.empty_like(statistics)


def _empty_gradients(x: torch.Tensor, weight: torch.Tensor, weights: bool) -> Tensors:
    shape = weight.shape if weights else (0,)
    return x.new_empty(x.shape), weight.new_empty(shape), weight.new_empty(shape)


def _forward_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype
) -> Tensors:
    from tarflow_fast.kernels.triton.layer_norm import layer_norm_forward

    results = _empty(x, dtype)
    layer_norm_forward(x.contiguous(), weight.contiguous(), bias.contiguous(), *results, eps)
    return results


def _backward_triton(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weights: bool,
) -> Tensors:
    from tarflow_fast.kernels.triton.layer_norm import layer_norm_backward

    gradients = _empty_gradients(x, weight, weights)
    filled = gradients if weights else gradients[:1]
    layer_norm_backward(dout.contiguous(), x.contiguous(), weight.contiguous(), mean, rstd, *filled)
    return gradients


_OP = register(
    Op(
        "layer_norm",
        {
            "torch": Backend(layer_norm_ref),
            "triton": Backend(_forward_triton, _backward_triton, triton_missing, triton_refuses),
        },
        auto={"cpu": ("torch",), "cuda": ("triton", "torch")},
    )
)


# ---- the op as torch sees it -----------------------------------------------------------------------------------------

# Never called with backend "torch": its plain form stands outside (registry.choose).
LIBRARY.define(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "layer_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool weights, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)


def _layer_norm(x, weight, bias, eps, dtype, backend):  # noqa: ANN001, ANN202
    _check(x, weight, bias, eps, dtype)
    return _OP.resolve(backend, x.device, x.dtype).forward(x, weight, bias, eps, dtype)


def _layer_norm_backward(dout, x, weight, mean, rstd, weights, backend):  # noqa: ANN001, ANN202
    return _OP.resolve(backend, x.device, x.dtype).backward(dout, x, weight, mean, rstd, weights)


LIBRARY.impl("layer_norm", _layer_norm, "CompositeExplicitAutograd")
LIBRARY.impl("layer_norm_backward", _layer_norm_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("tarflow_fast::layer_norm", lib=LIBRARY)
def _(x, weight, bias, eps, dtype, backend):  # noqa: ANN001, ANN202
    return _empty(x, dtype)


@torch.library.register_fake("tarflow_fast::layer_norm_backward", lib=LIBRARY)
def _(dout, x, weight, mean, rstd, weights, backend):  # noqa: ANN001, ANN202
    return _empty_gradients(x, weight, weights)


def _setup_context(ctx, inputs, output):  # noqa: ANN001, ANN202
    x, weight, _, _, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, *output[1:])


def _backward(ctx, dout, _dmean, _drstd):  # noqa: ANN001, ANN202
    x, weight, mean, rstd = ctx.saved_tensors
    weights = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    backward = torch.ops.tarflow_fast.layer_norm_backward.default
    dx, dweight, dbias = backward(dout, x, weight, mean, rstd, weights, ctx.backend)
    return (dx, dweight, dbias, None, None, None) if weights else (dx, None, None, None, None, None)


def _no_second_derivative(ctx, *grads):  # noqa: ANN001, ANN002, ANN202
    raise RuntimeError(
        "layer_norm: only backend 'torch' has a second derivative; call layer_norm(..., backend='torch')"
    )


torch.library.register_autograd("tarflow_fast::layer_norm", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("tarflow_fast::layer_norm_backward", _no_second_derivative, lib=LIBRARY)


# ---- checks --------------------------------------------------------------------------------------------------------


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype) -> None:
    checks.check_rows("layer_norm", "x", x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        checks.check_vector("layer_norm", name, tensor, "x", x)
    if bias.dtype != weight.dtype:
        raise TypeError(f"layer_norm: bias must have the dtype of weight, {weight.dtype}, got {bias.dtype}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"layer_norm: eps must be a number, got {type(eps).__name__}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"layer_norm: eps must be finite and >= 0, got {eps}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"layer_norm: dtype must be a floating dtype or None, got {dtype}")
