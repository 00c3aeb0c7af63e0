"""The one walk through a net: is it just what its classes say, and which weights does it have?

An engine that reads weights leaves the modules out. So it may stand in for them only where they are exactly what it
computes: adapters, hooks, parametrizations, quantized or replaced layers keep working, through PyTorch, and the walk
says why. The names and the order of the weights are written here and nowhere else in Python; `tf_plan_pack` in
csrc/tarflow.h takes them in this order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tarflow_fast.net import MLP, Attention, AttentionBlock

__all__ = ["BACKWARD_HOOKS", "FORWARD_HOOKS", "Layer", "Weights", "inspect", "inspect_layer"]

FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN_TENSORS = (nn.Parameter, Tensor, type(None))

# A layer's modules with parameters, in order. Each has a weight, then a bias.
LAYER = ("attention.norm", "attention.qkv", "attention.proj", "mlp.norm", "mlp.main.0", "mlp.main.2")
BEFORE = ("proj_in.weight", "proj_in.bias", "pos_embed", "proj_out.weight", "proj_out.bias")
AFTER = ("class_embed",)


class Layer(NamedTuple):
    """A plain layer: its weights in the order of LAYER, its sizes, and the eps of its two norms."""

    tensors: list[Tensor | None]
    channels: int
    hidden: int
    head_size: int
    eps: tuple[float, float]


class Weights(NamedTuple):
    """A plain net: its weights in the order of BEFORE, its layers and AFTER, with their names, and its sizes."""

    tensors: list[Tensor | None]
    names: list[str]
    layers: list[Layer]

    @property
    def pos_embed(self) -> Tensor:
        return self.tensors[2]

    @property
    def class_embed(self) -> Tensor | None:
        return self.tensors[-1]

    @property
    def head_size(self) -> int:
        return self.layers[0].head_size

    @property
    def hidden(self) -> int:
        return self.layers[0].hidden

    @property
    def token_size(self) -> int:
        return self.tensors[0].size(1)

    def named(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {name: each for name, each in zip(self.names, self.tensors, strict=True) if each is not None}


class _Refused(Exception):
    pass


def inspect(net: nn.Module, device: str | None = None) -> Weights | str:
    """The net's weights, or why no engine can take it. Looks at every module and parameter, every time.

    device: the kind of device they must be on; None: all on one.
    """
    try:
        return _inspect(net, device)
    except _Refused as refused:
        return str(refused)


def inspect_layer(layer: AttentionBlock, hooks: tuple[str, ...]) -> Layer | str:
    """One layer's weights, or what in it must be called as a module. hooks: the kinds that count, inside the layer."""
    try:
        if global_hooks(hooks):
            raise _Refused("every module has hooks")
        return _layer(layer, "", hooks, own_hooks=())
    except _Refused as refused:
        return str(refused)


def _inspect(net: nn.Module, device: str | None) -> Weights:
    if global_hooks(FORWARD_HOOKS):
        raise _Refused("every module has hooks")
    if not vars(type(net)).get("is_plain"):
        raise _Refused(f"the block is a {type(net).__name__}")
    inside = _children(net, type(net), "the block", FORWARD_HOOKS)
    blocks = _children(inside["attn_blocks"], nn.ModuleList, "attn_blocks", FORWARD_HOOKS)
    if not blocks:
        raise _Refused("it has no layers")
    pos_embed, classes = net.pos_embed, net.class_embed
    C, D = pos_embed.size(1), net.proj_in.in_features
    tensors: list[Tensor | None] = [*_linear(inside["proj_in"], D, C, "proj_in", FORWARD_HOOKS), pos_embed]
    tensors += _linear(inside["proj_out"], C, net.proj_out.out_features, "proj_out", FORWARD_HOOKS)
    names, layers = [*BEFORE], []
    for number, each in enumerate(blocks.values()):
        layer = _layer(each, f"attn_blocks.{number}.", FORWARD_HOOKS)
        if layer.channels != C:
            raise _Refused(f"attn_blocks.{number} has {layer.channels} channels, not {C}")
        if layers and layer[2:4] != layers[0][2:4]:
            raise _Refused(f"attn_blocks.{number}.attention has another head size than the first, or mlp another width")
        tensors += layer.tensors
        names += _layer_names(number)
        layers.append(layer)
    head_size = layers[0].head_size
    if C % head_size:
        raise _Refused(f"head size {head_size} is no divisor of {C}")
    if pos_embed.dtype not in DTYPES:
        raise _Refused(f"its parameters are {pos_embed.dtype}")
    if classes is not None and (classes.ndim != 3 or classes.shape[1:] != (1, C)):
        raise _Refused(f"class_embed has shape {tuple(classes.shape)}, not (classes, 1, {C})")
    tensors.append(classes)
    names += AFTER
    for name, tensor in (("pos_embed", pos_embed), ("class_embed", classes)):
        if type(tensor) not in PLAIN_TENSORS:
            raise _Refused(f"{name} is a {type(tensor).__name__}")
    device = pos_embed.device.type if device is None else device
    dtype, layout, here = pos_embed.dtype, pos_embed.layout, f"is_{device}"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype is not dtype or tensor.layout is not layout or not getattr(tensor, here):
            raise _Refused(f"a parameter is {tensor.dtype} on {tensor.device}, pos_embed {dtype} on {device}")
    return Weights(tensors, names, layers)


