"""The inverse of a flow block on the GPU: one sampling step of fused Triton kernels, captured once as a CUDA graph and
replayed for every token of every block.

Everything a step reads that changes lies in device memory: the weights of the block at hand (copied into the workspace,
in the storage type, which takes as long as one step), the position, the order of the tokens, the table of guidance
weights and the temperatures. So one graph serves all, and the host never waits for the device inside a block.

    embed, L x (LN+qkv+append, attention, proj+residual, LN+fc1+GELU, fc2+residual), proj_out+guidance+affine

The residual stream, x, softmax, exp and log_det are float32; weights, cache and the operands of products have the
storage type. With a window W > 1 a pass computes W tokens at once; W passes solve them exactly, since token k of a
window is final after k passes.

A workspace may serve `evaluate` instead: the net alone, on tokens that are given, W of them a pass and any W.

A row's bits depend neither on the other rows nor on its slot. They do depend on how many rows the call has, which
chooses the tiles (kernels/triton/tuning_step.py says where). A batch larger than memory is solved in parts, with the
tiles of the whole and so with its bits.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from tarflow_fast.engines.weights import Weights
from tarflow_fast.kernels.triton.device import on
from tarflow_fast.transforms import Bijection, Guidance

__all__ = ["GraphWorkspace"]

_ONE_CAPTURE = threading.Lock()  # PyTorch allows one at a time in a process
_APART = ("pos_embed", "class_embed")  # the one is kept in float32, of the other only the rows asked for


class GraphWorkspace:
    """Memory and graph of one call, for blocks of one shape: cache, activations, weights of the block at hand.

    Args:
        weights: of a net, for its shapes.
        B: rows of z solved together. Guidance runs 2B rows: conditional, then unguided.
        guided: whether it does.
        dtype: storage type of weights and cache: float32, bfloat16 or float16.
        window: W, tokens a pass.
        capture: False runs the kernels one by one, as on the CPU.
        batch: rows of the call, of which B at a time are solved; B by default. The tiles are those of `batch` rows.
        device: by default that of the block; "meta" to count bytes.
        passes: for `evaluate`, and not for `run`. It has a place more than the net has tokens: the kernels compute
            nothing for the last place, whose parameters condition no token, but a pass gives those of every token.
    """

    apart = False  # whether a token that is not finite touches none of its row before it

    def __init__(
        self,
        weights: Weights,
        B: int,
        guided: bool,
        dtype: torch.dtype,
        window: int = 1,
        capture: bool = True,
        batch: int | None = None,
        device: torch.device | str | None = None,
        passes: bool = False,
    ) -> None:
        from tarflow_fast.kernels.triton import tuning_step  # imports triton

        device, batch = torch.device(device or weights.pos_embed.device), batch or B
        self.key = self.describe(weights, batch, guided, dtype)
        (T, C), D, L = weights.pos_embed.shape, weights.token_size, len(weights.layers)
        T, E = T + passes, weights.head_size
        self.B, self.T, self.guided, self.dtype = B, T, guided, dtype
        R, H = B * (1 + guided), C // E
        self.tuned_rows = batch * (1 + guided)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            # Zeros: a masked lane may read what no kernel wrote yet, and must not find NaN there.
            return torch.zeros(shape, dtype=dtype, device=device)

        self.x, self.z = empty(B, T, D), empty(B, T, D)
        self.cache = empty(L, 2, R, H, T, E, dtype=dtype)
        self.starts, self.order = empty(2, R, dtype=torch.int32), empty(T, dtype=torch.int32)
        self.guidance, self.scale, self.classes = empty(2, T), empty(R), empty(R, C)
        self.sums = empty(tuning_step.tail_tiles(C, D, dtype), B, T)
        self.pos_embed = empty(T, C)
        # Matrices in the storage type; vectors, which cost nothing, in float32.
        self.weights = {
            name: empty(*p.shape, dtype=dtype if p.ndim == 2 else torch.float32)
            for name, p in weights.named().items()
            if name not in _APART
        }
        self.eps = [layer.eps for layer in weights.layers]
        self.capture = capture and device.type == "cuda" and not passes
        self.graph: torch.cuda.CUDAGraph | None = None
        self.passes = passes
        self._make_activations(min(window, max(T - 1, 1)))

    def _make_activations(self, W: int) -> None:
        """What a pass over W tokens a row writes: activations, and the scratch of its kernels."""
        from tarflow_fast.kernels.triton import tuning_step

        (_, _, R, H, T, E), dtype, device = self.cache.shape, self.dtype, self.cache.device
        M, C, hidden = R * W, H * E, self.weights["attn_blocks.0.mlp.main.0.weight"].size(0)
        self.W, self.h = W, torch.zeros(M, C, device=device)
        self.queries, self.heads, self.hidden = (
            torch.zeros(M, size, dtype=dtype, device=device) for size in (C, C, hidden)
        )
        kinds = {"fp32": torch.float32, "int32": torch.int32, "storage": dtype}
        outputs = self.weights["proj_out.weight"].size(0) if self.passes else 0
        self.scratch = {
            name: torch.zeros(size, dtype=kinds[kind], device=device)
            for name, (size, kind) in tuning_step.scratch(
                R=R,
                W=W,
                C=C,
                hidden=hidden,
                H=H,
                T=T,
                E=E,
                dtype=dtype,
                tuned_rows=self.tuned_rows,
                outputs=outputs,
                apart=self.apart,
            ).items()
        }

    @staticmethod
    def describe(weights: Weights, B: int, guided: bool, dtype: torch.dtype) -> tuple:
        """What two calls must have in common to share a workspace."""
        shapes = tuple((name, tuple(p.shape)) for name, p in weights.named().items() if name != "class_embed")
        eps = tuple(layer.eps for layer in weights.layers)
        return B, guided, dtype, weights.pos_embed.device, weights.head_size, shapes, eps

    @property
    def nbytes(self) -> int:
        """Device memory of the workspace."""
        return sum(t.nbytes for t in self._tensors())

    def _tensors(self) -> list[Tensor]:
        own = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return own + list(self.scratch.values()) + list(self.weights.values())

    def release(self) -> None:
        """Give the memory back, whoever holds the workspace; it then fits no call."""
        dtype = self.dtype
        vars(self).clear()
        self.key, self.dtype = None, dtype

    def load(self, bijection: Bijection, weights: Weights, z: Tensor, y: Tensor | None, guidance: Guidance) -> None:
        """Everything that the steps of one block need."""
        self.load_weights(weights)
        self.load_rows(bijection, z, y, guidance)

    @torch.no_grad()
    def load_weights(self, weights: Weights) -> None:
        """Copies on the device, without a synchronisation; layers may share weights."""
        named = weights.named()
        for name, buffer in self.weights.items():
            buffer.copy_(named[name])
        self.pos_embed[: len(weights.pos_embed)] = weights.pos_embed

    @torch.no_grad()
    def load_rows(self, bijection: Bijection, z: Tensor, y: Tensor | None, guidance: Guidance) -> None:
        """Everything but the weights: z (B, T, D), y (B,) or None."""
        self.x.copy_(z)
        self.z.copy_(z)
        self.starts.zero_()
        self.sums.zero_()
        self.load_call(bijection, y, guidance)

    @torch.no_grad()
    def load_call(self, bijection: Bijection, y: Tensor | None, guidance: Guidance) -> None:
        """The order of the tokens, the classes of the rows y (B,) or None, and the guidance."""
        net, order = bijection.net, bijection.order.index(self.order.device, torch.int32)
        self.order[: len(order)] = order
        classes = guidance.batch_classes(net.class_embedding(y), net.class_embedding(None), self.B)
        if classes is not None:
            self.classes.copy_(classes.flatten(0, -2).expand_as(self.classes))
        # The kernels exponentiate to the base 2.
        self.scale.fill_(math.log2(math.e) * self.key[4] ** -0.5)
        self.guidance.zero_()
        if self.guided:
            self.scale[self.B :] /= guidance.attn_temp
            for number, name in enumerate("ab"):
                if name in guidance.what:
                    self.guidance[number].fill_(guidance.weight)
            if guidance.annealed:
                self.guidance *= torch.arange(1, self.T + 1, device=self.guidance.device) / max(self.T - 1, 1)

    def step(self) -> None:
        """Launch one pass: the kernels of a step in order, on the current stream."""
        self.net()
        self.tail()

    def tail(self, **buffers: Tensor) -> None:
        """The kernel from h to the tokens; to those `buffers` of `affine_inverse` where they are given."""
        from tarflow_fast.kernels.triton.affine_inverse import affine_inverse

        affine_inverse(
            h=self.h, weight=self.weights["proj_out.weight"], bias=self.weights["proj_out.bias"], z=self.z, x=self.x,
            sums=self.sums, starts=self.starts, order=self.order, guidance=self.guidance, W=self.W, guided=self.guided,
            **buffers,
        )  # fmt: skip

    def net(self) -> None:
        """The kernels of a step from the tokens in x, at starts[1], to h: all but its tail."""
        from tarflow_fast.kernels.triton.cached_attention import cached_attention
        from tarflow_fast.kernels.triton.step_embed import embed
        from tarflow_fast.kernels.triton.step_linear import Append, Norm, linear

        w, W, h, scratch, rows = self.weights, self.W, self.h, self.scratch, self.tuned_rows
        tuned = rows * W
        embed(
            x=self.x, weight=w["proj_in.weight"], bias=w["proj_in.bias"], pos_embed=self.pos_embed,
            classes=self.classes, h=h, starts=self.starts, order=self.order, W=W, tuned_queries=tuned,
        )  # fmt: skip
        for number, (eps1, eps2) in enumerate(self.eps):
            layer, cache = f"attn_blocks.{number}.", self.cache[number]

            def pair(name: str, layer: str = layer) -> tuple[Tensor, Tensor]:
                return w[f"{layer}{name}.weight"], w[f"{layer}{name}.bias"]

            norm1, norm2 = Norm(*pair("attention.norm"), eps1), Norm(*pair("mlp.norm"), eps2)
            common = {"scratch": scratch, "tuned_queries": tuned}
            append = Append(cache, self.starts, W)
            linear(h, *pair("attention.qkv"), out=self.queries, epilogue="append", norm=norm1, append=append, **common)
            cached_attention(
                self.queries, cache, scale=self.scale, starts=self.starts, out=self.heads, scratch=scratch, W=W,
                tuned_rows=rows, apart=self.apart,
            )  # fmt: skip
            linear(self.heads, *pair("attention.proj"), out=h, epilogue="residual", **common)
            linear(h, *pair("mlp.main.0"), out=self.hidden, epilogue="gelu", norm=norm2, **common)
            linear(self.hidden, *pair("mlp.main.2"), out=h, epilogue="residual", **common)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, position: int) -> Tensor:
        """The net on tokens (B, W, D) of net order, from `position` on; their keys and values go to the cache.

        Weights and call must be loaded. Returns (R, W, P D) float32, under guidance the B conditional rows first.
        """
        from tarflow_fast.kernels.triton.step_linear import linear

        W, (weight, bias) = tokens.size(1), (self.weights[f"proj_out.{name}"] for name in ("weight", "bias"))
        if W != self.W:
            self._make_activations(W)
        self.x.index_copy_(1, self.order[position : position + W].long(), tokens.float())
        self.starts[1].fill_(position)
        self.net()
        out, tuned = self.h.new_zeros(len(self.h), len(weight)), self.tuned_rows * W
        linear(
            self.h.to(self.dtype), weight, bias, out=out, scratch=self.scratch, epilogue="residual", tuned_queries=tuned
        )
        return out.view(-1, W, len(weight))

    def prepare(self) -> None:
        """Capture the step, once. A capture that fails costs speed, not the answer: the kernels then run one by one, as
        they do inside a capture of the caller's."""
        if not self.capture or self.graph is not None:
            return
        if self.x.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        with _ONE_CAPTURE:
            self._capture()

    def _capture(self) -> None:
        self.step()  # compiles and loads the kernels, which a capture must not
        try:
            # A stream of the workspace's GPU: the one PyTorch keeps for captures is of the GPU that came first.
            with on(self.x.device):
                graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.x.device)
                # The outer context puts the current stream back even where a capture that failed does not.
                with (
                    torch.cuda.stream(stream),
                    torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
                ):
                    self.step()
        except RuntimeError as error:
            self.capture = False
            warnings.warn(f"tarflow_fast runs its GPU inverse without a CUDA graph: {error}", RuntimeWarning)
        else:
            self.graph = graph

    def run(self, on_token: Callable[[], None] | None = None) -> None:
        """All tokens of the block that was loaded."""
        again = self.graph.replay if self.graph is not None else self.step
        for first in range(0, self.T - 1, self.W):
            tokens = min(self.W, self.T - 1 - first)
            for _ in range(tokens):
                again()
            if self.W > 1:
                self.starts[1].fill_(first + self.W)
            if on_token is not None:
                for _ in range(tokens):
                    on_token()
