"""When fused kernels may stand in for a block's own modules: only when they are exactly what it computes.

Adapters, hooks, parametrizations, quantized or replaced layers keep working, through PyTorch; `why_not` says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tarflow_fast.block import MetaBlock

__all__ = ["why_not"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
HEAD_SIZES = range(16, 129)


def why_not(block: MetaBlock) -> str:
    """Why neither engine can invert this block; "" when they can."""
    from tarflow_fast.block import MLP, Attention, AttentionBlock, MetaBlock

    if torch.nn.modules.module._global_forward_hooks or torch.nn.modules.module._global_forward_pre_hooks:
        return "global forward hooks are registered"
    plain = {MetaBlock, Attention, AttentionBlock, MLP, nn.Linear, nn.LayerNorm, nn.GELU, nn.Sequential, nn.ModuleList}
    for name, module in block.named_modules():
        state = module.__dict__
        if type(module) not in plain:
            return f"{name or 'the block'} is a {type(module).__name__}"
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
            return f"{name or 'the block'} has hooks or a forward of its own"
    if not len(block.attn_blocks):
        return "it has no layers"
    return _shape_reason(block) or _tensor_reason(block)


def _shape_reason(block: MetaBlock) -> str:
    C, E, D = block.pos_embed.size(1), block.attn_blocks[0].attention.head_size, block.proj_in.in_features
    F = block.attn_blocks[0].mlp.main[0].out_features if len(block.attn_blocks[0].mlp.main) else 0
    if E not in HEAD_SIZES or C % E:
        return f"head size {E} is not 16 to 128 and a divisor of {C}"
    out = 2 * D if block.nvp else D
    linears = [("proj_in", block.proj_in, D, C), ("proj_out", block.proj_out, C, out)]
    for number, layer in enumerate(block.attn_blocks):
        attention, mlp, at = layer.attention, layer.mlp.main, f"attn_blocks.{number}"
        if attention.head_size != E:
            return f"{at}.attention has another head size"
        if [type(module) for module in mlp] != [nn.Linear, nn.GELU, nn.Linear] or mlp[1].approximate != "none":
            return f"{at}.mlp is not Linear, exact GELU, Linear"
        linears += [(f"{at}.attention.qkv", attention.qkv, C, 3 * C), (f"{at}.attention.proj", attention.proj, C, C)]
        linears += [(f"{at}.mlp.main.0", mlp[0], C, F), (f"{at}.mlp.main.2", mlp[2], F, C)]
        for norm in (attention.norm, layer.mlp.norm):
            if norm.weight is None or norm.bias is None:
                return f"a LayerNorm of {at} has no weight or no bias"
            if norm.eps != EPS or norm.normalized_shape != (C,):
                return f"a LayerNorm of {at} has eps {norm.eps} and shape {norm.normalized_shape}"
    for name, linear, inputs, outputs in linears:
        if linear.bias is None:
            return f"{name} has no bias"
        if linear.weight.shape != (outputs, inputs):
            return f"{name}.weight has shape {tuple(linear.weight.shape)}, not {(outputs, inputs)}"
    return ""


def _tensor_reason(block: MetaBlock) -> str:
    dtype = block.pos_embed.dtype
    if dtype not in DTYPES:
        return f"its parameters are {dtype}"
    for name, parameter in block.named_parameters():
        if type(parameter) is not nn.Parameter and type(parameter) is not Tensor:
            return f"{name} is a {type(parameter).__name__}"
        if parameter.dtype != dtype or parameter.device != block.pos_embed.device or parameter.layout != torch.strided:
            return f"{name} is {parameter.dtype} on {parameter.device}, pos_embed {dtype}"
    return ""
