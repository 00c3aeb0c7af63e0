"""The inverse of a flow block on the GPU: one sampling step of fused Triton kernels, captured once as a CUDA graph and
replayed for every token of every block.

Everything a step reads that changes lies in device memory: the weights of the block at hand (copied into the workspace,
in the storage type, which takes as long as one step), the position, the flip, the table of guidance weights and the
temperatures. So one graph serves all, and the host never waits for the device inside a block.

    embed, L x (LN+qkv+append, attention, proj+residual, LN+fc1+GELU, fc2+residual), proj_out+guidance+affine

The residual stream, x, softmax, exp and log_det are float32; weights, cache and the operands of products have the
storage type. With a window W > 1 a pass computes W tokens at once; W passes solve them exactly, since token k of a
window is final after k passes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tarflow_fast.inverse.eligibility import inspect
from tarflow_fast.inverse.guidance import Guidance
from tarflow_fast.ops.registry import triton_missing, triton_refuses

if TYPE_CHECKING:
    from tarflow_fast.block import MetaBlock

__all__ = ["GraphWorkspace", "invert_graph", "prepare_graph", "storage_dtype", "why_not_graph"]

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (16, 32, 64, 128)


def storage_dtype(z: Tensor, precision: str | None = None) -> torch.dtype:
    """Of weights and cache: what was asked for, or autocast's where it is on, as `F.linear` would choose, or z's."""
    if precision is not None:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if torch.is_autocast_enabled(z.device.type):
        return torch.get_autocast_dtype(z.device.type)
    return z.dtype


def why_not_graph(block: MetaBlock, z: Tensor, precision: str | None = None) -> str:
    """Why this path cannot invert `block` at z; "" when it can."""
    if precision not in (None, "fp32", "bf16"):
        return f"it has no precision {precision!r}"
    dtype = storage_dtype(z, precision)
    if dtype not in STORAGE or z.dtype not in STORAGE:
        return f"it computes in float32, bfloat16 or float16, got {str(z.dtype).removeprefix('torch.')}"
    found = triton_refuses(z.device, dtype) or triton_missing() or inspect(block, z.device.type)
    if isinstance(found, str):
        return found
    for index, tensor in enumerate(found.tensors):
        if tensor is None:
            return f"there is no {found.name(index)}"
    if found.head_size not in HEAD_SIZES or found.hidden % 16:
        return f"head size {found.head_size} is not 16, 32, 64 or 128, or the MLP no multiple of 16"
    return ""


class GraphWorkspace:
    """Memory and graph of one call, for blocks of one shape: cache, activations, weights of the block at hand.

    Args:
        block: gives the shapes.
        B: rows of z. Guidance runs 2B rows: conditional, then unguided.
        guided: whether it does.
        dtype: storage type of weights and cache: float32, bfloat16 or float16.
        window: W, tokens a pass.
        capture: False runs the kernels one by one, as on the CPU.
    """

    def __init__(
        self, block: MetaBlock, B: int, guided: bool, dtype: torch.dtype, window: int = 1, capture: bool = True
    ) -> None:
        from tarflow_fast.kernels.triton import tuning_step

        device = block.pos_embed.device
        self.key = self.describe(block, B, guided, dtype)
        (T, C), D, L = block.pos_embed.shape, block.proj_in.in_features, len(block.attn_blocks)
        E, hidden = block.attn_blocks[0].attention.head_size, block.attn_blocks[0].mlp.main[0].out_features
        self.B, self.T, self.W, self.guided, self.dtype = B, T, min(window, max(T - 1, 1)), guided, dtype
        R, M, H = B * (1 + guided), B * (1 + guided) * self.W, C // E

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            # Zeros: a masked lane may read what no kernel wrote yet, and must not find NaN there.
            return torch.zeros(shape, dtype=dtype, device=device)

        self.x, self.z = empty(B, T, D), empty(B, T, D)
        self.h, self.queries, self.heads = empty(M, C), empty(M, C, dtype=dtype), empty(M, C, dtype=dtype)
        self.hidden = empty(M, hidden, dtype=dtype)
        self.cache = empty(L, 2, R, H, T, E, dtype=dtype)
        self.starts, self.flip = empty(2, R, dtype=torch.int32), empty(1, dtype=torch.int32)
        self.guidance, self.scale, self.classes = empty(2, T), empty(R), empty(R, C)
        self.sums = empty(tuning_step.tail_tiles(C, D, dtype), B, T)
        kinds = {"fp32": torch.float32, "int32": torch.int32, "storage": dtype}
        self.scratch = {
            name: empty(size, dtype=kinds[kind])
            for name, (size, kind) in tuning_step.scratch(R, self.W, C, hidden, H, T, E, dtype).items()
        }
        self.pos_embed = empty(T, C)
        # Matrices in the storage type; vectors, which cost nothing, in float32.
        self.weights = {
            name: torch.zeros_like(p, dtype=dtype if p.ndim == 2 else torch.float32, requires_grad=False)
            for name, p in block.named_parameters()
            if name not in ("pos_embed", "class_embed")
        }
        self.eps = [(layer.attention.norm.eps, layer.mlp.norm.eps) for layer in block.attn_blocks]
        self.capture = capture and device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None

    @staticmethod
    def describe(block: MetaBlock, B: int, guided: bool, dtype: torch.dtype) -> tuple:
        """What two calls must have in common to share a workspace."""
        shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters() if name != "class_embed")
        eps = tuple((layer.attention.norm.eps, layer.mlp.norm.eps) for layer in block.attn_blocks)
        device = block.pos_embed.device
        return B, guided, dtype, device, block.attn_blocks[0].attention.head_size, shapes, eps

    @property
    def nbytes(self) -> int:
        """Device memory of the workspace."""
        return sum(t.nbytes for t in self._tensors())

    def _tensors(self) -> list[Tensor]:
        own = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return own + list(self.scratch.values()) + list(self.weights.values())

    def load(self, block: MetaBlock, z: Tensor, y: Tensor | None, guidance: Guidance) -> None:
        """Everything the steps of one block need; copies on the device, no synchronisation."""
        parameters = dict(block.named_parameters())
        for name, buffer in self.weights.items():
            buffer.copy_(parameters[name])
        self.pos_embed.copy_(block.pos_embed)
        self.x.copy_(z)
        self.z.copy_(z)
        self.starts.zero_()
        self.sums.zero_()
        self.flip.fill_(int(block.flip))
        classes = guidance.batch_classes(block.class_embedding(y), block.class_embedding(None), self.B)
        if classes is not None:
            self.classes.copy_(classes.flatten(0, -2).expand_as(self.classes))
        # The kernels exponentiate to the base 2.
        self.scale.fill_(math.log2(math.e) * block.attn_blocks[0].attention.head_size ** -0.5)
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
        from tarflow_fast.kernels.triton.affine_inverse import affine_inverse
        from tarflow_fast.kernels.triton.cached_attention import cached_attention
        from tarflow_fast.kernels.triton.step_embed import embed
        from tarflow_fast.kernels.triton.step_linear import linear

        w, W, h, scratch = self.weights, self.W, self.h, self.scratch
        embed(
            self.x, w["proj_in.weight"], w["proj_in.bias"], self.pos_embed, self.classes, h, self.starts, self.flip, W
        )
        for number, (eps1, eps2) in enumerate(self.eps):
            layer, cache = f"attn_blocks.{number}.", self.cache[number]

            def pair(name: str, layer: str = layer) -> tuple[Tensor, Tensor]:
                return w[f"{layer}{name}.weight"], w[f"{layer}{name}.bias"]

            norm1, norm2 = (*pair("attention.norm"), eps1), (*pair("mlp.norm"), eps2)
            linear(h, *pair("attention.qkv"), self.queries, scratch, "append", norm1, (cache, self.starts, W))
            cached_attention(self.queries, cache, self.scale, self.starts, self.heads, scratch, W)
            linear(self.heads, *pair("attention.proj"), h, scratch, "residual")
            linear(h, *pair("mlp.main.0"), self.hidden, scratch, "gelu", norm2)
            linear(self.hidden, *pair("mlp.main.2"), h, scratch, "residual")
        affine_inverse(
            h, w["proj_out.weight"], w["proj_out.bias"], self.z, self.x, self.sums, self.starts, self.flip,
            self.guidance, W, self.guided,
        )  # fmt: skip

    def prepare(self) -> None:
        """Capture the step, once. A capture that fails costs speed, not the answer: the kernels then run one by one."""
        if not self.capture or self.graph is not None:
            return
        self.step()  # compiles and loads the kernels, which a capture must not
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
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


def prepare_graph(
    block: MetaBlock,
    z: Tensor,
    guidance: Guidance,
    workspace: GraphWorkspace | None = None,
    precision: str | None = None,
) -> GraphWorkspace:
    """A workspace for this call: the one given if it fits, else a new one, its kernels compiled and its graph captured.

    Raises whatever Triton's compiler, the driver or the allocator raise.
    """
    dtype = storage_dtype(z, precision)
    key = GraphWorkspace.describe(block, z.size(0), guidance.active, dtype)
    if workspace is None or workspace.key != key:
        workspace = GraphWorkspace(block, z.size(0), guidance.active, dtype)
        if z.size(0) > 0:
            with torch.autocast(z.device.type, enabled=False), torch.no_grad():
                workspace.prepare()
    return workspace


@torch.no_grad()
def invert_graph(
    block: MetaBlock,
    z: Tensor,
    y: Tensor | None,
    guidance: Guidance,
    workspace: GraphWorkspace | None = None,
    on_token: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """z (B, T, D) -> x (B, T, D) in z's dtype, and the inverse's log_det (B,), the sum of a, float32.

    The contract of `invert_sequential`, on tensors `why_not_graph` has no objection to. A workspace given must be of
    the block's shape (`GraphWorkspace.describe`). On a GPU the result is enqueued, not waited for.

    Raises:
        ValueError: the workspace belongs to another shape, batch or device.
    """
    B, T, _ = z.shape
    if B == 0 or T == 1:  # nothing to solve
        return z.clone(), torch.zeros(B, dtype=torch.float32, device=z.device)
    if workspace is None:
        workspace = prepare_graph(block, z, guidance)
    elif workspace.key != GraphWorkspace.describe(block, B, guidance.active, workspace.dtype):
        raise ValueError("invert_graph: workspace must be one of this block's shapes, batch and device")
    with torch.autocast(z.device.type, enabled=False):
        workspace.load(block, z, y, guidance)
        workspace.run(on_token)
    # float64: a sum of T D terms whose parts are float32
    return workspace.x.to(z.dtype, copy=True), workspace.sums.sum(dim=(0, 2), dtype=torch.float64).float()
