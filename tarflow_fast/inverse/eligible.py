"""Which flow blocks the fused inverses take: those built of exactly the layers they fuse, with nothing hung on them.

A hook, a parametrization, an adapter or a quantized layer must be called to have its effect; a fused step calls no
module, so it steps aside, with a reason a person can act on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from tarflow_fast.block import MetaBlock

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
HEAD_SIZES = (16, 32, 64, 128)


def why_not_fused(block: MetaBlock) -> str:
    """Why a block cannot be inverted by fused kernels; "" when it can."""
    from tarflow_fast.block import MLP, Attention, AttentionBlock, MetaBlock

    expected: dict[str, type] = {
        "": MetaBlock,
        "proj_in": nn.Linear,
        "proj_out": nn.Linear,
        "attn_blocks": nn.ModuleList,
    }
    for number in range(len(block.attn_blocks)):
        layer = f"attn_blocks.{number}"
        expected |= {
            layer: AttentionBlock,
            f"{layer}.attention": Attention,
            f"{layer}.attention.norm": nn.LayerNorm,
            f"{layer}.attention.qkv": nn.Linear,
            f"{layer}.attention.proj": nn.Linear,
            f"{layer}.mlp": MLP,
            f"{layer}.mlp.norm": nn.LayerNorm,
            f"{layer}.mlp.main": nn.Sequential,
            f"{layer}.mlp.main.0": nn.Linear,
            f"{layer}.mlp.main.1": nn.GELU,
            f"{layer}.mlp.main.2": nn.Linear,
        }
    for name, module in block.named_modules():
        shown = name or "the block"
        if type(module) is not expected.pop(name, None):
            return f"{shown} is a {type(module).__name__}, which the fused step would not call"
        if any(getattr(module, hooks) for hooks in HOOKS) or "forward" in vars(module):
            return f"{shown} has forward hooks, which the fused step would not call"
        if isinstance(module, nn.Linear) and module.bias is None:
            return f"{shown} has no bias"
        if isinstance(module, nn.LayerNorm) and (module.weight is None or module.bias is None):
            return f"{shown} has no weight or no bias"
        if isinstance(module, nn.GELU) and module.approximate != "none":
            return f"{shown} is not the exact (erf) GELU"
    if expected:
        return f"{next(iter(expected))} is missing"
    if not block.attn_blocks:
        return "it has no layers"
    parameters = list(block.parameters())
    if any(type(parameter) not in (nn.Parameter, torch.Tensor) for parameter in parameters):
        return "a parameter is not a plain tensor"
    if len({(parameter.dtype, parameter.device) for parameter in parameters}) > 1:
        return "its parameters are of several dtypes or on several devices"
    if (head_size := block.attn_blocks[0].attention.head_size) not in HEAD_SIZES:
        return f"its head size is {head_size}, not one of {', '.join(map(str, HEAD_SIZES))}"
    return ""
