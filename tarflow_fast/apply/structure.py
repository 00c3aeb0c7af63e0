"""Is a model of another package a TarFlow, and which weights does it have? Its structure tells; nothing is imported.

A TarFlow here is a module with `blocks`. Each block has `proj_in`, `pos_embed` (T, C), `class_embed` (classes, 1, C) or
none, `attn_blocks` of layers with `attention.{norm,qkv,proj}` and `mlp.{norm,main}`, `proj_out`, and a permutation of
the tokens. The walk refuses whatever it does not know: a module, parameter or buffer that has no place in a TarFlow may
change the result. It runs at every call, so that no weight is ever out of date and no adapter is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tarflow_fast.engines.weights import AFTER, BEFORE, FORWARD_HOOKS, LAYER, PLAIN_TENSORS, global_hooks

__all__ = ["Structure", "read", "weight_names"]

CHILDREN = ("proj_in", "attn_blocks", "proj_out")  # of a block, beside the permutation
HEAD_SIZES, HEADS = ("head_channels", "head_dim", "head_size"), ("num_heads", "n_heads")
PURE = (nn.Dropout, nn.Identity)  # modules which may stand anywhere, as long as they do nothing


class Sizes(NamedTuple):
    """Of one block, as `TokenFlow` names them."""

    num_tokens: int
    token_size: int
    channels: int
    layers_per_block: int
    head_size: int
    expansion: int
    nvp: bool
    num_classes: int


class Block(NamedTuple):
    """What the walk found in one block.

    sizes.  places: the order in which it sees the tokens.  tensors: its weights, in the order of `weight_names`.
    eps: of the norms of its layers.  kinds: the path, class and plain numbers of each module whose class is foreign.
    """

    sizes: Sizes
    places: list[int]
    tensors: list[Tensor | None]
    eps: list[float]
    kinds: list[tuple[str, type, tuple]]


class Structure(NamedTuple):
    """What the walk found in a model. methods: all functions of the foreign classes, by class."""

    blocks: list[Block]
    var: Tensor | None
    methods: dict[type, list[FunctionType]]

    def change_since(self, known: Structure) -> str:
        """What is other than it was in `known`, weights aside; "" when nothing is."""
        if len(self.blocks) != len(known.blocks):
            return f"it has {len(self.blocks)} blocks, and had {len(known.blocks)} when apply_to looked"
        for number, (block, before) in enumerate(zip(self.blocks, known.blocks, strict=True)):
            for (at, kind, numbers), (_, old_kind, old_numbers) in zip(block.kinds, before.kinds, strict=False):
                if kind is not old_kind:
                    return f"{at} is a {kind.__name__}, and was a {old_kind.__name__} when apply_to looked"
                if numbers != old_numbers:
                    return f"{at} has other attributes than when apply_to looked: {dict(numbers)}, {dict(old_numbers)}"
            if (block.sizes, block.places) != (before.sizes, before.places):
                return f"blocks.{number} has another size or order of tokens than when apply_to looked"
        for kind, functions in self.methods.items():
            if functions != known.methods.get(kind):
                return f"a method of {kind.__name__} was replaced since apply_to looked"
        return ""


def weight_names(layers: int, classes: bool) -> list[str]:
    """The names of a block's weights, in the one order that all engines use; classes: whether it has embeddings."""
    parts = [f"attn_blocks.{number}.{part}" for number in range(layers) for part in LAYER]
    return [
        *BEFORE,
        *(f"{part}.{which}" for part in parts for which in ("weight", "bias")),
        *(AFTER if classes else ()),
    ]


