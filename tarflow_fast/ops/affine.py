"""affine: the shift and scale at the end of a flow block's forward pass (arXiv 2412.06329, section 3).

    z[p(0)] = x[p(0)];   z[p(i+1)] = (x[p(i+1)] - b[i]) * exp(-a[i]);   log_det = -sum_{i < T-1, d} a[i, d]

p(i) = i, or T-1-i when flip: x and z keep the order of the tokens, ab has the order in which the net saw them.
"""

import torch

from tarflow_fast import native, native_cuda
from tarflow_fast.dtypes import wide_dtype
from tarflow_fast.ops import checks
from tarflow_fast.ops.registry import (
    LIBRARY,
    Backend,
    Op,
    cpu_refuses,
    register,
    triton_missing,
    triton_refuses,
    under_transform,
)

__all__ = ["DTYPES", "affine", "affine_backward_ref", "affine_ref"]

DTYPES = (  # of (x, ab)
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
)

Pair = tuple[torch.Tensor, torch.Tensor]


def affine(x: torch.Tensor, ab: torch.Tensor, flip: bool = False, backend: str = "auto") -> Pair:
    """The affine step of a flow block: (z, log_det), formula above.

    Args:
        x: tokens (B, T, D), T and D at least 1, in their own order.
        ab: output of the net, in net order: (B, T, 2D), halves a then b, or (B, T, D), b alone with a = 0.
            Row i conditions the token after the i-th; the last row conditions none.
        flip: the net saw the tokens in reverse.
        backend: auto, torch, cpu, triton or cuda (tarflow_fast.ops.registry).

    Dtypes of (x, ab): float64 twice, float32 with float32, bfloat16 or float16, bfloat16 twice, float16 twice. Computed
    in float32 (float64 for float64).

    Returns:
        z: (B, T, D), dtype of x, contiguous. log_det: (B,), nats, float32 (float64 for float64), a sum over T and D.

    Differentiable once in x and ab; twice and more with backend "torch", which torch.func transforms and forward-mode
    differentiation take by themselves. A second derivative of any other backend raises.

    Raises:
        TypeError: not tensors, or other dtypes.
        ValueError: shapes, devices or an unknown backend.
        RuntimeError: a backend asked for by name cannot run.
    """
    if backend == "torch" or under_transform():
        _check(x, ab, flip)
        _OP.resolve(backend, x.device, x.dtype)
        return affine_ref(x, ab, flip)
    if not torch.compiler.is_compiling():
        _check(x, ab, flip)
    return torch.ops.tarflow_fast.affine.default(x, ab, flip, backend)


def affine_ref(x: torch.Tensor, ab: torch.Tensor, flip: bool = False) -> Pair:
    """The definition, in plain PyTorch; differentiable as often as one likes."""
    compute, D = wide_dtype(x), x.shape[2]
    b = ab[:, :-1, -D:].to(compute)
    a = ab[:, :-1, :D].to(compute) if ab.shape[2] == 2 * D else torch.zeros_like(b)
    x = x.flip(1) if flip else x
    z = torch.cat([x[:, :1], ((x[:, 1:].to(compute) - b) * torch.exp(-a)).to(x.dtype)], dim=1)
    z = z.flip(1) if flip else z
    return z.contiguous(), 0.0 - a.sum(dim=(1, 2))


def affine_backward_ref(
    dz: torch.Tensor, dlog_det: torch.Tensor, x: torch.Tensor, ab: torch.Tensor, flip: bool = False
) -> Pair:
    """Gradients (dx, dab) of `affine_ref`, dtypes of x and ab:

    dx = dz exp(-a) (dz itself for the first token), db = -dx, da = -dx (x - b) - dlog_det, 0 for the last row of ab.
    """
    compute, D = wide_dtype(x), x.shape[2]
    g, y = dz.to(compute), x.to(compute)
    if flip:
        g, y = g.flip(1), y.flip(1)
    first, g = g[:, :1], g[:, 1:]
    last = ab.new_zeros(ab.shape[0], 1, ab.shape[2])
    if ab.shape[2] == 2 * D:
        a, b = ab[:, :-1].to(compute).split(D, dim=2)
        g = g * torch.exp(-a)
        da = -(g * (y[:, 1:] - b)) - dlog_det[:, None, None]
        dab = torch.cat([da, -g], dim=2)
    else:
        dab = -g
    dx = torch.cat([first, g], dim=1)
    dx = dx.flip(1) if flip else dx
    return dx.to(x.dtype).contiguous(), torch.cat([dab.to(ab.dtype), last], dim=1)


