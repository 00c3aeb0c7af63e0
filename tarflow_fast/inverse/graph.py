"""The inverse of a flow block on the GPU: one sampling step of fused Triton kernels, captured once as a CUDA graph and
replayed for every token of every block.

Everything a step reads that changes lies in device memory: the weights of the block at hand (copied into the workspace,
in the storage type, which takes as long as one step), the position, the order of the tokens, the table of guidance
weights and the temperatures. So one graph serves all, and the host never waits for the device inside a block.

    embed, L x (LN+qkv+append, attention, proj+residual, LN+fc1+GELU, fc2+residual), proj_out+guidance+affine

The residual stream, x, softmax, exp and log_det are float32; weights, cache and the operands of products have the
storage type. With a window W > 1 a pass computes W tokens at once; W passes solve them exactly, since token k of a
window is final after k passes.

A row's bits depend neither on the other rows nor on its slot. They do depend on how many rows the call has, which
chooses the tiles (kernels/triton/tuning_step.py says where). A batch larger than memory is solved in parts, with the
tiles of the whole and so with its bits.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tarflow_fast.inverse.eligibility import inspect
from tarflow_fast.inverse.guidance import Guidance
from tarflow_fast.inverse.memory import available_memory, most_rows

if TYPE_CHECKING:
    from tarflow_fast.block import MetaBlock

__all__ = ["GraphWorkspace", "invert_graph", "prepare_graph", "rows_together", "storage_dtype", "why_not_graph"]

_UNCHECKED = 1 << 26  # bytes below this are taken without a look at the device's memory
_ONE_CAPTURE = threading.Lock()  # PyTorch allows one at a time in a process
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
    from tarflow_fast.ops.registry import triton_missing, triton_refuses  # that package imports this module

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
        B: rows of z solved together. Guidance runs 2B rows: conditional, then unguided.
        guided: whether it does.
        dtype: storage type of weights and cache: float32, bfloat16 or float16.
        window: W, tokens a pass.
        capture: False runs the kernels one by one, as on the CPU.
        batch: rows of the call, of which B at a time are solved; B by default. The tiles are those of `batch` rows.
        device: by default that of the block; "meta" to count bytes.
    """

    def __init__(
        self,
        block: MetaBlock,
        B: int,
        guided: bool,
        dtype: torch.dtype,
        window: int = 1,
        capture: bool = True,
        batch: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        from tarflow_fast.kernels.triton import tuning_step

        device, batch = torch.device(device or block.pos_embed.device), batch or B
        self.key = self.describe(block, batch, guided, dtype)
        (T, C), D, L = block.pos_embed.shape, block.proj_in.in_features, len(block.attn_blocks)
        E, hidden = block.attn_blocks[0].attention.head_size, block.attn_blocks[0].mlp.main[0].out_features
        self.B, self.T, self.W, self.guided, self.dtype = B, T, min(window, max(T - 1, 1)), guided, dtype
        R, M, H = B * (1 + guided), B * (1 + guided) * self.W, C // E
        self.tuned_rows = batch * (1 + guided)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            # Zeros: a masked lane may read what no kernel wrote yet, and must not find NaN there.
            return torch.zeros(shape, dtype=dtype, device=device)

        self.x, self.z = empty(B, T, D), empty(B, T, D)
        self.h, self.queries, self.heads = empty(M, C), empty(M, C, dtype=dtype), empty(M, C, dtype=dtype)
        self.hidden = empty(M, hidden, dtype=dtype)
        self.cache = empty(L, 2, R, H, T, E, dtype=dtype)
        self.starts, self.order = empty(2, R, dtype=torch.int32), empty(T, dtype=torch.int32)
        self.guidance, self.scale, self.classes = empty(2, T), empty(R), empty(R, C)
        self.sums = empty(tuning_step.tail_tiles(C, D, dtype), B, T)
        kinds = {"fp32": torch.float32, "int32": torch.int32, "storage": dtype}
        self.scratch = {
            name: empty(size, dtype=kinds[kind])
            for name, (size, kind) in tuning_step.scratch(
                R=R, W=self.W, C=C, hidden=hidden, H=H, T=T, E=E, dtype=dtype, tuned_rows=self.tuned_rows
            ).items()
        }
        self.pos_embed = empty(T, C)
        # Matrices in the storage type; vectors, which cost nothing, in float32.
        self.weights = {
            name: empty(*p.shape, dtype=dtype if p.ndim == 2 else torch.float32)
            for name, p in block.named_parameters(remove_duplicate=False)
            if name not in ("pos_embed", "class_embed")
        }
        self.eps = [(layer.attention.norm.eps, layer.mlp.norm.eps) for layer in block.attn_blocks]
        self.capture = capture and device.type == "cuda"
        self.graph: torch.cuda.CUDAGraph | None = None

    @staticmethod
    def describe(block: MetaBlock, B: int, guided: bool, dtype: torch.dtype) -> tuple:
        """What two calls must have in common to share a workspace."""
        named = block.named_parameters(remove_duplicate=False)
        shapes = tuple((name, tuple(p.shape)) for name, p in named if name != "class_embed")
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

    def release(self) -> None:
        """Give the memory back, whoever holds the workspace; it then fits no call."""
        dtype = self.dtype
        vars(self).clear()
        self.key, self.dtype = None, dtype

    def load(self, block: MetaBlock, z: Tensor, y: Tensor | None, guidance: Guidance) -> None:
        """Everything the steps of one block need; copies on the device, no synchronisation."""
        self.load_weights(block)
        self.load_rows(block, z, y, guidance)

    @torch.no_grad()
    def load_weights(self, block: MetaBlock) -> None:
        parameters = dict(block.named_parameters(remove_duplicate=False))  # layers may share weights
        for name, buffer in self.weights.items():
            buffer.copy_(parameters[name])
        self.pos_embed.copy_(block.pos_embed)

    @torch.no_grad()
    def load_rows(self, block: MetaBlock, z: Tensor, y: Tensor | None, guidance: Guidance) -> None:
        """z (B, T, D), y (B,) or None."""
        self.x.copy_(z)
        self.z.copy_(z)
        self.starts.zero_()
        self.sums.zero_()
        order = torch.arange(self.T, device=self.order.device)
        self.order.copy_(order.flip(0) if block.flip else order)
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
                tuned_rows=rows,
            )  # fmt: skip
            linear(self.heads, *pair("attention.proj"), out=h, epilogue="residual", **common)
            linear(h, *pair("mlp.main.0"), out=self.hidden, epilogue="gelu", norm=norm2, **common)
            linear(self.hidden, *pair("mlp.main.2"), out=h, epilogue="residual", **common)
        affine_inverse(
            h=h, weight=w["proj_out.weight"], bias=w["proj_out.bias"], z=self.z, x=self.x, sums=self.sums,
            starts=self.starts, order=self.order, guidance=self.guidance, W=W, guided=self.guided,
        )  # fmt: skip

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
        from tarflow_fast.kernels.triton.device import on

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


