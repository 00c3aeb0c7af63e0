"""When the native engine may stand in for a block's own modules: only when they are exactly what it computes.

Adapters, hooks, parametrizations, quantized or replaced layers keep working, through PyTorch; `inspect` says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tarflow_fast.plain import FORWARD_HOOKS, global_hooks, not_plain

if TYPE_CHECKING:
    from tarflow_fast.block import MetaBlock

__all__ = ["DTYPES", "Weights", "inspect", "why_not"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5
HEAD_SIZES = range(16, 129)


class Weights(NamedTuple):
    """A block the engine can take: its weights in the order of tf_plan_pack, class_embed last, and its sizes."""

    tensors: list[Tensor | None]
    class_embed: Tensor | None
    head_size: int
    hidden: int
    layers: int

    def name(self, index: int) -> str:
        """What tensor number `index` is called in the block."""
        if index == len(self.tensors):
            return "class_embed"
        if index < 5:
            return ("proj_in.weight", "proj_in.bias", "pos_embed", "proj_out.weight", "proj_out.bias")[index]
        layer, index = divmod(index - 5, 12)
        inside = ("attention.norm", "attention.qkv", "attention.proj", "mlp.norm", "mlp.main.0", "mlp.main.2")
        return f"attn_blocks.{layer}.{inside[index // 2]}.{('weight', 'bias')[index % 2]}"


class _Refused(Exception):
    pass


def why_not(block: MetaBlock, device: str = "cpu") -> str:
    """Why the engine of that kind of device cannot invert this block; "" when it can."""
    found = inspect(block, device)
    return found if isinstance(found, str) else ""


def inspect(block: MetaBlock, device: str = "cpu") -> Weights | str:
    """The block's weights, or why the engine cannot take it. Looks at every module and parameter, every time."""
    try:
        return _inspect(block, device)
    except _Refused as refused:
        return str(refused)


def _inspect(block: MetaBlock, device: str) -> Weights:
    from tarflow_fast.block import MLP, Attention, AttentionBlock, MetaBlock

    if global_hooks(FORWARD_HOOKS):
        raise _Refused("every module has hooks")
    inside = _children(block, MetaBlock, "the block")
    pos_embed, layers = block.pos_embed, list(_children(inside["attn_blocks"], nn.ModuleList, "attn_blocks").values())
    if not layers:
        raise _Refused("it has no layers")
    C, D, hidden, head_size = pos_embed.size(1), block.proj_in.in_features, 0, 0
    tensors: list[Tensor | None] = [*_linear(inside["proj_in"], D, C, "proj_in"), pos_embed]
    tensors += _linear(inside["proj_out"], C, 2 * D if block.nvp else D, "proj_out")
    for number, layer in enumerate(layers):
        at = f"attn_blocks.{number}"
        halves = _children(layer, AttentionBlock, at)
        attention = _children(halves["attention"], Attention, f"{at}.attention")
        mlp = _children(halves["mlp"], MLP, f"{at}.mlp")
        main = list(_children(mlp["main"], nn.Sequential, f"{at}.mlp.main").values())
        if len(main) != 3 or type(main[1]) is not nn.GELU or main[1].approximate != "none":
            raise _Refused(f"{at}.mlp.main is not Linear, exact GELU, Linear")
        _children(main[1], nn.GELU, f"{at}.mlp.main.1")
        if number == 0:
            hidden, head_size = main[0].out_features, halves["attention"].head_size
        if halves["attention"].head_size != head_size:
            raise _Refused(f"{at}.attention has another head size than the first")
        tensors += _norm(attention["norm"], C, f"{at}.attention.norm")
        tensors += _linear(attention["qkv"], C, 3 * C, f"{at}.attention.qkv")
        tensors += _linear(attention["proj"], C, C, f"{at}.attention.proj")
        tensors += _norm(mlp["norm"], C, f"{at}.mlp.norm")
        tensors += _linear(main[0], C, hidden, f"{at}.mlp.main.0")
        tensors += _linear(main[2], hidden, C, f"{at}.mlp.main.2")
    if head_size not in HEAD_SIZES or C % head_size:
        raise _Refused(f"head size {head_size} is not 16 to 128 and a divisor of {C}")
    if pos_embed.dtype not in DTYPES:
        raise _Refused(f"its parameters are {pos_embed.dtype}")
    classes = block.class_embed
    if classes is not None and (classes.ndim != 3 or classes.shape[1:] != (1, C)):
        raise _Refused(f"class_embed has shape {tuple(classes.shape)}, not (classes, 1, {C})")
    parameter, dtype, layout, here = nn.Parameter, pos_embed.dtype, pos_embed.layout, f"is_{device}"
    for tensor in (*tensors, classes):
        if tensor is None:
            continue
        if type(tensor) is not parameter and type(tensor) is not Tensor:
            raise _Refused(f"a parameter is a {type(tensor).__name__}")
        if tensor.dtype is not dtype or tensor.layout is not layout or not getattr(tensor, here):
            raise _Refused(f"a parameter is {tensor.dtype} on {tensor.device}, pos_embed {dtype} on {device}")
    return Weights(tensors, classes, head_size, hidden, len(layers))


def _children(module: nn.Module, kind: type, name: str) -> dict[str, nn.Module]:
    """The submodules of a module that is exactly a `kind` and runs nothing else when called."""
    if reason := not_plain(module, kind, FORWARD_HOOKS):
        raise _Refused(f"{name} {reason}")
    return module._modules


def _weight_and_bias(module: nn.Module, name: str) -> tuple[Tensor | None, Tensor | None]:
    try:
        return module._parameters["weight"], module._parameters["bias"]
    except KeyError:  # plain attributes, as sharded wrappers make them
        raise _Refused(f"{name} keeps its weight or bias elsewhere than in its parameters") from None


def _linear(module: nn.Module, inputs: int, outputs: int, name: str) -> tuple[Tensor | None, Tensor | None]:
    _children(module, nn.Linear, name)
    weight, bias = _weight_and_bias(module, name)
    if weight is None:
        raise _Refused(f"{name} has no weight")
    if weight.shape != (outputs, inputs) or (bias is not None and bias.shape != (outputs,)):
        raise _Refused(f"{name}.weight has shape {tuple(weight.shape)}, not {(outputs, inputs)}")
    return weight, bias


def _norm(module: nn.Module, C: int, name: str) -> tuple[Tensor | None, Tensor | None]:
    _children(module, nn.LayerNorm, name)
    if module.eps != EPS or module.normalized_shape != (C,):
        raise _Refused(f"{name} has eps {module.eps} and shape {module.normalized_shape}, not {EPS} and ({C},)")
    return _weight_and_bias(module, name)
