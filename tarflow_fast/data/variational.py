"""Variational dequantisation: the noise of the bytes is drawn by a small flow that sees the image.

    w uniform in [0, 1)^(C H W);   v_0 = logit(w);   v = f_K(... f_1(v_0 exp(a_0) + b_0));   u = sigmoid(v)
    log q(u | image) = log s'(v_0) - log |det dv/dv_0| - log s'(v),   s the sigmoid, log s'(v) = log s(v) + log s(-v)

(Flow++, Ho et al., arXiv 1902.00275, section 3.1; there the base is normal. Here it is logistic, so that the start
values, at which every f is the identity, are uniform dequantisation.) a_0 and b_0 come from a transformer over the
patches of the image, in which every patch sees every other. Each f_k is an affine step: its parameters for a patch come
from the patches before it, which its net sees as 2 s(v) - 1, in one order or in the reverse, and from that transformer.
Every log-scale a is 3 tanh(a / 3) of what a net gives, so that no noise can overflow.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tarflow_fast import ops
from tarflow_fast.checkpoint import DEQUANTIZER
from tarflow_fast.config import check_img_size
from tarflow_fast.data.dequantize import to_unit
from tarflow_fast.engines.fused import fused_layers
from tarflow_fast.files import few, write_atomic
from tarflow_fast.net import HEAD_SIZE, AttentionBlock, CausalNet, Order
from tarflow_fast.validate import check_positive_int

if TYPE_CHECKING:
    from tarflow_fast.model import TarFlow

__all__ = ["VariationalDequantizer"]

_LEAST, _MOST = 2.0**-25, 1 - 2.0**-24  # torch.rand draws multiples of 2^-24, 0 among them, whose logit is infinite


def _seeing_all(layer: AttentionBlock, h: Tensor) -> Tensor:
    """A layer whose tokens see one another, later ones too. h, result: (B, T, C)."""
    query, key, value = layer.attention._query_key_value(h)
    h = h + layer.attention._merge(F.scaled_dot_product_attention(query, key, value), h.shape)
    return h + layer.mlp(h)


def _bounded(parameters: Tensor) -> Tensor:
    """(..., 2D) of a net, a then b, with a kept in (-3, 3)."""
    a, b = parameters.chunk(2, dim=-1)
    return torch.cat([3 * torch.tanh(a / 3), b], dim=-1)


def _log_slope(v: Tensor) -> Tensor:
    """log of the sigmoid's derivative at v, summed: (B, T, D) -> (B,)."""
    return (F.logsigmoid(v) + F.logsigmoid(-v)).sum(dim=(1, 2))