def rows_together(
    block: MetaBlock, B: int, guided: bool, dtype: torch.dtype, memory_limit: int | None = None
) -> tuple[int, int]:
    """How many rows of a batch of B fit `memory_limit` bytes together, and the bytes their workspace takes.

    None: most of what the device has left. Parts are of one size, so that one graph serves them all.

    Raises:
        MemoryError: one row alone is over the limit; the bytes are named.
    """

    def describe(rows: int) -> GraphWorkspace:
        return GraphWorkspace(block, rows, guided, dtype, batch=B, device="meta")

    whole = describe(B).nbytes
    limit = device_memory_left(block.pos_embed.device) if memory_limit is None and whole > _UNCHECKED else memory_limit
    if limit is None or whole <= limit:
        return B, whole
    one = describe(1)
    if one.nbytes > limit:
        weights = sum(tensor.nbytes for tensor in one.weights.values())
        raise MemoryError(
            f"block_inverse: one row needs {one.nbytes:,} bytes (weights {weights:,}, workspace "
            f"{one.nbytes - weights:,}), over the limit of {limit:,}"
        )
    fits = most_rows(B, lambda rows: describe(rows).nbytes <= limit)
    rows = -(-B // -(-B // fits))  # as many parts as that takes, of one size
    return rows, describe(rows).nbytes


def device_memory_left(device: torch.device) -> int | None:
    """Nine tenths of what the GPU has free and what PyTorch holds of it unused; of the host's memory on the CPU."""
    if device.type != "cuda":
        return available_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + unused) * 9 // 10


def prepare_graph(
    block: MetaBlock,
    z: Tensor,
    guidance: Guidance,
    workspace: GraphWorkspace | None = None,
    precision: str | None = None,
    memory_limit: int | None = None,
) -> GraphWorkspace:
    """A workspace for this call: the one given if it fits, else a new one, its kernels compiled and its graph captured.

    One given that does not fit is released, since both may not fit the device.

    Raises:
        MemoryError: one row alone needs more than `memory_limit` (`rows_together`).
        Whatever Triton's compiler, the driver or the allocator raise.
    """
    B, dtype = z.size(0), storage_dtype(z, precision)
    key = GraphWorkspace.describe(block, B, guidance.active, dtype)
    if workspace is None or workspace.key != key:
        if workspace is not None:
            workspace.release()
        group = rows_together(block, B, guidance.active, dtype, memory_limit)[0] if B > 0 else 0
        workspace = GraphWorkspace(block, group, guidance.active, dtype, batch=B)
        if B > 0:
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
    log_det = torch.zeros(B, dtype=torch.float32, device=z.device)
    if B == 0 or T == 1:  # nothing to solve
        return z.clone(), log_det
    if workspace is None:
        workspace = prepare_graph(block, z, guidance)
    elif workspace.key != GraphWorkspace.describe(block, B, guidance.active, workspace.dtype):
        raise ValueError("invert_graph: workspace must be one of this block's shapes, batch and device")
    x, parts = torch.empty(z.shape, dtype=z.dtype, device=z.device), -(-B // workspace.B)
    tick = None if on_token is None else _every(parts, on_token)
    with torch.autocast(z.device.type, enabled=False):
        workspace.load_weights(block)
        for part in range(parts):
            # The last part reaches back, so that it has as many rows; those solved twice get the same bits twice.
            begin = min(part * workspace.B, B - workspace.B)
            rows = slice(begin, begin + workspace.B)
            workspace.load_rows(block, z[rows], None if y is None else y[rows], guidance)
            workspace.run(tick)
            x[rows] = workspace.x
            # float64: a sum of T D terms whose parts are float32
            log_det[rows] = workspace.sums.sum(dim=(0, 2), dtype=torch.float64).float()
    return x, log_det


def _every(count: int, call: Callable[[], None]) -> Callable[[], None]:
    """A function that passes on one call in `count`: tokens of all parts -> tokens of the batch."""
    seen = 0

    def tick() -> None:
        nonlocal seen
        seen += 1
        if seen % count == 0:
            call()

    return tick
