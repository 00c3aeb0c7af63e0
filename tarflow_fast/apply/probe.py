"""The probe: does a model of another package compute what its structure promises?

Structure alone proves nothing: the same modules may be called otherwise. So copies of its blocks, with weights drawn
here, are run and compared with ours: each block forward, and the model's own reverse over a few shortened blocks. The
weights are drawn because those of a fresh flow, whose proj_out is zero, would hide nearly every difference. The model
itself is only read.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tarflow_fast.apply.shadow import OPTIONS, Shadow, gives_images
from tarflow_fast.apply.structure import Block, Structure, read

__all__ = ["probe_blocks", "probe_reverse"]

TOLERANCE = 1e-4  # |theirs - ours| <= TOLERANCE (1 + |theirs|); float32 makes 1e-6 to 1e-5 of it
ROWS = 2
HERE = {"device": "cpu", "dtype": torch.float32}  # whatever the defaults of the process are
# Of the log-scales and shifts, which are linear in the residual stream. Forward they are of size 1, so that a soft clip
# shows. In reverse one token makes the next, and a flow of that size overflows.
FORWARD_SCALE, REVERSE_SCALE = 1.0, 0.1


def probe_blocks(model: nn.Module, structure: Structure, shadow: Shadow) -> None:
    """Compare the forward of every block with ours.

    Raises:
        ValueError: a block cannot be copied or run on a CPU in float32, or differs; its number is named.
    """
    T, D, *_, num_classes = structure.blocks[0].sizes
    generator = torch.Generator().manual_seed(0)
    for number, block in enumerate(model.blocks):
        at = f"blocks.{number}"
        with _alone():
            theirs = _drawn_copy(block, at, FORWARD_SCALE, generator)
            x = torch.randn(ROWS, T, D, generator=generator, **HERE)
            y = torch.tensor([num_classes - 1, -1], device="cpu") if num_classes else None
            options = {"y": y} if "y" in inspect.signature(theirs.forward).parameters else {}
            got = _run(f"{at}.forward", theirs, x.clone(), **options)
            shadow.link_block(number, _read_block(theirs))
            z, log_det = shadow.blocks[number](x, y, backend="torch", mean=False)
        shadow.link_block(number, structure.blocks[number])
        if not (isinstance(got, (tuple, list)) and len(got) == 2):
            raise ValueError(f"{at}.forward must return z and log_det, got a {type(got).__name__}")
        _compare(f"{at}.forward, z", got[0], z)
        try:
            _compare(f"{at}.forward, log_det", got[1], log_det)
        except ValueError:
            _compare(f"{at}.forward, log_det", got[1], log_det / (T * D))


def probe_reverse(model: nn.Module, original: type, structure: Structure) -> None:
    """Compare the model's own reverse with ours, on a model of one block of each kind, of one layer each.

    Raises:
        ValueError: reverse needs arguments which are not known, cannot be run, or differs.
    """
    signature = inspect.signature(original.reverse)
    noise, *others = list(signature.parameters.values())[1:]
    for each in others:
        if each.default is each.empty and each.name not in OPTIONS and each.kind < each.VAR_KEYWORD:
            if each.kind is not each.VAR_POSITIONAL:
                raise ValueError(f"reverse needs an argument {each.name!r}, which is not known")
    T, D, *_, num_classes = structure.blocks[0].sizes
    generator = torch.Generator().manual_seed(1)
    with _alone():
        small = _shortened(model, original, structure, generator)
        shadow = Shadow(read(small, original))
        shadow.backend = "torch"
        z = torch.randn(ROWS, T, D, generator=generator, **HERE)
        y = torch.arange(ROWS, device="cpu") % num_classes if num_classes else None
        guided = {"guidance": 1.5, "attn_temp": 0.8, "annealed_guidance": True, "return_sequence": True}
        for options in ({"y": y}, {"y": y} | guided):
            known = {name: value for name, value in options.items() if name in signature.parameters}
            theirs = _run("reverse", original.reverse, small, z.clone(), **known)
            _compare("reverse", theirs, shadow.reversed_as(small, {noise.name: z} | known))


def knows_forward(model: nn.Module, original: type, structure: Structure) -> bool:
    """Whether the model's own forward, of x and labels alone, returns what `Shadow.encoded_as` does.

    It need not: a forward with other arguments or results keeps running on its own code.
    """
    T, D, *_, num_classes = structure.blocks[0].sizes
    generator = torch.Generator().manual_seed(2)
    with _alone():
        try:
            small = _shortened(model, original, structure, generator)
            shadow = Shadow(read(small, original))
            tokens = torch.randn(ROWS, T, D, generator=generator, **HERE)
            x = small.unpatchify(tokens) if gives_images(small) else tokens
            y = (torch.arange(ROWS, device="cpu") % num_classes,) if num_classes else ()
            theirs = _run("forward", original.forward, small, x, *y)
            _compare("forward", theirs, shadow.encoded_as(small, x, *y, by_modules=True))
        except ValueError:
            return False
    return True


@contextmanager
def _alone() -> Iterator[None]:
    """Free of what the caller has turned on."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        yield