class _Step(CausalNet):
    """v -> (v - b) exp(-a) token by token, a and b from the tokens before it and the context. The identity at first."""

    def __init__(self, token_size: int, channels: int, num_tokens: int, flip: bool, num_layers: int) -> None:
        super().__init__(token_size, 2 * token_size, channels, num_tokens, num_layers)
        nn.init.zeros_(self.proj_out.bias)
        self.order = Order(num_tokens, flip)

    def _net(self, v: Tensor, context: Tensor) -> Tensor:
        """a and b (B, T, 2D) in net order; row i is of the token after the i-th, and sees that token's context."""
        order = self.order
        upcoming = order.take(context).roll(-1, dims=1)
        h = self.embed(order.take(2 * torch.sigmoid(v) - 1), order.take(self.pos_embed, 0), upcoming)
        return _bounded(self.proj_out(fused_layers(self.attn_blocks, h, "auto")))

    def forward(self, v: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """v (B, T, D), context (B, T, C) -> the result (B, T, D), and the log-determinant (B,)."""
        return ops.affine(v, self._net(v, context), flip=self.order.flip)

    def inverse(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The v that gives z, and the log-determinant of `forward` there. Pass n makes n + 1 tokens exact."""
        first, rest = self.order.take(z).split([1, z.size(1) - 1], dim=1)
        v, parameters = z, self._net(z, context)
        for _ in range(z.size(1) - 1):
            a, b = parameters[:, :-1].chunk(2, dim=-1)
            v = self.order.put(torch.cat([first, rest * torch.exp(a) + b], dim=1))
            parameters = self._net(v, context)
        a, _ = parameters[:, :-1].chunk(2, dim=-1)
        return v, -a.sum(dim=(1, 2))


class VariationalDequantizer(nn.Module):
    """q(u | image) on [0, 1)^(C H W), the formula above; a `Dequantizer` with parameters.

    It is made for flows over images of one size and any number of levels. It computes in float32 under autocast, too.

    Args:
        in_channels: channels of the image.
        img_size: side of the image in pixels, or (height, width); a multiple of patch_size.
        patch_size: side of a patch; T patches of D = in_channels * patch_size**2 numbers.
        channels: width C of its transformers, a multiple of 64.
        num_blocks: K, affine steps that go through the patches in turn as they are and in reverse.
        layers_per_block: attention layers of each.
        context_layers: attention layers of the transformer over the image.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, not positive, or does not divide as it must.
    """

    def __init__(
        self,
        in_channels: int,
        img_size: int | tuple[int, int],
        patch_size: int,
        channels: int = 64,
        num_blocks: int = 2,
        layers_per_block: int = 1,
        context_layers: int = 2,
    ) -> None:
        super().__init__()
        where = "VariationalDequantizer"
        height, width = check_img_size(where, img_size)
        sizes = {
            "in_channels": in_channels, "patch_size": patch_size, "channels": channels, "num_blocks": num_blocks,
            "layers_per_block": layers_per_block, "context_layers": context_layers,
        }  # fmt: skip
        self.config = {"img_size": [height, width]}
        self.config |= {name: check_positive_int(where, name, value) for name, value in sizes.items()}
        if height % patch_size or width % patch_size:
            raise ValueError(f"{where}: img_size must be a multiple of patch_size = {patch_size}, got {img_size}")
        if channels % HEAD_SIZE:
            raise ValueError(f"{where}: channels must be a multiple of {HEAD_SIZE}, got {channels}")
        self.shape, self.patch_size = (in_channels, height, width), patch_size
        self.grid = height // patch_size, width // patch_size
        T, D = self.grid[0] * self.grid[1], in_channels * patch_size**2
        self.context = CausalNet(D, 2 * D, channels, T, context_layers)
        nn.init.zeros_(self.context.proj_out.bias)
        self.steps = nn.ModuleList(_Step(D, channels, T, k % 2 == 1, layers_per_block) for k in range(num_blocks))

    @classmethod
    def of(cls, flow: TarFlow, **sizes: int) -> VariationalDequantizer:
        """A fresh one for the images of this flow, with its patches. sizes: channels, num_blocks, ..."""
        size = flow.config["img_size"]
        size = size if isinstance(size, int) else tuple(size)
        return cls(flow.in_channels, size, flow.patch_size, **sizes)

    def forward(self, images: Tensor, noise: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        """u = u(noise; images) and log q(u | images), differentiable in the parameters.

        Args:
            images: (B, C, H, W) integers in [0, levels).
            noise: the same shape, uniform in [0, 1), floating. Below 2^-25 and above 1 - 2^-24 it counts as that.
            levels: grey levels of the data.

        Returns:
            u (B, C, H, W) in [0, 1) and log q (B,), nats, summed over all dimensions; of the parameters' dtype.

        Raises:
            TypeError, ValueError: images or noise of another shape, dtype or device; levels below 2.
        """
        self._check("images", images, floating=False, levels=levels)
        self._check("noise", noise, floating=True, count=len(images))
        with torch.autocast(images.device.type, enabled=False):
            (a, b), seen = self._see(images, levels)
            base = torch.logit(self._tokens(noise.to(a.dtype).clamp(_LEAST, _MOST)))
            v, log_det = base * torch.exp(a) + b, a.sum(dim=(1, 2))
            for step in self.steps:
                v, stretched = step(v, seen)
                log_det = log_det + stretched
            # rounded, the sigmoid reaches 1, which is the next level
            u = torch.sigmoid(v).clamp(max=1 - torch.finfo(v.dtype).eps / 2)
            return self._images(u), _log_slope(base) - log_det - _log_slope(v)

    def log_prob(self, images: Tensor, u: Tensor, levels: int) -> Tensor:
        """log q(u | images) of given noise u (B, C, H, W) in [0, 1), in nats, (B,). Takes T passes a step.

        Raises:
            TypeError, ValueError: as `forward`; u outside [0, 1).
        """
        self._check("images", images, floating=False, levels=levels)
        self._check("u", u, floating=True, count=len(images))
        if u.numel() and not bool(((u >= 0) & (u < 1)).all()):
            raise ValueError(f"VariationalDequantizer: u must be in [0, 1), got [{float(u.min())}, {float(u.max())}]")
        with torch.autocast(images.device.type, enabled=False):
            (a, b), seen = self._see(images, levels)
            kind = torch.finfo(a.dtype)
            v = end = torch.logit(self._tokens(u.to(a.dtype).clamp(kind.tiny, 1 - kind.eps / 2)))
            log_det = a.sum(dim=(1, 2))
            for step in reversed(self.steps):
                v, stretched = step.inverse(v, seen)
                log_det = log_det + stretched
            return _log_slope((v - b) * torch.exp(-a)) - log_det - _log_slope(end)

    def _see(self, images: Tensor, levels: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """a_0 and b_0 (B, T, D), and what the steps are told of each patch, (B, T, C)."""
        context = self.context
        tokens = self._tokens(to_unit(images, levels).to(context.pos_embed.dtype))
        h = context.embed(tokens, context.pos_embed, None)
        for layer in context.attn_blocks:
            h = layer(h, _seeing_all)
        return _bounded(context.proj_out(h)).chunk(2, dim=-1), h

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, D), in the order of `TarFlow.patchify`."""
        return F.pixel_unshuffle(x, self.patch_size).flatten(2).transpose(1, 2)

    def _images(self, tokens: Tensor) -> Tensor:
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, self.grid), self.patch_size)

    def _check(self, name: str, value: object, floating: bool, count: int | str = "B", levels: int = 2) -> None:
        where, like = "VariationalDequantizer", self.context.pos_embed
        check_positive_int(where, "levels", levels, 2)
        kind = "floating" if floating else "integers"
        if not isinstance(value, Tensor):
            raise TypeError(f"{where}: {name} must be a torch.Tensor, got {type(value).__name__}")
        if value.is_floating_point() != floating or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{where}: {name} must be {kind}, got {value.dtype}")
        if tuple(value.shape[1:]) != self.shape or value.ndim != 4 or count not in ("B", len(value)):
            expected = ", ".join(map(str, (count, *self.shape)))
            raise ValueError(f"{where}: {name} must have shape ({expected}), got {tuple(value.shape)}")
        if value.device != like.device:
            raise ValueError(f"{where}: {name} must be on its device {like.device}, got {value.device}")

    def save(self, folder: str | Path) -> None:
        """Write the weights, and how it is built, into a flow's folder as one file, whole or not at all."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        # one metadata entry: the order of several is not fixed, and equal weights are to give equal bytes
        header = {"dequantizer": json.dumps(self.config, sort_keys=True)}
        write_atomic(Path(folder) / DEQUANTIZER, lambda temporary: save_file(tensors, temporary, metadata=header))

    @classmethod
    def load(cls, folder: str | Path, device: Any = None) -> VariationalDequantizer:
        """What `save` wrote into this folder, in eval mode.

        Raises:
            FileNotFoundError: there is none.
            ValueError: a damaged file, or one of something else.
        """
        path = Path(folder) / DEQUANTIZER
        if not path.is_file():
            raise FileNotFoundError(f"VariationalDequantizer: there is no {path}")
        try:
            with safe_open(path, framework="pt") as file:
                config = json.loads((file.metadata() or {}).get("dequantizer", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, ValueError, OSError) as error:
            raise ValueError(f"VariationalDequantizer: cannot read {path}: {error}") from error
        try:
            made = cls(**config | {"img_size": tuple(config["img_size"])})
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"VariationalDequantizer: {path} holds no dequantiser: {error}") from error
        wanted = {name: value.shape for name, value in made.state_dict().items()}
        got = {name: value.shape for name, value in tensors.items()}
        if wanted != got:
            wrong = few(sorted(n for n in wanted.keys() | got.keys() if wanted.get(n) != got.get(n)))
            raise ValueError(f"VariationalDequantizer: the weights in {path} do not fit: {wrong}")
        made.load_state_dict(tensors)
        return made.to(device).eval()
