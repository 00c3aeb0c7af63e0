"""The engine of GPUs: a block is inverted by fused Triton kernels under one CUDA graph (engines/triton_graph.py).

`solve` replays the graph. `steps` gives the loop by windows (engines/triton_windows.py). `run` launches the kernels one
by one, on tokens that its caller gives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tarflow_fast.engines.call import Call
from tarflow_fast.engines.memory import available_memory, rows_within
from tarflow_fast.engines.triton_graph import GraphWorkspace
from tarflow_fast.engines.triton_windows import TritonSteps, WindowWorkspace
from tarflow_fast.engines.weights import Weights, inspect
from tarflow_fast.ops.registry import triton_missing, triton_refuses
from tarflow_fast.transforms import Bijection, Guidance

__all__ = ["TritonEngine", "TritonPasses", "invert_graph", "prepare_graph", "rows_together"]

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (16, 32, 64, 128)


def storage_dtype(z: Tensor, precision: str | None = None) -> torch.dtype:
    """Of weights and cache: what was asked for, or autocast's where it is on, as `F.linear` would choose, or z's."""
    if precision is not None:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if torch.is_autocast_enabled(z.device.type):
        return torch.get_autocast_dtype(z.device.type)
    return z.dtype


class TritonPasses:
    """The kernels on one block and one batch, prepared: compiled, and their graph captured.

    workspace: of the sequential solver or, where that was asked for, of the one by windows.
    """

    def __init__(
        self,
        workspace: GraphWorkspace,
        bijection: Bijection,
        y: Tensor | None,
        guidance: Guidance,
        weights: Weights,
    ) -> None:
        self.workspace, self.bijection, self.y, self.guidance, self.weights = workspace, bijection, y, guidance, weights
        self._batch, self._dtype = workspace.key[0], workspace.dtype
        self._space: GraphWorkspace | None = None
        self._loaded = False  # whether the workspace of windows has this block's weights

    def rows_for(self, B: int, window: int) -> int:
        """How many rows of a batch of B are solved together by windows."""
        return self.workspace.B

    def steps(self, rows: slice, B: int, window: int) -> TritonSteps:
        """Passes by windows of these B rows of the batch."""
        space = self.workspace if isinstance(self.workspace, WindowWorkspace) else None
        if space is None and self.bijection.net.num_tokens > 1:
            raise RuntimeError("steps: these passes were not opened for the solver by windows")
        if space is not None and not self._loaded:
            space.load_weights(self.weights)
            self._loaded = True
        return TritonSteps(space, self.bijection, None if self.y is None else self.y[rows], self.guidance)

    def solve(self, z: Tensor, on_token: Callable[[], None] | None = None) -> tuple[Tensor, Tensor]:
        return invert_graph(self.bijection, z, self.y, self.guidance, self.workspace, on_token, self.weights)

    @torch.no_grad()
    def run(self, tokens: Tensor, position: int) -> Tensor:
        """The net on W tokens a row, which follow those it saw before, by the kernels of a sampling step.

        The cache must hold the tokens before `position`, and a later pass may overwrite these. Cache and weights lie in
        a workspace of their own, made at the first pass. It holds all B rows at once, whatever the memory limit of
        `solve` is, because a later pass may continue any of them. As in PyTorch, a token that is not finite spoils its
        whole row of a pass, since the weight of a later token, 0, is multiplied with its values.

        tokens: (B, W, D) of net order.  position: of the first of them.  Returns (B, W, P D), guided, float32.

        Raises:
            ValueError: tokens of another shape, or past the end of the sequence.
        """
        net, transform, _ = self.bijection
        B, T, D = self._batch, net.num_tokens, net.token_size
        W = tokens.size(1) if tokens.ndim == 3 else 0
        if tokens.shape != (B, W, D):
            raise ValueError(f"run: tokens must have shape ({B}, W, {D}), got {tuple(tokens.shape)}")
        if not 0 <= position <= T - W:
            raise ValueError(f"run: position must be from 0 to {T - W} for {W} of {T} tokens, got {position}")
        if tokens.numel() == 0:
            return tokens.new_empty(B, W, len(transform.parts) * D, dtype=torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            if self._space is None:
                space = GraphWorkspace(self.weights, B, self.guidance.active, self._dtype, window=W, passes=True)
                space.load_weights(self.weights)
                space.load_call(self.bijection, self.y, self.guidance)
                self._space = space
            return self.guidance.combine(self._space.evaluate(tokens, position), transform.parts, position, T)


class _State:
    """The workspace of a call, kept from block to block and from part to part of a sample."""

    workspace: GraphWorkspace | None = None

    def close(self) -> None:
        self.workspace = None


class TritonEngine:
    """The entry of the Triton kernels in the table."""

    name = "triton"

    def missing(self) -> str:
        return triton_missing()

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str:
        return triton_refuses(device, dtype)

    def why_not(self, bijection: Bijection, weights: Weights, z: Tensor, call: Call) -> str:
        if bijection.transform.name not in ("affine", "shift"):
            return f"it has no kernel for the transform {bijection.transform.name!r}"
        if call.precision not in (None, "fp32", "bf16"):
            return f"it has no precision {call.precision!r}"
        dtype = storage_dtype(z, call.precision)
        if dtype not in STORAGE or z.dtype not in STORAGE:
            return f"it computes in float32, bfloat16 or float16, got {str(z.dtype).removeprefix('torch.')}"
        if reason := triton_refuses(z.device, dtype):
            return reason
        for name, tensor in zip(weights.names, weights.tensors, strict=True):
            if tensor is None and name != "class_embed":
                return f"there is no {name}"
        if weights.head_size not in HEAD_SIZES or weights.hidden % 16:
            return f"head size {weights.head_size} is not 16, 32, 64 or 128, or the MLP no multiple of 16"
        return ""

    def open(
        self, bijection: Bijection, z: Tensor, y: Tensor | None, guidance: Guidance, call: Call, weights: Weights
    ) -> TritonPasses:
        state = call.state(self.name, _State)
        solving, windows = call.solving, None
        if solving is not None and solving.solver == "windows" and z.numel() and z.size(1) > 1:
            windows = min(solving.way.window, z.size(1) - 1), solving.tolerance
        state.workspace = prepare_graph(
            weights, z, guidance, state.workspace, call.precision, call.memory_limit, windows
        )
        return TritonPasses(state.workspace, bijection, y, guidance, weights)


def rows_together(
    weights: Weights,
    B: int,
    guided: bool,
    dtype: torch.dtype,
    memory_limit: int | None = None,
    windows: tuple[int, float] | None = None,
) -> tuple[int, int]:
    """How many rows of a batch of B fit `memory_limit` bytes together, and the bytes their workspace takes.

    None: most of what the device has left. Parts are of one size, so that one graph serves them all. windows: as in
    `prepare_graph`.

    Raises:
        MemoryError: one row alone is over the limit; the bytes are named.
    """
    make = _workspaces(windows)

    def bytes_of(rows: int) -> int:
        return make(weights, rows, guided, dtype, batch=B, device="meta").nbytes

    def parts() -> str:
        one = make(weights, 1, guided, dtype, batch=B, device="meta")
        of_weights = sum(tensor.nbytes for tensor in one.weights.values())
        return f"weights {of_weights:,}, workspace {one.nbytes - of_weights:,}"

    device = weights.pos_embed.device
    fits = rows_within(B, bytes_of, memory_limit, lambda: device_memory_left(device), parts)
    rows = -(-B // -(-B // fits))  # as many parts as that takes, of one size
    return rows, bytes_of(rows)


def _workspaces(windows: tuple[int, float] | None) -> Callable[..., GraphWorkspace]:
    """What makes a workspace of the sequential solver, or of the one by windows: (W, tolerance)."""
    if windows is None:
        return GraphWorkspace
    return partial(WindowWorkspace, window=windows[0], tolerance=windows[1])


def device_memory_left(device: torch.device) -> int | None:
    """Nine tenths of what the GPU has free and what PyTorch holds of it unused; of the host's memory on the CPU."""
    if device.type != "cuda":
        return available_memory()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + unused) * 9 // 10


