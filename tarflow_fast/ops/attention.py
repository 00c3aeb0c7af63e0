"""attention: causal self-attention over a whole sequence, without a mask tensor (arXiv 2412.06329, section 2).

    out[t] = sum_{s <= t} p[t, s] value[s],   p[t, :] = softmax_{s <= t}(query[t] . key[s] / (sqrt(E) temperature))

for every batch row and head. `attention` takes query, key and value; `attention_qkv` takes them as the one tensor that
a Linear to 3C gives, reads it in place and writes one gradient of its shape: no copies on either way.
"""

import torch
from torch.nn import functional as F

from tarflow_fast.ops import checks
from tarflow_fast.ops.registry import LIBRARY, Backend, Op, choose, register, triton_missing, triton_refuses

__all__ = ["HEAD_SIZES", "attention", "attention_qkv", "attention_ref"]

HEAD_SIZES = (16, 32, 64, 128)  # of the kernels; PyTorch takes any
PADDING = 128  # the kernels' log-sum-exp has room for whole tiles of tokens

Tensors = tuple[torch.Tensor, ...]


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, temperature: float = 1.0, backend: str = "auto"
) -> torch.Tensor:
    """Causal attention, formula above.

    Args:
        query, key, value: (B, T, H, E), T, H and E at least 1, one dtype: float32, bfloat16 or float16 (and float64
            with backend "torch"). Kernels want E in 16, 32, 64, 128 and read views with E adjacent in place, if the
            three have the same strides; "auto" leaves other head sizes to PyTorch.
        temperature: of the softmax, finite and > 0.
        backend: auto, torch or triton (tarflow_fast.ops.registry).

    Products of 16-bit numbers are summed in float32, as is the softmax; float32 is IEEE float32 (no TF32).

    Returns:
        (B, T, H, E), dtype of query, contiguous: a view (B, T, C) of it is what the output projection takes.

    Differentiable once; with backend "torch", which torch.func transforms take by themselves, as often as PyTorch's own
    attention. Gradients are the same bits in every run. A NaN or infinity in a token reaches no other row of the batch
    and no other head; in value it may reach earlier tokens of its tile, as 0 * NaN does in PyTorch.

    Raises:
        TypeError: not tensors, or other dtypes. ValueError: shapes, devices, temperature or an unknown backend.
        RuntimeError: a backend asked for by name cannot run.
    """
    _check("attention", (query, key, value), temperature)
    chosen = choose(_OP, backend, query, _unable(query))
    if chosen == "torch":
        return attention_ref(query, key, value, temperature)
    return torch.ops.tarflow_fast.attention.default(query, key, value, float(temperature), chosen)[0]


def attention_qkv(qkv: torch.Tensor, temperature: float = 1.0, backend: str = "auto") -> torch.Tensor:
    """`attention` of the three parts of qkv (B, T, 3, H, E), whose gradient is one tensor; returns (B, T, H, E)."""
    if not isinstance(qkv, torch.Tensor) or qkv.ndim != 5 or qkv.shape[2] != 3:
        checks.check_tensor("attention_qkv", "qkv", qkv)
        raise ValueError(f"attention_qkv: qkv must have shape (B, T, 3, H, E), got {checks.show_shape(qkv.shape)}")
    _check("attention_qkv", qkv.unbind(2), temperature)
    chosen = choose(_OP, backend, qkv, _unable(qkv))
    if chosen == "torch":
        return attention_ref(*qkv.unbind(2), temperature)
    return torch.ops.tarflow_fast.attention_qkv.default(qkv, float(temperature), chosen)[0]


def attention_ref(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """The definition, by PyTorch's own attention."""
    scale = query.shape[-1] ** -0.5 / temperature
    heads_first = (t.transpose(1, 2) for t in (query, key, value))
    out = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale)
    return out.transpose(1, 2).contiguous()


# ---- backends ------------------------------------------------------------------------------------------------------


