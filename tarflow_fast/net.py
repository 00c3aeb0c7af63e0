"""The net of a flow block: a causal pre-LN transformer that turns tokens into the parameters of a transform.

    h = proj_in(x) + pos_embed + class_embed[y];   L times  h += proj(attention(LN(h))),  h += fc2(GELU(fc1(LN(h))))
    parameters = proj_out(h)                                                    (arXiv 2412.06329, section 2)

Its output at token i depends on tokens 0 to i alone and conditions token i + 1. It knows no engine: engines read its
weights, or call its modules, so that adapters, hooks and quantized layers put inside keep working.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["HEAD_SIZE", "MLP", "Attention", "AttentionBlock", "CausalNet", "KVCache", "Order"]

HEAD_SIZE = 64
PRODUCTS_UP_TO = 256  # tokens, see causal_attention


class Order:
    """The order in which a net sees the T tokens of a sequence.

    places[i] is the place, in the sequence, of the i-th token the net sees. The identity and the flip need no index.

    Args:
        num_tokens: T.
        flip: see the tokens in reverse.
        places: a permutation of range(T) instead.

    Raises:
        ValueError: places is no permutation of range(T).
        TypeError: places holds something else than ints.
    """

    def __init__(self, num_tokens: int, flip: bool = False, places: Sequence[int] | Tensor | None = None) -> None:
        self._index: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        identity = list(range(num_tokens))
        if places is None:
            self.places = identity[::-1] if flip else identity
        else:
            self.places = places.tolist() if isinstance(places, Tensor) else list(places)
            if any(isinstance(place, bool) or not hasattr(place, "__index__") for place in self.places):
                raise TypeError(f"Order: places must be ints, got {self.places}")
            self.places = [int(place) for place in self.places]
            if sorted(self.places) != identity:
                raise ValueError(f"Order: places must be a permutation of 0 .. {num_tokens - 1}, got {self.places}")
        self.identity, self.flip = self.places == identity, self.places == identity[::-1] and num_tokens > 1
        self.inverse = sorted(identity, key=self.places.__getitem__)

    def __reduce__(self) -> tuple:
        return type(self), (len(self.places), False, self.places)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Order) and self.places == other.places

    def __hash__(self) -> int:
        return hash(tuple(self.places))

    def __repr__(self) -> str:
        return "identity" if self.identity else "flip" if self.flip else f"Order({self.places})"

    def index(self, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
        """`places` as integers (T,) on the device; not to be written."""
        if torch.compiler.is_compiling():
            return torch.tensor(self.places, dtype=dtype, device=device)
        if (device, dtype) not in self._index:
            with torch.inference_mode(False):  # autograd may not keep a tensor that was made there
                self._index[device, dtype] = torch.tensor(self.places, dtype=dtype, device=device)
        return self._index[device, dtype]

    def take(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """From the order of the sequence to that of the net."""
        if self.identity:
            return tokens
        return tokens.flip(dim) if self.flip else tokens.index_select(dim, self.index(tokens.device))

    def put(self, tokens: Tensor, dim: int = 1) -> Tensor:
        """From the order of the net back to that of the sequence."""
        if self.identity:
            return tokens
        if self.flip:
            return tokens.flip(dim)
        return tokens.index_select(dim, self.index(tokens.device).argsort())


class KVCache:
    """Preallocated keys and values, (L, R, H, T, E) each, written in place; one cache serves all flow blocks of a call.

    It is allocated at the first append, when dtype (autocast!) and device are known. With `growing=True` nothing is
    written in place, so that autograd may look back: the differentiable inverse needs that.
    """

    def __init__(self, num_layers: int, num_tokens: int, growing: bool = False) -> None:
        self.num_layers, self.num_tokens, self.growing = num_layers, num_tokens, growing
        self.storage: Tensor | None = None
        self.restart()

    def restart(self) -> None:
        """Forget the tokens seen and keep the memory: the next flow block begins."""
        self.length = [0] * self.num_layers
        self.grown: list[tuple[Tensor, Tensor] | None] = [None] * self.num_layers

    def rewind(self, length: int) -> None:
        """Forget the tokens from the `length`-th on. A growing cache, which autograd reads, forgets none."""
        if not self.growing:
            self.length = [min(seen, length) for seen in self.length]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add W tokens, (R, H, W, E) each; returns all keys and values so far, (R, H, t + W, E)."""
        if self.growing:
            if self.grown[layer] is not None:
                key, value = (
                    torch.cat([old, new], dim=2) for old, new in zip(self.grown[layer], (key, value), strict=True)
                )
            self.grown[layer] = (key, value)
            return key, value
        R, H, W, E = key.shape
        if self.storage is None:
            self.storage = key.new_empty(2, self.num_layers, R, H, self.num_tokens, E)
        start, end = self.length[layer], self.length[layer] + W
        self.length[layer] = end
        keys, values = self.storage[:, layer]
        keys[:, :, start:end] = key
        values[:, :, start:end] = value
        return keys[:, :, :end], values[:, :, :end]


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax over s <= t of query[t] . key[s] / sqrt(E), times value; all (B, H, T, E).

    On a CPU, where gradients are recorded and sequences are short, by two batched products: forward and backward
    together took PyTorch's fused kernel, against these, 4.8 times as long in bf16 and 1.4 times in fp32 at T = 49,
    2.6 and 1.1 times at T = 256, but 0.7 and 0.4 times at T = 1024 (Zen 5, 2 threads).
    """
    if query.device.type == "cpu" and query.size(2) <= PRODUCTS_UP_TO and query.requires_grad:
        later = query.new_full((query.size(2), query.size(2)), -torch.inf).triu(1)
        scores = (query * query.size(-1) ** -0.5) @ key.transpose(-1, -2) + later
        return scores.softmax(-1).to(value.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


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
        return self._merge(causal_attention(query, key, value), h.shape)

    def step(self, h: Tensor, kv_cache: KVCache, layer: int, query_scale: Tensor | None) -> Tensor:
        """W tokens against the cache of those before them, and one another.

        h, result: (R, W, C); query_scale: (R, 1, 1, 1) or None.
        """
        query, key, value = self._query_key_value(h)
        key, value = kv_cache.append(layer, key, value)
        if query_scale is not None:
            query = query * query_scale.to(query.dtype)
        W, seen, mask = query.size(2), key.size(2), None
        if W > 1:  # query w sees the seen - W tokens before the window, and tokens 0 to w of it
            mask = torch.ones(W, seen, dtype=torch.bool, device=h.device).tril(seen - W)
        return self._merge(F.scaled_dot_product_attention(query, key, value, attn_mask=mask), h.shape)


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

    def forward(self, h: Tensor, compute: Callable[[AttentionBlock, Tensor], Tensor] | None = None) -> Tensor:
        """All tokens at once. h, result: (B, T, C).

        compute: what stands in for the layer's modules. It is handed in here, rather than called instead of the layer,
        so that hooks of the layer itself (those of FSDP, for one) still run.
        """
        if compute is not None:
            return compute(self, h)
        h = h + self.attention(h)
        return h + self.mlp(h)

    def step(self, h: Tensor, kv_cache: KVCache, layer: int, query_scale: Tensor | None) -> Tensor:
        """W tokens against the cache, as `Attention.step`."""
        h = h + self.attention.step(h, kv_cache, layer, query_scale)
        return h + self.mlp(h)


class CausalNet(nn.Module):
    """Tokens to parameters, under the module names of the original implementation.

    Args:
        token_size: D.
        outputs: parameters a token, a multiple of D.
        channels: C, a multiple of head_size.
        num_tokens: T.
        num_layers: L.
        head_size: E.
        expansion: width of the MLP over C.
        num_classes: 0 for an unconditional net.
    """

    # A class that says so for itself, not by inheritance, computes what its layers and `embed` say and nothing more, so
    # that an engine may read its weights and leave its methods out. A subclass is taken at its word, or not at all.
    is_plain = True

    recompute = False  # True: `forward` of a block keeps the inputs of its layers alone for the backward pass

    def __init__(
        self,
        token_size: int,
        outputs: int,
        channels: int,
        num_tokens: int,
        num_layers: int = 1,
        head_size: int = HEAD_SIZE,
        expansion: int = 4,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.proj_in = nn.Linear(token_size, channels)
        self.pos_embed = nn.Parameter(0.01 * torch.randn(num_tokens, channels))
        self.class_embed = nn.Parameter(0.01 * torch.randn(num_classes, 1, channels)) if num_classes else None
        self.attn_blocks = nn.ModuleList(AttentionBlock(channels, head_size, expansion) for _ in range(num_layers))
        self.proj_out = nn.Linear(channels, outputs)
        nn.init.zeros_(self.proj_out.weight)

    @property
    def num_tokens(self) -> int:
        return self.pos_embed.size(0)

    @property
    def token_size(self) -> int:
        return self.proj_in.in_features

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