_names: dict[int, list[str]] = {}


def _layer_names(number: int) -> list[str]:
    if number not in _names:  # kept: the walk runs in every call
        _names[number] = [f"attn_blocks.{number}.{part}.{which}" for part in LAYER for which in ("weight", "bias")]
    return _names[number]


def _layer(layer: nn.Module, at: str, hooks: tuple[str, ...], own_hooks: tuple[str, ...] = FORWARD_HOOKS) -> Layer:
    halves = _children(layer, AttentionBlock, at[:-1] or "the layer", own_hooks)
    attention = _children(halves["attention"], Attention, at + "attention", hooks)
    mlp = _children(halves["mlp"], MLP, at + "mlp", hooks)
    main = list(_children(mlp["main"], nn.Sequential, at + "mlp.main", hooks).values())
    if len(main) != 3:
        raise _Refused(f"{at}mlp.main is not Linear, exact GELU, Linear")
    _children(main[1], nn.GELU, at + "mlp.main.1", hooks)
    if main[1].approximate != "none":
        raise _Refused(f"{at}mlp.main.1 is not the exact GELU")
    C, hidden = attention["norm"].normalized_shape[-1], getattr(main[0], "out_features", 0)
    tensors = [
        *_norm(attention["norm"], C, at + "attention.norm", hooks),
        *_linear(attention["qkv"], C, 3 * C, at + "attention.qkv", hooks),
        *_linear(attention["proj"], C, C, at + "attention.proj", hooks),
        *_norm(mlp["norm"], C, at + "mlp.norm", hooks),
        *_linear(main[0], C, hidden, at + "mlp.main.0", hooks),
        *_linear(main[2], hidden, C, at + "mlp.main.2", hooks),
    ]
    return Layer(tensors, C, hidden, halves["attention"].head_size, (attention["norm"].eps, mlp["norm"].eps))


def global_hooks(hooks: tuple[str, ...]) -> bool:
    """Whether hooks of these kinds are registered for every module."""
    return any(getattr(nn.modules.module, "_global" + name) for name in hooks)


def _children(module: nn.Module, kind: type, name: str, hooks: tuple[str, ...]) -> dict[str, nn.Module]:
    """The submodules of a module that is exactly a `kind` and runs nothing else when called."""
    if type(module) is not kind:
        raise _Refused(f"{name} is a {type(module).__name__}")
    state = module.__dict__  # read as it is: attributes of a Module go through a search, for 12 modules a layer
    for each in hooks:  # not any(): its generator costs more than the look, and there are 48 modules a block
        if state[each]:
            raise _Refused(f"{name} has hooks")
    if "forward" in state:
        raise _Refused(f"{name} has a forward of its own")
    return module._modules


def _weight_and_bias(module: nn.Module, name: str) -> tuple[Tensor | None, Tensor | None]:
    try:
        weight, bias = module._parameters["weight"], module._parameters["bias"]
    except KeyError:  # plain attributes, as sharded wrappers make them
        raise _Refused(f"{name} keeps its weight or bias elsewhere than in its parameters") from None
    if type(weight) not in PLAIN_TENSORS:
        raise _Refused(f"{name} has a weight that is a {type(weight).__name__}")
    if type(bias) not in PLAIN_TENSORS:
        raise _Refused(f"{name} has a bias that is a {type(bias).__name__}")
    return weight, bias


def _linear(
    module: nn.Module, inputs: int, outputs: int, name: str, hooks: tuple[str, ...]
) -> tuple[Tensor | None, Tensor | None]:
    _children(module, nn.Linear, name, hooks)
    weight, bias = _weight_and_bias(module, name)
    if weight is None:
        raise _Refused(f"{name} has no weight")
    if weight.shape != (outputs, inputs) or (bias is not None and bias.shape != (outputs,)):
        raise _Refused(f"{name}.weight has shape {tuple(weight.shape)}, not {(outputs, inputs)}")
    return weight, bias


def _norm(module: nn.Module, C: int, name: str, hooks: tuple[str, ...]) -> tuple[Tensor | None, Tensor | None]:
    _children(module, nn.LayerNorm, name, hooks)
    if module.normalized_shape != (C,):
        raise _Refused(f"{name} has shape {module.normalized_shape}, not ({C},)")
    return _weight_and_bias(module, name)
