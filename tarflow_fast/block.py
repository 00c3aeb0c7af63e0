"""A flow block: a net, a transform, and the order in which the net sees the tokens (arXiv 2412.06329, section 2).

    (a_i, b_i) = net(x_0 .. x_i);   z_0 = x_0;   z_{i+1} = (x_{i+1} - b_i) exp(-a_i)          in the block's order

The block is its net, under the module names of the original, so that the keys of a state_dict are the original's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tarflow_fast.engines.call import Call
from tarflow_fast.engines.fused import fused_layers
from tarflow_fast.net import HEAD_SIZE, CausalNet, Order
from tarflow_fast.solvers import invert
from tarflow_fast.transforms import Bijection, Guidance, Transform, find_transform, settle_transform
from tarflow_fast.validate import check_labels, check_tensor

__all__ = ["HEAD_SIZE", "TRANSFORM_KEY", "MetaBlock", "check_transform", "check_transforms", "transform_in"]

TRANSFORM_KEY = "transform"  # of a state_dict: the name of a transform that the original has not


class MetaBlock(CausalNet):
    """One flow block x -> z over T tokens of size D.

    Args:
        token_size: D.
        channels: C, a multiple of head_size.
        num_tokens: T.
        flip: whether the block sees the tokens in reverse order (odd blocks of the model do).
        num_layers: L.
        head_size: E.
        expansion: width of the MLP over C.
        nvp: False drops the log-scale a (volume preserving).
        num_classes: 0 for an unconditional block.
        order: a permutation of range(T) instead of flip: the place of the i-th token the net sees.
        transform: as in `TokenFlow`.
    """

    is_plain = True  # forward and reverse are for the caller; the net is CausalNet's

    def __init__(
        self,
        token_size: int,
        channels: int,
        num_tokens: int,
        flip: bool = False,
        num_layers: int = 1,
        head_size: int = HEAD_SIZE,
        expansion: int = 4,
        nvp: bool = True,
        num_classes: int = 0,
        order: Sequence[int] | Tensor | None = None,
        transform: str | Transform | None = None,
    ) -> None:
        name, nvp = settle_transform("MetaBlock", transform, nvp)
        transform = find_transform("MetaBlock", name or ("affine" if nvp else "shift"))
        outputs = len(transform.parts) * token_size
        super().__init__(token_size, outputs, channels, num_tokens, num_layers, head_size, expansion, num_classes)
        self.transform, self.order = transform, Order(num_tokens, flip, order)
        # The original keeps its (T, T) masks as buffers: 32 MiB of an ImageNet64 file. Here they exist in files only.
        self.register_state_dict_post_hook(_write_extras)
        self.register_load_state_dict_pre_hook(_drop_extras)

    @property
    def flip(self) -> bool:
        """Whether the net sees the tokens in reverse."""
        return self.order.flip

    @property
    def nvp(self) -> bool:
        """Whether volumes change: False for the shift alone."""
        return self.transform.name != "shift"

    @property
    def bijection(self) -> Bijection:
        """What engines and solvers are given."""
        return Bijection(self, self.transform, self.order)

    def forward(
        self, x: Tensor, y: Tensor | None = None, backend: str = "auto", mean: bool = True
    ) -> tuple[Tensor, Tensor]:
        """x -> z, with z_{i+1} = (x_{i+1} - b_i) * exp(-a_i) in the block's order.

        Args:
            x: (B, T, D), the parameters' dtype (under autocast any of float32, bfloat16 and float16).
            y: (B,) int64 labels, negative for none; or None.
            backend: which kernels to use, see `tarflow_fast.ops`.
            mean: divide the log-determinant by T * D, as the original does.

        Returns:
            z (B, T, D) in x's dtype, and log |det dz/dx| (B,), the sum or mean of -a over T and D, float32 (float64 for
            float64 x).
        """
        order = self.order
        h = self.embed(order.take(x), order.take(self.pos_embed, 0), self.class_embedding(y))
        parameters = self.project(fused_layers(self.attn_blocks, h, backend, self.recompute))
        # One 16-bit type beside another, as autocast makes of images in the other: float32 holds both.
        wide = x.float() if x.dtype.itemsize == 2 and parameters.dtype != x.dtype else x
        if order.identity or order.flip:  # the kernels flip by index
            z, log_det = self.transform.forward(wide, parameters, order.flip, backend)
        else:
            z, log_det = self.transform.forward(order.take(wide), parameters, False, backend)
            z = order.put(z)
        return z.to(x.dtype), log_det / (x.size(1) * x.size(2)) if mean else log_det

    def project(self, h: Tensor) -> Tensor:
        """proj_out(h), in float32 under autocast.

        In bfloat16 a shift b next to -1, black, is a multiple of 1/256, half a level of an 8-bit image.
        """
        kind = h.device.type
        if h.dtype is torch.float32 and self.proj_out.weight.dtype is torch.float32 and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return self.proj_out(h)
        return self.proj_out(h)

    def invert(
        self,
        z: Tensor,
        y: Tensor | None = None,
        guidance: Guidance | None = None,
        call: Call | None = None,
        on_token: Callable[[], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """z (B, T, D) -> x (B, T, D) in z's dtype, and log |det dx/dz| (B,), nats, as `solvers.invert`."""
        guidance = Guidance() if guidance is None else guidance
        if call is not None:
            return invert(self.bijection, z, y, guidance, call, on_token)
        with Call() as own:
            return invert(self.bijection, z, y, guidance, own, on_token)

    @torch.no_grad()
    def reverse(
        self,
        z: Tensor,
        y: Tensor | None = None,
        guidance: float = 0.0,
        guide_what: str = "ab",
        attn_temp: float = 1.0,
        annealed_guidance: bool = False,
    ) -> Tensor:
        """z (B, T, D) -> x (B, T, D); z is never written. See `TarFlow.reverse` for the arguments."""
        check_tensor("reverse", "z", z, ("B", self.num_tokens, self.token_size), self.pos_embed)
        y = check_labels("reverse", y, z.size(0), self.num_classes, self.pos_embed)
        guide = Guidance(guidance, guide_what, attn_temp, annealed_guidance)
        guide.check(self.transform)
        return self.invert(z, y, guide)[0]


