"""Ops: one op, one file, with its formula, plain PyTorch reference, gradient and the table of its backends."""

from tarflow_fast.ops.affine import affine, affine_ref
from tarflow_fast.ops.attention import attention, attention_qkv, attention_ref
from tarflow_fast.ops.bias_gelu import bias_gelu, bias_gelu_ref
from tarflow_fast.ops.bias_residual import bias_residual, bias_residual_ref
from tarflow_fast.ops.layer_norm import layer_norm, layer_norm_ref
from tarflow_fast.ops.registry import explain

__all__ = [
    "affine",
    "affine_ref",
    "attention",
    "attention_qkv",
    "attention_ref",
    "bias_gelu",
    "bias_gelu_ref",
    "bias_residual",
    "bias_residual_ref",
    "explain",
    "layer_norm",
    "layer_norm_ref",
]