def read(model: nn.Module, original: type) -> Structure:
    """Walk through a model.

    Args:
        model: of another package.
        original: its class, before `apply_to`.

    Raises:
        ValueError: something in the model has no place in a TarFlow; the message says what and where.
    """
    if global_hooks(FORWARD_HOOKS):
        raise ValueError("hooks are registered for every module")
    blocks = model._modules.get("blocks")
    if type(blocks) is not nn.ModuleList or not len(blocks):
        raise ValueError("the model has no `blocks`, a ModuleList; a wrapped model must be unwrapped first")
    if "reverse" in vars(model):
        raise ValueError("the model has a reverse of its own, as an attribute of the instance")
    _nothing_else(model, "the model", ("blocks",), (), ("var",))
    _unhooked(blocks, "blocks")
    found = [_block(each, f"blocks.{number}") for number, each in enumerate(blocks)]
    first = found[0].sizes
    for number, each in enumerate(found):
        for name, size, of_first in zip(Sizes._fields, each.sizes, first, strict=True):
            if size != of_first:
                raise ValueError(f"blocks.{number} has {name} {size}, and blocks.0 has {of_first}")
    var = model._buffers.get("var")
    if var is not None and var.shape != first[:2]:
        raise ValueError(f"var must have shape {tuple(first[:2])}, got {tuple(var.shape)}")
    kinds = {original, *(kind for block in found for _, kind, _ in block.kinds)}
    return Structure(found, var, {kind: list(_functions(kind)) for kind in kinds})