def transform_in(state: Mapping[str, Tensor], prefix: str) -> str | None:
    """The full name of the transform of the block whose keys begin with `prefix`; None where the state does not tell.

    Raises:
        ValueError: what stands there is no text.
    """
    if (told := state.get(prefix + TRANSFORM_KEY)) is not None:
        try:
            return bytes(told.tolist()).decode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"{prefix}{TRANSFORM_KEY} must hold the bytes of a name, got {told.dtype}") from error
    weights = [state.get(prefix + name) for name in ("proj_in.weight", "proj_out.weight")]
    if any(weight is None or weight.ndim != 2 for weight in weights):
        return None
    D, outputs = weights[0].size(1), weights[1].size(0)
    return {D: "shift", 2 * D: "affine"}.get(outputs)


def check_transform(where: str, transform: Transform, state: Mapping[str, Tensor], prefix: str) -> None:
    """Raise ValueError where the state of a block is that of another transform."""
    found = transform_in(state, prefix)
    if found not in (None, str(transform)):
        raise ValueError(f"{where}: {prefix[:-1] or 'the block'} must have the transform {transform!s}, got {found}")


def check_transforms(flow: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """The hook of a flow that refuses the state of another transform before any tensor is copied."""
    for k, block in enumerate(flow.blocks):
        check_transform("load_state_dict", block.transform, state, f"{prefix}blocks.{k}.")


def _write_extras(block: MetaBlock, state: dict, prefix: str, _metadata: dict) -> None:
    T, pos_embed = block.num_tokens, block.pos_embed
    state[prefix + "attn_mask"] = torch.ones(T, T, dtype=pos_embed.dtype, device=pos_embed.device).tril()
    if block.transform.name not in ("affine", "shift"):  # whose files are the original's
        name = str(block.transform).encode()
        state[prefix + TRANSFORM_KEY] = torch.tensor([*name], dtype=torch.uint8, device="cpu")


def _drop_extras(block: MetaBlock, state: dict, prefix: str, *_: object) -> None:
    check_transform("load_state_dict", block.transform, state, prefix)
    state.pop(prefix + "attn_mask", None)
    state.pop(prefix + TRANSFORM_KEY, None)
