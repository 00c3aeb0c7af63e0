"""A transformer layer through the fused ops, for training and density on GPUs: the modules' numbers in fewer passes.

    h += proj(attention(LN(h))) + bias;   h += fc2(GELU(fc1(LN(h)) + bias)) + bias

The matrix products stay PyTorch's own. The ops between them read and write each activation once, keep the residual
stream in its dtype (float32 under autocast), and step aside, layer by layer, for anything that is not the plain module.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tarflow_fast.engines.weights import BACKWARD_HOOKS, FORWARD_HOOKS, LAYER, inspect_layer
from tarflow_fast.net import AttentionBlock
from tarflow_fast.ops import attention_qkv, bias_gelu, bias_residual, layer_norm
from tarflow_fast.ops.registry import OPS, asked_for, constant_when_traced, under_transform, warn_once

__all__ = ["fused_layer", "fused_layers", "fused_wanted", "takes_fused_layer", "why_not_fused"]

HOOKS = FORWARD_HOOKS + BACKWARD_HOOKS  # the modules' backward passes are left out, too


def fused_layers(layers: Iterable[nn.Module], h: Tensor, backend: str, recompute: bool = False) -> Tensor:
    """All layers of a net, each by its modules or by the fused ops. h, result: (B, T, C).

    recompute: where gradients are recorded, keep the input of each layer alone, and compute the layer again in the
    backward pass: less memory, for the time of one more forward pass.
    """
    for layer in layers:
        inner = (partial(fused_layer, backend=backend),) if takes_fused_layer(layer, h, backend) else ()
        if recompute and torch.is_grad_enabled():
            # Modules may draw (dropout, noise in a hook), and are to draw the same twice. The fused ops draw nothing.
            h = checkpoint(layer, h, *inner, use_reentrant=False, preserve_rng_state=not inner)
        else:
            h = layer(h, *inner)
    return h


def takes_fused_layer(layer: AttentionBlock, h: Tensor, backend: str) -> bool:
    """Whether `fused_layer` takes the place of the layer's modules; a layer that must be called as modules is told."""
    if type(layer) is not AttentionBlock or not fused_wanted(h, backend):
        return False
    if reason := why_not_fused(layer):
        _tell(reason)
        return False
    return _dtypes_fit(layer, h)


def fused_wanted(h: Tensor, backend: str) -> bool:
    """Whether layers are to be fused at all: on a GPU, or where Triton is asked for by name; in no transform."""
    if h.device.type == "cpu" and backend == "auto" and "TARFLOW_FAST_BACKEND" not in os.environ:
        return False
    return not under_transform() and _wanted(backend, h.device, compute_dtype(h))


@constant_when_traced
def _tell(reason: str) -> None:
    warn_once(
        f"tarflow_fast computes a layer by its modules instead of fused kernels: {reason} "
        "(tarflow_fast.info.blocks(model) lists every block)"
    )


@constant_when_traced
def _wanted(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    asked = asked_for(backend)
    if asked == "auto":
        return device.type == "cuda" and not OPS["attention"].why_not("triton", device, dtype)
    return asked == "triton"


def why_not_fused(layer: AttentionBlock) -> str:
    """What in this layer must be called as a module, "" when nothing: a replaced, hooked, patched or parametrized part,
    a weight that is no plain tensor (quantized, sharded), a Linear or LayerNorm without bias, another GELU."""
    found = inspect_layer(layer, HOOKS)
    if isinstance(found, str):
        return found
    for index, tensor in enumerate(found.tensors):
        if tensor is None:
            return f"{LAYER[index // 2]} has a {('weight', 'bias')[index % 2]} that is a NoneType"
    return ""


def _dtypes_fit(layer: AttentionBlock, h: Tensor) -> bool:
    """Parameters of the dtype of what they are added to or multiplied with, or float32."""
    attention, mlp, dtype = layer.attention, layer.mlp, compute_dtype(h)
    for norm in (attention.norm, mlp.norm):
        if norm.weight.dtype not in (h.dtype, torch.float32) or norm.bias.dtype is not norm.weight.dtype:
            return False
    up, _, down = mlp.main
    return all(linear.bias.dtype in (dtype, torch.float32) for linear in (attention.proj, up, down))


def compute_dtype(h: Tensor) -> torch.dtype:
    """What matrix products of h are computed in: the dtype of autocast where it is on, else its own."""
    kind = h.device.type
    if h.dtype is not torch.float64 and torch.is_autocast_enabled(kind):  # autocast leaves float64 alone
        return torch.get_autocast_dtype(kind)
    return h.dtype


def fused_layer(layer: AttentionBlock, h: Tensor, backend: str) -> Tensor:
    """One pre-LN transformer layer. h, result: (B, T, C) in the dtype of the residual stream.

    Raises:
        RuntimeError: the backend asked for by name cannot run.
    """
    attention, mlp, dtype = layer.attention, layer.mlp, compute_dtype(h)
    B, T, C = h.shape
    x = _norm(attention.norm, h, dtype, backend)
    qkv = attention.qkv(x).view(B, T, 3, C // attention.head_size, attention.head_size)
    heads = attention_qkv(qkv, backend=backend).view(B, T, C)
    h = _product_and_residual(attention.proj, heads, h, backend)
    up, _, down = mlp.main
    x = F.linear(_norm(mlp.norm, h, dtype, backend), up.weight)
    return _product_and_residual(down, bias_gelu(x, up.bias, backend), h, backend)


def _norm(norm: nn.LayerNorm, h: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return layer_norm(h, norm.weight, norm.bias, norm.eps, dtype, backend)


def _product_and_residual(linear: nn.Linear, x: Tensor, h: Tensor, backend: str) -> Tensor:
    return bias_residual(F.linear(x, linear.weight), linear.bias, h, backend)