def _empty(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), what a forward returns; only the backend that wrote lse reads it."""
    B, T, H, E = query.shape
    padded = (T + PADDING - 1) // PADDING * PADDING
    return query.new_empty(B, T, H, E), query.new_empty(B, H, padded, dtype=torch.float32)


def _empty_gradient(query: torch.Tensor) -> torch.Tensor:
    B, T, H, E = query.shape
    return query.new_empty(B, T, 3, H, E)


def _readable(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Tensors:
    """The three as the kernels read them: the same strides, E adjacent."""
    strides = {t.stride() for t in (query, key, value)}
    if len(strides) == 1 and query.stride(3) == 1:
        return query, key, value
    return query.contiguous(), key.contiguous(), value.contiguous()


def _forward_triton(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, temperature: float) -> Tensors:
    from tarflow_fast.kernels.triton.attention import attention_forward

    out, lse = _empty(query)
    attention_forward(*_readable(query, key, value), out=out, lse=lse, temperature=temperature)
    return out, lse


def _backward_triton(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    from tarflow_fast.kernels.triton.attention_backward import attention_backward

    dqkv = _empty_gradient(query)
    attention_backward(
        *_readable(query, key, value), dout=dout.contiguous(), out=out, lse=lse, dqkv=dqkv, temperature=temperature
    )
    return dqkv


def _triton_refuses(device: torch.device, dtype: torch.dtype) -> str:
    return triton_refuses(device, dtype) or ("its dots are of float32 or less" if dtype is torch.float64 else "")


_OP = register(
    Op(
        "attention",
        {
            "torch": Backend(attention_ref),
            "triton": Backend(_forward_triton, _backward_triton, triton_missing, _triton_refuses),
        },
        auto={"cpu": ("torch",), "cuda": ("triton", "torch")},
    )
)


# ---- the op as torch sees it -----------------------------------------------------------------------------------------

# Never called with backend "torch": its plain form stands outside (registry.choose).
LIBRARY.define("attention(Tensor query, Tensor key, Tensor value, float temperature, str backend) -> (Tensor, Tensor)")
LIBRARY.define("attention_qkv(Tensor qkv, float temperature, str backend) -> (Tensor, Tensor)")
LIBRARY.define(
    "attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "float temperature, str backend) -> Tensor"
)


def _attention(query, key, value, temperature, backend):  # noqa: ANN001, ANN202
    _check("attention", (query, key, value), temperature)
    return _OP.resolve(backend, query.device, query.dtype).forward(query, key, value, temperature)


def _attention_qkv(qkv, temperature, backend):  # noqa: ANN001, ANN202
    return _attention(*qkv.unbind(2), temperature, backend)


def _attention_backward(dout, query, key, value, out, lse, temperature, backend):  # noqa: ANN001, ANN202
    return _OP.resolve(backend, query.device, query.dtype).backward(dout, query, key, value, out, lse, temperature)


LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
LIBRARY.impl("attention_qkv", _attention_qkv, "CompositeExplicitAutograd")
LIBRARY.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("tarflow_fast::attention", lib=LIBRARY)
def _(query, key, value, temperature, backend):  # noqa: ANN001, ANN202
    _check("attention", (query, key, value), temperature)
    return _empty(query)


@torch.library.register_fake("tarflow_fast::attention_qkv", lib=LIBRARY)
def _(qkv, temperature, backend):  # noqa: ANN001, ANN202
    _check("attention_qkv", qkv.unbind(2), temperature)
    return _empty(qkv.select(2, 0))


@torch.library.register_fake("tarflow_fast::attention_backward", lib=LIBRARY)
def _(dout, query, key, value, out, lse, temperature, backend):  # noqa: ANN001, ANN202
    return _empty_gradient(query)


def _setup_context(ctx, inputs, output):  # noqa: ANN001, ANN202
    *tensors, ctx.temperature, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx, dout, tensors, out, lse):  # noqa: ANN001, ANN202
    dout = torch.zeros_like(out) if dout is None else dout
    backward = torch.ops.tarflow_fast.attention_backward.default
    return backward(dout, *tensors, out, lse, ctx.temperature, ctx.backend)


def _backward(ctx, dout, _dlse):  # noqa: ANN001, ANN202
    query, key, value, out, lse = ctx.saved_tensors
    return *_gradient(ctx, dout, (query, key, value), out, lse).unbind(2), None, None


def _backward_qkv(ctx, dout, _dlse):  # noqa: ANN001, ANN202
    qkv, out, lse = ctx.saved_tensors
    return _gradient(ctx, dout, qkv.unbind(2), out, lse), None, None


def _no_second_derivative(ctx, *grads):  # noqa: ANN001, ANN002, ANN202
    raise RuntimeError("attention: only backend 'torch' has a second derivative; call attention(..., backend='torch')")


torch.library.register_autograd("tarflow_fast::attention", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("tarflow_fast::attention_qkv", _backward_qkv, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("tarflow_fast::attention_backward", _no_second_derivative, lib=LIBRARY)


# ---- checks --------------------------------------------------------------------------------------------------------


def _unable(tensor: torch.Tensor) -> str:
    E = tensor.shape[-1]
    return "" if E in HEAD_SIZES else f"it takes head sizes {', '.join(map(str, HEAD_SIZES))}, got {E}"


def _check(op: str, tensors: Tensors, temperature: float) -> None:
    names = ("query", "key", "value")
    for name, tensor in zip(names, tensors, strict=True):
        checks.check_tensor(op, name, tensor)
    query = tensors[0]
    if query.ndim != 4 or 0 in query.shape[1:]:
        raise ValueError(
            f"{op}: query must have shape (B, T, H, E) with T, H and E >= 1, got {checks.show_shape(query.shape)}"
        )
    if not query.dtype.is_floating_point:
        raise TypeError(f"{op}: query must have a floating dtype, got {query.dtype}")
    for name, tensor in zip(names[1:], tensors[1:], strict=True):
        if tensor.shape != query.shape:
            raise ValueError(
                f"{op}: {name} must have the shape of query, {checks.show_shape(query.shape)}, "
                f"got {checks.show_shape(tensor.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of query, {query.dtype}, got {tensor.dtype}")
        checks.check_same_device(op, name, tensor, "query", query)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"{op}: temperature must be a number, got {type(temperature).__name__}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"{op}: temperature must be finite and > 0, got {temperature}")