def prepare_graph(
    weights: Weights,
    z: Tensor,
    guidance: Guidance,
    workspace: GraphWorkspace | None = None,
    precision: str | None = None,
    memory_limit: int | None = None,
    windows: tuple[int, float] | None = None,
) -> GraphWorkspace:
    """A workspace for this call: the one given if it fits, else a new one, its kernels compiled and its graph captured.

    One given that does not fit is released, since both may not fit the device. windows: None for one token after
    another, or W and the tolerance.

    Raises:
        MemoryError: one row alone needs more than `memory_limit` (`rows_together`).
        Whatever Triton's compiler, the driver or the allocator raise.
    """
    B, dtype = z.size(0), storage_dtype(z, precision)
    key = (*GraphWorkspace.describe(weights, B, guidance.active, dtype), *(windows or ()))
    if workspace is None or workspace.key != key:
        if workspace is not None:
            workspace.release()
        group = rows_together(weights, B, guidance.active, dtype, memory_limit, windows)[0] if B > 0 else 0
        workspace = _workspaces(windows)(weights, group, guidance.active, dtype, batch=B)
        if B > 0:
            with torch.autocast(z.device.type, enabled=False), torch.no_grad():
                workspace.prepare()
    return workspace


@torch.no_grad()
def invert_graph(
    bijection: Bijection,
    z: Tensor,
    y: Tensor | None,
    guidance: Guidance,
    workspace: GraphWorkspace | None = None,
    on_token: Callable[[], None] | None = None,
    weights: Weights | None = None,
) -> tuple[Tensor, Tensor]:
    """z (B, T, D) -> x (B, T, D) in z's dtype, and log |det dx/dz| (B,), the sum of a, float32.

    For nets that `TritonEngine.why_not` has no objection to. On a GPU the result is enqueued, not waited for.

    Args:
        workspace: one of the net's shapes (`GraphWorkspace.describe`), as `prepare_graph` makes it.
        weights: what `inspect` gave, if that was asked already.

    Raises:
        ValueError: the workspace belongs to another shape, batch or device.
    """
    B, T, _ = z.shape
    log_det = torch.zeros(B, dtype=torch.float32, device=z.device)
    if B == 0 or T == 1:  # nothing to solve
        return z.clone(), log_det
    weights = inspect(bijection.net) if weights is None else weights
    if workspace is None:
        workspace = prepare_graph(weights, z, guidance)
    elif workspace.key != GraphWorkspace.describe(weights, B, guidance.active, workspace.dtype):
        raise ValueError("invert_graph: workspace must be one of this block's shapes, batch and device")
    x, parts = torch.empty(z.shape, dtype=z.dtype, device=z.device), -(-B // workspace.B)
    tick = None if on_token is None else _every(parts, on_token)
    with torch.autocast(z.device.type, enabled=False):
        workspace.load_weights(weights)
        for part in range(parts):
            # The last part reaches back, so that it has as many rows; those solved twice get the same bits twice.
            begin = min(part * workspace.B, B - workspace.B)
            rows = slice(begin, begin + workspace.B)
            workspace.load_rows(bijection, z[rows], None if y is None else y[rows], guidance)
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
