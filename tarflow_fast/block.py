"""A flow block: the causal transformer that conditions an affine step, under the module names of the original.

    h = proj_in(x) + pos_embed + class_embed[y];   L times  h += proj(attention(LN(h))),  h += fc2(GELU(fc1(LN(h))))
    (a, b) = halves of proj_out(h)                                              (arXiv 2412.06329, section 2)

The submodules are called as modules, so that adapters, hooks and quantized layers put inside keep working. GPUs compute
a layer that has none of those by the fused ops (tarflow_fast/fused.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tarflow_fast.fused import fused_layer, takes_fused_layer
from tarflow_fast.ops import affine
from tarflow_fast.validate import check_labels, check_tensor

if TYPE_CHECKING:
    from tarflow_fast.inverse.workspace import KVCache

HEAD_SIZE = 64


class Attention(nn.Module):
    """Causal multi-head self-attention behind a LayerNorm; qkv is one Linear, its output read as (3, H, E)."""

    def __init__(self, channels: int, head_size: int = HEAD_SIZE) -> None:
        super().__init__()
        self.head_size = head_size
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def _query_key_value(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, C = h.shape
        qkv = self.qkv(self.norm(h)).view(B, T, 3, C // self.head_size, self.head_size)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, E)

    def _merge(self, heads: Tensor, shape: torch.Size) -> Tensor:
        return self.proj(heads.transpose(1, 2).reshape(shape))

    def forward(self, h: Tensor) -> Tensor:
        """All tokens at once. h, result: (B, T, C)."""
        query, key, value = self._query_key_value(h)
        return self._merge(F.scaled_dot_product_attention(query, key, value, is_causal=True), h.shape)

    def step(self, h: Tensor, kv_cache: KVCache, layer: int, query_scale: Tensor | None) -> Tensor:
        """One token against the cache of those before it. h, result: (R, 1, C); query_scale: (R, 1, 1, 1) or None."""
        query, key, value = self._query_key_value(h)
        key, value = kv_cache.append(layer, key, value)
        if query_scale is not None:
            query = query * query_scale.to(query.dtype)
        return self._merge(F.scaled_dot_product_attention(query, key, value), h.shape)


class MLP(nn.Module):
    """LayerNorm, Linear to `expansion` times the width, exact (erf) GELU, Linear back."""

    def __init__(self, channels: int, expansion: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.main = nn.Sequential(
            nn.Linear(channels, channels * expansion), nn.GELU(), nn.Linear(channels * expansion, channels)
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.main(self.norm(h))


class AttentionBlock(nn.Module):
    """One pre-LN transformer layer."""

    def __init__(self, channels: int, head_size: int = HEAD_SIZE, expansion: int = 4) -> None:
        super().__init__()
        self.attention = Attention(channels, head_size)
        self.mlp = MLP(channels, expansion)

    def forward(self, h: Tensor, backend: str = "auto") -> Tensor:
        """All tokens at once. h, result: (B, T, C); backend: which kernels to use, see `tarflow_fast.ops`."""
        if takes_fused_layer(self, h, backend):
            return fused_layer(self, h, backend)
        h = h + self.attention(h)
        return h + self.mlp(h)

    def step(self, h: Tensor, kv_cache: KVCache, layer: int, query_scale: Tensor | None) -> Tensor:
        h = h + self.attention.step(h, kv_cache, layer, query_scale)
        return h + self.mlp(h)


class MetaBlock(nn.Module):
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
    """

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
    ) -> None:
        super().__init__()
        self.flip, self.nvp, self.num_classes = flip, nvp, num_classes
        self.proj_in = nn.Linear(token_size, channels)
        self.pos_embed = nn.Parameter(0.01 * torch.randn(num_tokens, channels))
        self.class_embed = nn.Parameter(0.01 * torch.randn(num_classes, 1, channels)) if num_classes else None
        self.attn_blocks = nn.ModuleList(AttentionBlock(channels, head_size, expansion) for _ in range(num_layers))
        self.proj_out = nn.Linear(channels, 2 * token_size if nvp else token_size)
        nn.init.zeros_(self.proj_out.weight)
        # The original keeps its (T, T) masks as buffers: 32 MiB of an ImageNet64 file. Here they exist in files only.
        self.register_state_dict_post_hook(_write_mask)
        self.register_load_state_dict_pre_hook(_drop_mask)

    def class_embedding(self, y: Tensor | None) -> Tensor | None:
        """(B, 1, C) for labels y (B,); the mean over classes, (1, C), where y is None and in rows with y < 0."""
        if self.class_embed is None:
            return None
        mean = self.class_embed.mean(dim=0)
        if y is None:
            return mean
        # no branch on the values of y: a branch would be a host sync a block, and a graph break under torch.compile
        return torch.where((y < 0).view(-1, 1, 1), mean, self.class_embed[y.clamp(min=0)])

    def embed(self, tokens: Tensor, pos_embed: Tensor, class_embedding: Tensor | None) -> Tensor:
        """Tokens of net order (R, W, D) -> the residual stream (R, W, C)."""
        h = self.proj_in(tokens) + pos_embed
        return h if class_embedding is None else h + class_embedding

    def forward(self, x: Tensor, y: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """x -> z, with z_{i+1} = (x_{i+1} - b_i) * exp(-a_i) in the block's order.

        Args:
            x: (B, T, D), the parameters' dtype (under autocast any of float32, bfloat16 and float16).
            y: (B,) int64 labels, negative for none; or None.
            backend: which kernels to use, see `tarflow_fast.ops`.

        Returns:
            z (B, T, D) in x's dtype, and logdet (B,) float32 (float64 for float64 x): the mean over T * D of -a.
        """
        tokens, pos_embed = (x.flip(1), self.pos_embed.flip(0)) if self.flip else (x, self.pos_embed)
        h = self.embed(tokens, pos_embed, self.class_embedding(y))
        for layer in self.attn_blocks:
            h = layer(h, backend) if type(layer) is AttentionBlock else layer(h)
        ab = self.proj_out(h)
        # One 16-bit type beside another, as autocast makes of images in the other: float32 holds both.
        tokens = x.float() if x.dtype.itemsize == 2 and ab.dtype != x.dtype else x
        z, log_det = affine(tokens, ab, flip=self.flip, backend=backend)
        return z.to(x.dtype), log_det / (x.size(1) * x.size(2))

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
        from tarflow_fast.inverse import Guidance, invert_block

        check_tensor("reverse", "z", z, ("B", self.pos_embed.size(0), self.proj_in.in_features), self.pos_embed)
        y = check_labels("reverse", y, z.size(0), self.num_classes, self.pos_embed)
        guide = Guidance(guidance, guide_what, attn_temp, annealed_guidance)
        return invert_block(self, z, y, guide)[0]


def _write_mask(block: MetaBlock, state: dict, prefix: str, _metadata: dict) -> None:
    pos_embed = block.pos_embed
    T = pos_embed.size(0)
    state[prefix + "attn_mask"] = torch.ones(T, T, dtype=pos_embed.dtype, device=pos_embed.device).tril()


def _drop_mask(_block: MetaBlock, state: dict, prefix: str, *_: object) -> None:
    state.pop(prefix + "attn_mask", None)