# ---- backends ------------------------------------------------------------------------------------------------------


def _empty(x: torch.Tensor, ab: torch.Tensor) -> Pair:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=wide_dtype(x))


def _sizes(x: torch.Tensor, ab: torch.Tensor, flip: bool) -> tuple[int, ...]:
    (B, T, D), dtypes = x.shape, native.DTYPES
    return B, T, D, ab.shape[2] == 2 * D, flip, dtypes[x.dtype], dtypes[ab.dtype], native.threads()


def _forward_cpu(x: torch.Tensor, ab: torch.Tensor, flip: bool) -> Pair:
    x, ab = x.contiguous(), ab.contiguous()
    z, log_det = _empty(x, ab)
    pointers = map(native.pointer, (x, ab, z, log_det))
    native.check(native.library().tf_affine_forward(*pointers, *_sizes(x, ab, flip)), "affine")
    return z, log_det


def _backward_cpu(dz: torch.Tensor, dlog_det: torch.Tensor, x: torch.Tensor, ab: torch.Tensor, flip: bool) -> Pair:
    dz, dlog_det, x, ab = dz.contiguous(), dlog_det.contiguous(), x.contiguous(), ab.contiguous()
    dx, dab = x.new_empty(x.shape), ab.new_empty(ab.shape)
    pointers = map(native.pointer, (dz, dlog_det, x, ab, dx, dab))
    native.check(native.library().tf_affine_backward(*pointers, *_sizes(x, ab, flip)), "affine_backward")
    return dx, dab


def _forward_triton(x: torch.Tensor, ab: torch.Tensor, flip: bool) -> Pair:
    from tarflow_fast.kernels.triton.affine import affine_forward

    z, log_det = _empty(x, ab)
    affine_forward(x.contiguous(), ab.contiguous(), z, log_det, flip)
    return z, log_det


def _backward_triton(dz: torch.Tensor, dlog_det: torch.Tensor, x: torch.Tensor, ab: torch.Tensor, flip: bool) -> Pair:
    from tarflow_fast.kernels.triton.affine import affine_backward

    dx, dab = x.new_empty(x.shape), ab.new_empty(ab.shape)
    affine_backward(dz.contiguous(), dlog_det.contiguous(), x.contiguous(), ab.contiguous(), dx, dab, flip)
    return dx, dab


def _forward_cuda(x: torch.Tensor, ab: torch.Tensor, flip: bool) -> Pair:
    x, ab = x.contiguous(), ab.contiguous()
    z, log_det = _empty(x, ab)
    bytes_needed = native_cuda.library().tf_cuda_affine_scratch(*x.shape)
    scratch = torch.empty(bytes_needed, dtype=torch.uint8, device=x.device)
    native_cuda.call("tf_cuda_affine_forward", x, x, ab, z, log_det, scratch, *_sizes(x, ab, flip)[:-1])
    return z, log_det


def _backward_cuda(dz: torch.Tensor, dlog_det: torch.Tensor, x: torch.Tensor, ab: torch.Tensor, flip: bool) -> Pair:
    dz, dlog_det, x, ab = dz.contiguous(), dlog_det.contiguous(), x.contiguous(), ab.contiguous()
    dx, dab = x.new_empty(x.shape), ab.new_empty(ab.shape)
    native_cuda.call("tf_cuda_affine_backward", x, dz, dlog_det, x, ab, dx, dab, *_sizes(x, ab, flip)[:-1])
    return dx, dab


_OP = register(
    Op(
        "affine",
        {
            "torch": Backend(affine_ref, affine_backward_ref),
            "cpu": Backend(_forward_cpu, _backward_cpu, native.reason, cpu_refuses),
            "triton": Backend(_forward_triton, _backward_triton, triton_missing, triton_refuses),
            "cuda": Backend(_forward_cuda, _backward_cuda, native_cuda.missing, native_cuda.refuses),
        },
        auto={"cpu": ("cpu", "torch"), "cuda": ("triton", "cuda", "torch")},
    )
)