def _read_block(block: nn.Module) -> Block:
    """What the walk finds in a copy of a block."""
    alone = nn.Module()
    alone.blocks = nn.ModuleList([block])
    return read(alone, nn.Module).blocks[0]


def _drawn_copy(block: nn.Module, at: str, scale: float, generator: torch.Generator, layers: int | None = None) -> Any:
    """A copy on the CPU, in float32, in eval mode, with drawn parameters.

    scale: of the log-scales and shifts it gives.  layers: how many of its layers are kept; None for all.
    """

    def copied() -> nn.Module:
        twin = copy.deepcopy(block)
        if layers is not None:
            twin.attn_blocks = twin.attn_blocks[:layers]
        return twin.to(**HERE).eval()

    twin = _run(f"a copy of {at}", copied)
    for name, parameter in twin.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator, **HERE)
        if "norm.weight" in name:
            draw = 1 + 0.2 * draw
        elif "proj_out" in name:
            draw = draw * scale / (parameter.size(-1) * (1 + 2 * len(twin.attn_blocks))) ** 0.5
        elif parameter.ndim == 2 and "embed" not in name:
            draw = draw / parameter.size(-1) ** 0.5
        else:
            draw = 0.3 * draw
        parameter.copy_(draw)
    return twin


def _shortened(model: nn.Module, original: type, structure: Structure, generator: torch.Generator) -> nn.Module:
    """The model with the first block of each kind and order, of one layer each, and with a drawn var."""
    first = {}
    for number, block in enumerate(structure.blocks):
        first.setdefault((tuple(kind for _, kind, _ in block.kinds), tuple(block.places)), number)
    blocks = [
        _drawn_copy(model.blocks[number], f"blocks.{number}", REVERSE_SCALE, generator, layers=1)
        for number in first.values()
    ]
    small = original.__new__(original)
    small.__dict__.update(vars(model))
    small.__dict__["_modules"] = {**model._modules, "blocks": nn.ModuleList(blocks)}
    small.__dict__["_buffers"] = dict(model._buffers)
    if structure.var is not None:
        small._buffers["var"] = 0.5 + torch.rand(structure.var.shape, generator=generator, **HERE)
    return small


def _run(what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return call(*args, **kwargs)
    except Exception as error:  # foreign code raises what it likes
        message = f"{what} fails on a CPU in float32: {type(error).__name__}: {error}"
        raise ValueError(message) from error


def _compare(what: str, theirs: Any, ours: Any) -> None:
    """Raise where two results differ in kind or by more than the tolerance."""
    if isinstance(ours, (tuple, list)):
        if not isinstance(theirs, type(ours)) or len(theirs) != len(ours):
            got = f"{type(theirs).__name__}" + (f" of {len(theirs)}" if isinstance(theirs, (tuple, list)) else "")
            raise ValueError(f"{what} must return a {type(ours).__name__} of {len(ours)}, got a {got}")
        for number, pair in enumerate(zip(theirs, ours, strict=True)):
            _compare(f"{what}, result {number}", *pair)
        return
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        got = f"one of {tuple(theirs.shape)}" if isinstance(theirs, Tensor) else f"a {type(theirs).__name__}"
        raise ValueError(f"{what} must be a tensor of shape {tuple(ours.shape)}, got {got}")
    difference = (theirs - ours).abs()
    if not (difference <= TOLERANCE * (1 + theirs.abs())).all():
        worst = difference.max().item()
        raise ValueError(f"{what} differs from that of a TarFlow by {worst:.3g}, with drawn weights in float32")