def _block(block: nn.Module, at: str) -> Block:
    kinds: list[tuple[str, type, tuple]] = []
    pos_embed, classes = (_parameter(block, name, at) for name in ("pos_embed", "class_embed"))
    if pos_embed is None or pos_embed.ndim != 2:
        raise ValueError(f"{at} has no parameter pos_embed of shape (T, C)")
    if pos_embed.is_meta:
        raise ValueError(f"{at} has its parameters on the meta device; load its weights first")
    T, C = pos_embed.shape
    name, places = _permutation(block, at, pos_embed, kinds)
    inside = _part(block, at, CHILDREN, kinds, ("pos_embed", "class_embed"), name)
    proj_in, proj_out = (_leaf(inside[name], nn.Linear, f"{at}.{name}") for name in ("proj_in", "proj_out"))
    D, outputs = proj_in[0].size(1), proj_out[0].size(0)
    nvp = getattr(block, "nvp", outputs == 2 * D)
    if outputs != (2 * D if nvp else D):
        expected = f"{2 * D} for nvp=True, or {D} for nvp=False"
        raise ValueError(f"{at}.proj_out must give {expected}, for tokens of size {D}; it gives {outputs}, nvp={nvp}")
    attn_blocks = inside["attn_blocks"]
    if type(attn_blocks) is not nn.ModuleList or not len(attn_blocks):
        raise ValueError(f"{at}.attn_blocks must be a ModuleList of layers, got a {type(attn_blocks).__name__}")
    _unhooked(attn_blocks, f"{at}.attn_blocks")
    tensors, eps, shape = [*proj_in, pos_embed, *proj_out], [], None
    for number, each in enumerate(attn_blocks):
        weights, layer_eps, layer_shape = _layer(each, f"{at}.attn_blocks.{number}", C, kinds)
        if layer_shape != (shape or layer_shape):
            raise ValueError(f"{at}.attn_blocks.{number} has (head size, hidden size) {layer_shape}, the first {shape}")
        tensors, eps, shape = tensors + weights, eps + layer_eps, layer_shape
    head_size, hidden = shape
    if C % head_size:
        raise ValueError(f"{at} has {C} channels, no multiple of the head size {head_size}")
    if hidden % C:
        raise ValueError(f"{at} has MLPs of hidden size {hidden}, no multiple of {C} channels")
    num_classes = 0 if classes is None else classes.size(0)
    sizes = Sizes(T, D, C, len(attn_blocks), head_size, hidden // C, bool(nvp), num_classes)
    tensors += [] if classes is None else [classes]
    return Block(sizes, places, tensors, eps, kinds)


def _layer(layer: nn.Module, at: str, C: int, kinds: list) -> tuple[list[Tensor | None], list[float], tuple[int, int]]:
    """The weights of a layer in the order of LAYER, the eps of its norms, and its (head size, hidden size)."""
    halves = _part(layer, at, ("attention", "mlp"), kinds)
    attention = _part(halves["attention"], f"{at}.attention", ("norm", "qkv", "proj"), kinds)
    mlp = _part(halves["mlp"], f"{at}.mlp", ("norm", "main"), kinds)
    main, at_main = mlp["main"], f"{at}.mlp.main"
    if type(main) is not nn.Sequential:
        raise ValueError(f"{at_main} must be a Sequential, got a {type(main).__name__}")
    _unhooked(main, at_main)
    kept = {name: each for name, each in main._modules.items() if not _pure(each, f"{at_main}.{name}")}
    if [type(each) for each in kept.values()] != [nn.Linear, nn.GELU, nn.Linear]:
        got = ", ".join(type(each).__name__ for each in kept.values())
        raise ValueError(f"{at_main} must be Linear, GELU, Linear, got {got}")
    (first, fc1), (middle, gelu), (last, fc2) = kept.items()
    _unhooked(gelu, f"{at_main}.{middle}")
    if gelu.approximate != "none":
        raise ValueError(f"{at_main}.{middle} must be the exact GELU, got approximate={gelu.approximate!r}")
    norms = attention["norm"], mlp["norm"]
    weights = [
        *_leaf(norms[0], nn.LayerNorm, f"{at}.attention.norm"),
        *_leaf(attention["qkv"], nn.Linear, f"{at}.attention.qkv"),
        *_leaf(attention["proj"], nn.Linear, f"{at}.attention.proj"),
        *_leaf(norms[1], nn.LayerNorm, f"{at}.mlp.norm"),
        *_leaf(fc1, nn.Linear, f"{at_main}.{first}"),
        *_leaf(fc2, nn.Linear, f"{at_main}.{last}"),
    ]
    head_size = _head_size(halves["attention"], f"{at}.attention", C)
    return weights, [norm.eps for norm in norms], (head_size, weights[8].size(0))


def _head_size(attention: nn.Module, at: str, C: int) -> int:
    said = {name: vars(attention).get(name) for name in (*HEAD_SIZES, *HEADS)}
    said = {name: number for name, number in said.items() if type(number) is int and number > 0}
    sizes = {number if name in HEAD_SIZES else C // number for name, number in said.items()}
    if len(sizes) != 1:
        raise ValueError(f"{at} must tell its head size by one of {', '.join((*HEAD_SIZES, *HEADS))}, got {said}")
    return sizes.pop()


def _permutation(block: nn.Module, at: str, pos_embed: Tensor, kinds: list) -> tuple[str, list[int]]:
    """The name of the attribute which permutes tokens, whatever it is, and what it does."""
    found = {}
    for name, each in {**vars(block), **block._modules}.items():
        if callable(each) and name not in CHILDREN and not hasattr(nn.Module, name):
            if isinstance(each, nn.Module):
                _unhooked(each, f"{at}.{name}")  # or its hooks would see the tokens it is tried with
            places = _places(each, pos_embed.size(0), pos_embed.device)
            if places is not None:
                found[name] = each, places
    if not found:
        raise ValueError(f"{at} has no attribute that permutes tokens when called with (tokens, dim=1, inverse=False)")
    if len(found) > 1:
        raise ValueError(f"{at} has several attributes that permute tokens: {', '.join(found)}")
    ((name, (permutation, places)),) = found.items()
    if isinstance(permutation, nn.Module):
        _part(permutation, f"{at}.{name}", (), kinds)
    else:
        kinds.append((f"{at}.{name}", type(permutation), _numbers(getattr(permutation, "__dict__", {}))))
    return name, places


def _places(permutation: Any, T: int, device: torch.device) -> list[int] | None:
    """places[i]: where the i-th token comes from; None where the call fails or gives no permutation of T tokens."""
    tokens = torch.arange(T, dtype=torch.float32, device=device).view(1, T, 1)
    try:
        permuted = permutation(tokens.clone(), dim=1, inverse=False)
        places = permuted.flatten().tolist()
        back = permutation(permuted, dim=1, inverse=True)
        fits = permuted.shape == tokens.shape and sorted(places) == list(range(T)) and torch.equal(back, tokens)
    except Exception:  # foreign code, or no permutation at all, raises what it likes
        return None
    return [int(place) for place in places] if fits else None


def _part(
    module: nn.Module,
    at: str,
    children: tuple[str, ...],
    kinds: list,
    parameters: tuple[str, ...] = (),
    permutation: str = "",
) -> dict[str, nn.Module]:
    """The submodules of a module of a foreign class. It must hold all `children`, and nothing that is not named."""
    _unhooked(module, at)
    _nothing_else(module, at, (*children, permutation), parameters, ("attn_mask",))
    for name in children:
        if module._modules.get(name) is None:
            raise ValueError(f"{at} has no module {name!r}")
    kind = type(module)
    for name, value in vars(module).items():
        if callable(value) and name != "_compiled_call_impl" and hasattr(kind, name):
            raise ValueError(f"{at} has a {name} of its own, as an attribute of the instance")
    kinds.append((at, kind, _numbers(vars(module))))
    return module._modules


def _numbers(attributes: dict[str, Any]) -> tuple:
    """Plain numbers and strings, which its methods may read. Not bools: sampling modes come and go."""
    return tuple((name, value) for name, value in attributes.items() if type(value) in (int, float, str))


def _nothing_else(
    module: nn.Module, at: str, children: tuple[str, ...], parameters: tuple[str, ...], buffers: tuple[str, ...]
) -> None:
    for what, there, expected in (
        ("parameter", module._parameters, parameters),
        ("buffer", module._buffers, buffers),
    ):
        for name, tensor in there.items():
            if tensor is not None and name not in expected:
                raise ValueError(f"{at} has a {what} {name!r} of shape {tuple(tensor.shape)}, which a TarFlow has not")
    for name, child in module._modules.items():
        if child is not None and name not in children and not _pure(child, f"{at}.{name}"):
            raise ValueError(f"{at} has a module {name!r}, a {type(child).__name__}, which a TarFlow has not")


def _pure(module: nn.Module, at: str) -> bool:
    """Whether it is a Dropout or an Identity, which does nothing."""
    if type(module) not in PURE:
        return False
    _unhooked(module, at)
    if type(module) is nn.Dropout and module.p > 0 and module.training:
        raise ValueError(f"{at} drops out with p = {module.p} in training mode; call eval() first")
    return True


def _leaf(module: nn.Module, kind: type, at: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a module that is exactly a `kind`."""
    if type(module) is not kind:
        raise ValueError(f"{at} must be a {kind.__name__}, got a {type(module).__name__}")
    _unhooked(module, at)
    _nothing_else(module, at, (), ("weight", "bias"), ())
    weight, bias = _parameter(module, "weight", at), _parameter(module, "bias", at)
    if weight is None:
        raise ValueError(f"{at} has no weight")
    return weight, bias


def _parameter(module: nn.Module, name: str, at: str) -> Tensor | None:
    tensor = module._parameters.get(name)
    if tensor is None and getattr(module, name, None) is not None:
        raise ValueError(f"{at} keeps its {name} elsewhere than in its parameters")
    if type(tensor) not in PLAIN_TENSORS:
        raise ValueError(f"{at}.{name} must be a plain Parameter, got a {type(tensor).__name__}")
    return tensor


def _unhooked(module: nn.Module, at: str) -> None:
    state = vars(module)
    if any(state[each] for each in FORWARD_HOOKS):
        raise ValueError(f"{at} has hooks")
    if "forward" in state:
        raise ValueError(f"{at} has a forward of its own, as an attribute of the instance")


def _functions(kind: type) -> Iterator[FunctionType]:
    for each in kind.__mro__:
        if each is not nn.Module:
            yield from (value for value in vars(each).values() if isinstance(value, FunctionType))