# ---- the op as torch sees it -----------------------------------------------------------------------------------------

# The backend stays an argument of the op, so that a compiled graph chooses it where and when it runs.
LIBRARY.define("affine(Tensor x, Tensor ab, bool flip, str backend) -> (Tensor, Tensor)")
LIBRARY.define(
    "affine_backward(Tensor dz, Tensor dlog_det, Tensor x, Tensor ab, bool flip, str backend) -> (Tensor, Tensor)"
)


def _affine(x: torch.Tensor, ab: torch.Tensor, flip: bool, backend: str) -> Pair:
    _check(x, ab, flip)
    return _OP.resolve(backend, x.device, x.dtype).forward(x, ab, flip)


def _affine_backward(
    dz: torch.Tensor, dlog_det: torch.Tensor, x: torch.Tensor, ab: torch.Tensor, flip: bool, backend: str
) -> Pair:
    _check(x, ab, flip)
    checks.check_like("affine_backward", "dz", dz, "x", x)
    checks.check_like("affine_backward", "dlog_det", dlog_det, "log_det", _empty(x, ab)[1])
    return _OP.resolve(backend, x.device, x.dtype).backward(dz, dlog_det, x, ab, flip)


LIBRARY.impl("affine", _affine, "CompositeExplicitAutograd")
LIBRARY.impl("affine_backward", _affine_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("tarflow_fast::affine", lib=LIBRARY)
def _(x, ab, flip, backend):  # noqa: ANN001, ANN202
    _check(x, ab, flip)
    return _empty(x, ab)


@torch.library.register_fake("tarflow_fast::affine_backward", lib=LIBRARY)
def _(dz, dlog_det, x, ab, flip, backend):  # noqa: ANN001, ANN202
    return x.new_empty(x.shape), ab.new_empty(ab.shape)


def _setup_context(ctx, inputs, output):  # noqa: ANN001, ANN202
    x, ab, ctx.flip, ctx.backend = inputs
    ctx.save_for_backward(x, ab)


def _backward(ctx, dz, dlog_det):  # noqa: ANN001, ANN202
    x, ab = ctx.saved_tensors
    dz = torch.zeros_like(x) if dz is None else dz
    dlog_det = x.new_zeros(x.shape[:1], dtype=wide_dtype(x)) if dlog_det is None else dlog_det
    dx, dab = torch.ops.tarflow_fast.affine_backward.default(dz, dlog_det, x, ab, ctx.flip, ctx.backend)
    return dx, dab, None, None


def _no_second_derivative(ctx, *grads):  # noqa: ANN001, ANN002, ANN202
    raise RuntimeError("affine: only backend 'torch' has a second derivative; call affine(..., backend='torch')")


# register_autograd rather than an autograd.Function outside: opcheck and torch.compile see the gradient as part of the
# op, and its 3 us more a call are nothing for an op called once a flow block.
torch.library.register_autograd("tarflow_fast::affine", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("tarflow_fast::affine_backward", _no_second_derivative, lib=LIBRARY)


# ---- checks --------------------------------------------------------------------------------------------------------


def _check(x: torch.Tensor, ab: torch.Tensor, flip: bool) -> None:
    checks.check_tensor("affine", "x", x)
    checks.check_tensor("affine", "ab", ab)
    checks.check_bool("affine", "flip", flip)
    if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(
            f"affine: x must have shape (B, T, D) with T >= 1 and D >= 1, got {checks.show_shape(x.shape)}"
        )
    B, T, D = x.shape
    if ab.ndim != 3 or ab.shape[0] != B or ab.shape[1] != T or (ab.shape[2] != 2 * D and ab.shape[2] != D):
        raise ValueError(
            f"affine: ab must have shape (B, T, 2D) or (B, T, D) = {(B, T, 2 * D)} or {(B, T, D)}, "
            f"got {checks.show_shape(ab.shape)}"
        )
    checks.check_dtypes("affine", "(x, ab)", (x.dtype, ab.dtype), DTYPES)
    checks.check_same_device("affine", "ab", ab, "x", x)
