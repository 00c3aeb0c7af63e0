"""The flow that stands in for a model of another package: our modules, its weights.

It owns no weights. `link` puts the model's own tensors into it, at every call, so that none can be out of date.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tarflow_fast.apply.structure import Block, Structure, weight_names
from tarflow_fast.flow import TokenFlow
from tarflow_fast.ops.registry import warn_once
from tarflow_fast.solvers.density import density_paths, encode_all
from tarflow_fast.solvers.nonfinite import NonFinite
from tarflow_fast.transforms import Guidance
from tarflow_fast.validate import check_labels, check_tensor

__all__ = ["OPTIONS", "Shadow", "gives_images", "unknown_argument"]

OPTIONS = ("y", "guidance", "guide_what", "attn_temp", "annealed_guidance", "return_sequence")


class Shadow(TokenFlow):
    """A `TokenFlow` of the sizes and orders found in a model, without storage until it is linked.

    Raises:
        ValueError: a weight of the model has another shape than these sizes ask for.
    """

    def __init__(self, structure: Structure) -> None:
        T, D, C, L, E, expansion, nvp, num_classes = structure.blocks[0].sizes
        orders = [block.places for block in structure.blocks]
        with torch.device("meta"):
            super().__init__(
                T, D, C, len(orders), L, head_size=E, expansion=expansion, nvp=nvp, num_classes=num_classes,
                orders=orders,
            )  # fmt: skip
        self._weight_names = weight_names(L, num_classes > 0)
        self._shapes = [self._shape(name) for name in self._weight_names]
        self._places = [[self._place(block, name) for name in self._weight_names] for block in self.blocks]
        self._norms = [
            [norm for layer in block.attn_blocks for norm in (layer.attention.norm, layer.mlp.norm)]
            for block in self.blocks
        ]
        self.link(structure)

    def _shape(self, name: str) -> tuple[int, ...]:
        tensor = self._place(self.blocks[0], name)[0][name.rpartition(".")[2]]
        return () if tensor is None else tuple(tensor.shape)

    @staticmethod
    def _place(block: nn.Module, name: str) -> tuple[dict[str, Tensor | None], str]:
        path, _, which = name.rpartition(".")
        return block.get_submodule(path)._parameters, which

    def link(self, structure: Structure) -> None:
        """Take the weights of a model, with their gradients: the tensors themselves, no copies.

        Raises:
            ValueError: a weight has another shape than it should have.
        """
        for number, block in enumerate(structure.blocks):
            for name, tensor, shape in zip(self._weight_names, block.tensors, self._shapes, strict=True):
                if tensor is not None and tensor.shape != shape:
                    raise ValueError(f"blocks.{number}.{name} must have shape {shape}, got {tuple(tensor.shape)}")
        for number, block in enumerate(structure.blocks):
            self.link_block(number, block)
        var, like = structure.var, structure.blocks[0].tensors[0]
        self._buffers["var"] = like.new_ones(()).expand(self.var.shape) if var is None else var

    def link_block(self, number: int, block: Block) -> None:
        """Take the weights of one block, whose shapes are known to be right."""
        for (parameters, which), tensor in zip(self._places[number], block.tensors, strict=True):
            parameters[which] = tensor
        for norm, eps in zip(self._norms[number], block.eps, strict=True):
            norm.eps = eps

    def reversed_as(self, model: nn.Module, arguments: dict[str, Any]) -> Any:
        """What the model's own reverse would return.

        Args:
            model: the model whose weights are linked.
            arguments: of its reverse, the noise first, by name; others than those of OPTIONS are not looked at.

        Returns:
            Images, or the list of K + 1 stages of them, where the model knows patches; else tokens (B, T, D) and
            log |det dx / dz| (B,), nats. Images carry no gradient (autograd cannot follow the original's either);
            tokens do, where gradients are on and something asks for them.
        """
        x = next(iter(arguments.values()))
        given = {name: arguments[name] for name in OPTIONS if name in arguments}
        check_tensor("reverse", next(iter(arguments)), x, ("B", *self.var.shape), self.var, scaled=True)
        y = check_labels("reverse", given.pop("y", None), x.size(0), self.num_classes, self.var)
        return_sequence, annealed = given.pop("return_sequence", False), given.pop("annealed_guidance", False)
        guide = Guidance(given.get("guidance", 0), given.get("guide_what", "ab"), given.get("attn_temp", 1.0), annealed)
        images, bad = gives_images(model), NonFinite("reverse", "warn", x.size(0))
        graph = not images and torch.is_grad_enabled() and (x.requires_grad or self._wants_gradients())
        if graph:
            warn_once("reverse keeps a graph for autograd, on PyTorch's own layers; under torch.no_grad() it is faster")
        with torch.set_grad_enabled(graph), self._call("reverse", None, graph, None) as call:
            scaled = x if "var" not in model._buffers else x * self.var.sqrt()
            stages, log_det = self._invert(scaled, y, guide, call, bad, None)
            bad.warn()
            if not images:
                return stages[-1], log_det + 0.5 * self.var.to(log_det).log().sum()
            if return_sequence:
                return [model.unpatchify(stage) for stage in (x.clone(), *stages[1:])]
            return model.unpatchify(stages[-1])

    def encoded_as(
        self, model: nn.Module, x: Tensor, y: Tensor | None = None, by_modules: bool = False
    ) -> tuple[Tensor, ...] | None:
        """What the model's own forward would return, without gradients; None where it had better run itself.

        Args:
            model: the model whose weights are linked.
            x: images, where the model knows patches; else tokens (B, T, D).
            y: (B,) int64 labels, negative for none; or None.
            by_modules: compute it by our modules in PyTorch, and not by an engine.

        Returns:
            z, the tokens after each block, and log |det dz/dx| / (T D), where the model knows patches; else z and
            log |det dz/dx|, nats.
        """
        images = gives_images(model)
        if not isinstance(x, Tensor) or not (y is None or (isinstance(y, Tensor) and y.dtype == torch.int64)):
            return None
        tokens = model.patchify(x) if images else x
        if tokens.shape[1:] != self.var.shape or tokens.dtype != self.var.dtype or (y is not None and len(y) != len(x)):
            return None
        y = y if self.num_classes else None
        with self._call("forward", None, False, None) as call:
            if by_modules:
                stages, log_det = [tokens], 0.0
                for block in self.blocks:
                    z, stretched = block(stages[-1], y, backend="torch", mean=False)
                    stages, log_det = [*stages, z], log_det + stretched
                del stages[0]
            else:
                paths = density_paths(self.bijections, tokens, call)
                if not paths:
                    return None
                stages, log_det = encode_all(self.bijections, tokens, y, call, paths)
        return (stages[-1], stages, log_det / self.var.numel()) if images else (stages[-1], log_det)

    def _wants_gradients(self) -> bool:
        return any(parameter.requires_grad for block in self.blocks for parameter in block.parameters())


def gives_images(model: nn.Module) -> bool:
    """Whether its reverse returns images, and no log-determinant: it knows how to put patches together."""
    return callable(getattr(model, "patchify", None)) and callable(getattr(model, "unpatchify", None))


def unknown_argument(signature: inspect.Signature, arguments: dict[str, Any]) -> str:
    """The first argument of a call which changes what we do not know; "" when there is none.

    signature: of the model's own reverse: self, the noise, and others.  arguments: of the call, defaults included.
    """
    for number, (name, parameter) in enumerate(signature.parameters.items()):
        if number < 2 or name in OPTIONS or name not in arguments:
            continue
        value, default = arguments[name], parameter.default
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if value:
                return ", ".join(value) if isinstance(value, dict) else f"*{name}"
        elif not (value is None or value is default or (isinstance(value, (int, float, str)) and value == default)):
            return name
    return ""
