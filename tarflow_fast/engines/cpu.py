"""The native engine: all of one block's inversion in a few native calls.

Each call returns after 30 ms or a layer of MOST_ROWS rows, so that Ctrl-C and progress work. Precisions:

    fp32   weights, products and cache float32
    bf16   weights, products and cache bfloat16, accumulated in float32
    int8   weights int8 with a scale per output channel, activations float32, cache bfloat16

proj_in, proj_out, residual stream, normalisation, softmax, GELU, exp and log-det are float32 in all three.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tarflow_fast import native
from tarflow_fast.engines.call import Call, torch_precision
from tarflow_fast.engines.cpu_native import (
    BAD_LABEL,
    SECONDS,
    SPLITS,
    TRANSFORM_CODES,
    InversionArguments,
    Plan,
    Sizes,
    Workspace,
    run_pass,
    why_not_weights,
)
from tarflow_fast.engines.cpu_steps import CALL_TOKENS, CpuSteps
from tarflow_fast.engines.frozen import FrozenNets
from tarflow_fast.engines.memory import available_memory, rows_within
from tarflow_fast.engines.weights import Weights, inspect
from tarflow_fast.ops.registry import cpu_refuses
from tarflow_fast.transforms import Bijection, Guidance

__all__ = ["CpuEngine", "CpuPasses", "Engine"]

CACHE = 16 << 20  # bytes of a shared last-level cache to count on
ROWS = 8  # fewer rows than this at a time waste the reads of the weights
MOST_ROWS = 256  # more would only lengthen what Ctrl-C waits for: 2048 rows of a layer of C 1024 take 480 ms
PASS_ROWS, MIN_PASS_ROWS = 4096, 32  # tokens of all rows that are worked on together
PASS_FLOPS = (
    5e9  # of a native call over several tokens at most: a tenth of a second at 50 GFLOP/s, since Ctrl-C waits for it
)
PARTS = ("proj_in", "qkv", "attention", "proj", "fc1", "fc2", "proj_out", "update", "wait")  # enum tf_part


class Engine:
    """The native side of one inverse call: one plan, packed anew for every block (or the plans of a frozen model), and
    one workspace.

    A large batch is inverted in groups, with the same bits: of up to MOST_ROWS rows, as many as the memory limit
    allows, and where weights and key/value cache of a group fit the processor's cache, no more than that.

    Args:
        precision: 'fp32', 'bf16' or 'int8'.
        memory_limit: bytes plans and workspace may take together; None: most of what the machine has left.
        split: 'auto', or 'rows' or 'columns' over the threads.
        frozen: of a frozen model; it keeps the plans.

    Attributes:
        clock: None, or a float64 tensor (threads, len(PARTS)) to which the seconds each thread spends in each part of
            the passes are added.
    """

    def __init__(
        self,
        precision: str,
        memory_limit: int | None = None,
        split: str = "auto",
        frozen: FrozenNets | None = None,
    ) -> None:
        self.precision, self.memory_limit, self.split, self._frozen = precision, memory_limit, SPLITS[split], frozen
        self.clock: Tensor | None = None
        self._plan: Plan | None = None
        self._workspace: Workspace | None = None
        self._prepared: tuple[object, ...] | None = None  # what group and workspace are for
        self._group = 0  # rows of the batch inverted together

    @torch.no_grad()
    def invert(
        self,
        bijection: Bijection,
        z: Tensor,
        y: Tensor | None,
        guidance: Guidance,
        on_token: Callable[[], None] | None = None,
        weights: Weights | None = None,
    ) -> tuple[Tensor, Tensor]:
        """z (B, T, D) -> x (B, T, D) in z's dtype, and log |det dx/dz| (B,), nats, float32.

        weights: what `inspect(bijection.net)` gave, if that was asked already.
        """
        B = z.size(0)
        if B == 0:
            return z.clone(), torch.zeros(0, dtype=torch.float32, device="cpu")
        if weights is None:
            weights = inspect(bijection.net, "cpu")
            reason = weights if isinstance(weights, str) else why_not_weights(weights)
            if reason:
                raise RuntimeError(f"block_inverse: the native engine cannot take this block: {reason}")
        threads, clock = native.threads(), self.clock
        if clock is not None and (clock.shape != (threads, len(PARTS)) or clock.dtype != torch.float64):
            got = f"{tuple(clock.shape)} of {clock.dtype}"
            raise ValueError(f"block_inverse: clock must be {(threads, len(PARTS))} of torch.float64, got {got}")
        sizes = Sizes.of(weights, bijection.transform, self.precision)
        share = 2 if guidance.active else 1
        if self._prepared != (sizes.key(), B, share, threads):  # else it is as for the block before
            self._prepare(sizes, B, share, threads)
        self._take_plan(bijection.net, sizes, weights)

        z32 = z.detach().resolve_neg().to(torch.float32).contiguous()  # a lazy minus sign is not in the memory read
        x, log_det = torch.empty_like(z32), torch.empty(B, dtype=torch.float64, device="cpu")
        # a copy: they are checked before they are read, and another thread may write the caller's meanwhile
        labels = None if y is None else y.to(torch.int64, copy=True).contiguous()
        tempered = guidance.active and guidance.attn_temp != 1
        # read by the library as float32 on the host, whatever the process's default dtype and device are
        plain = {"dtype": torch.float32, "device": "cpu"}
        scale = torch.tensor([1.0, 1.0 / guidance.attn_temp], **plain).repeat(B) if tempered else None
        strength = torch.full((B,), float(guidance.weight), **plain) if guidance.active else None
        order = None if bijection.order.identity else bijection.order.index(torch.device("cpu"), torch.int32)
        guided_parts = sum((part in guidance.what) << k for k, part in enumerate(bijection.transform.parts))
        groups = -(-B // self._group)
        for number in range(groups):
            begin, end = B * number // groups, B * (number + 1) // groups
            parts = [(z32, 1), (x, 1), (log_det, 1), (labels, 1), (scale, share), (strength, 1)]
            if begin:
                parts = [(None if part is None else part[begin * per :], per) for part, per in parts]
            pointers = [native.pointer(part) for part, _ in parts]
            pointers += [native.pointer(order), native.pointer(self.clock)]
            job = InversionArguments(*pointers, end - begin, guided_parts, guidance.annealed, self.split)
            self._run(job, on_token, number, groups, threads)
        return x.to(z.dtype), log_det.to(torch.float32)

    def _run(
        self, job: InversionArguments, on_token: Callable[[], None] | None, number: int, groups: int, threads: int
    ) -> None:
        plan, tokens, stages = self._plan, self._plan.sizes.tokens - 1, self._plan.sizes.layers + 2
        stage, told = ctypes.c_int64(0), tokens * number // groups  # of a block's tokens, over all groups
        run, arguments = plan.library.tf_invert, (ctypes.byref(job), ctypes.byref(stage))
        while True:
            # returns every SECONDS: this loop is where Python sees Ctrl-C
            status = run(plan.handle, self._workspace.handle, *arguments, SECONDS, threads)
            if status == BAD_LABEL:
                raise ValueError(f"block_inverse: y must be below num_classes = {plan.sizes.classes}")
            native.check(status, "block_inverse")
            if on_token is not None:
                solved = (tokens * number + stage.value // stages) // groups
                for _ in range(solved - told):
                    on_token()
                told = solved
            if stage.value >= tokens * stages:
                return

    def plan_for(self, bijection: Bijection, weights: Weights) -> Plan:
        """The plan of this net, packed."""
        self._take_plan(bijection.net, Sizes.of(weights, bijection.transform, self.precision), weights)
        return self._plan

    def call_tokens(self, sizes: Sizes) -> int:
        """How many tokens of all rows a native call takes at most, for Ctrl-C."""
        most = min(CALL_TOKENS, PASS_ROWS, int(PASS_FLOPS / (24 * sizes.channels**2 * sizes.layers)))
        return max(MIN_PASS_ROWS, most)

    def tile(self, sizes: Sizes, B: int) -> tuple[int, int]:
        """Rows and tokens of a pass over known tokens: whole sequences where `call_tokens` is enough."""
        most = self.call_tokens(sizes)
        window = min(max(sizes.tokens - 1, 1), most)
        return self._rows_within(sizes, min(B, max(1, most // window)), window, 1), window

    def rows_by_windows(self, sizes: Sizes, B: int, window: int, share: int) -> int:
        """Rows to solve together by windows. Rows that are done leave the passes, so one part takes less than two.

        share: engine rows of one of the batch, 2 under guidance.
        """
        return self._rows_within(sizes, min(B, max(1, PASS_ROWS // (window * share))), window, share)

    def _rows_within(self, sizes: Sizes, rows: int, window: int, share: int) -> int:
        return rows_within(
            rows,
            lambda rows: Plan.bytes_of(sizes) + Workspace.bytes_of(sizes, rows * share, window),
            self.memory_limit,
            lambda: available_memory(0 if self._workspace is None else self._workspace.bytes),
            lambda: f"plans {Plan.bytes_of(sizes):,}, workspace {Workspace.bytes_of(sizes, share, window):,}",
        )

    def workspace_for(self, sizes: Sizes, rows: int, window: int) -> Workspace:
        """A workspace with room for passes of so many engine rows; the one there is, where that is enough."""
        space, threads = self._workspace, native.threads()
        fits = space is not None and space.sizes.key() == sizes.key() and space.rows >= rows
        if not fits or space.window < window or space.threads < threads:
            self._workspace = self._prepared = None
            self._workspace = space = Workspace.of(sizes, rows, window, threads)
        return space

    def run(
        self, plan: Plan, bijection: Bijection, tokens: Tensor, position: int, y: Tensor | None, guidance: Guidance
    ) -> Tensor:
        """`CpuPasses.run`, with a workspace that fits."""
        share, (B, W, _) = 2 if guidance.active else 1, tokens.shape
        space = self.workspace_for(plan.sizes, B * share, W)
        scale = guidance.query_scale(B, tokens)
        if scale is not None:  # of conditional and unguided rows side by side
            scale = scale.flatten().view(2, B).T.contiguous()
        order = None if bijection.order.identity else bijection.order.index(torch.device("cpu"), torch.int32)
        ab = run_pass(
            plan, space, tokens, position, labels=y, query_scale=scale, guided=share == 2, order=order,
            split={code: name for name, code in SPLITS.items()}[self.split],
        )  # fmt: skip
        if share == 2:
            ab = torch.cat([ab[0::2], ab[1::2]])
        return guidance.combine(ab, bijection.transform.parts, position, plan.sizes.tokens)

    def close(self) -> None:
        """Puts the memory aside for a later engine; without it the memory goes back with the object."""
        things = self._plan if self._frozen is None else None, self._workspace
        self._plan = self._workspace = self._prepared = None
        for thing in things:
            if thing is not None:
                thing.put_aside()

    def _take_plan(self, net: nn.Module, sizes: Sizes, weights: Weights) -> None:
        """Makes `_plan` this net's."""
        if self._frozen is not None:
            self._plan = self._frozen.plan(net, sizes, weights)
            return
        if self._plan is None or self._plan.sizes.key() != sizes.key():
            self._plan = None  # the old one goes before the new one is made
            self._plan = Plan.of(sizes)
        self._plan.pack(weights)

    def _prepare(self, sizes: Sizes, B: int, share: int, threads: int) -> None:
        """Chooses the group and makes `_workspace` fit it."""
        self._prepared = None  # should this raise
        group, space = self._rows_together(sizes, B, share), self._workspace
        group = -(-B // -(-B // group))  # as many groups, of even size
        fits = space is not None and space.sizes.key() == sizes.key() and space.rows >= group * share
        if not fits or space.threads < threads:
            self._workspace = None
            self._workspace = Workspace.of(sizes, group * share, 1, threads)
        self._group, self._prepared = group, (sizes.key(), B, share, threads)

    def _rows_together(self, sizes: Sizes, B: int, share: int) -> int:
        """How many rows of the batch to invert together."""
        plan_bytes, group = Plan.bytes_of(sizes), min(B, max(1, MOST_ROWS // share))
        one = Workspace.bytes_of(sizes, share)
        if plan_bytes < 0 or one < 0 or Workspace.bytes_of(sizes, B * share) < 0:
            raise ValueError(f"block_inverse: the bytes of this block at batch {B} overflow: {sizes.key()}")
        if plan_bytes < CACHE:
            a_row = max(1, Workspace.bytes_of(sizes, 2 * share) - one)
            group = min(group, max((CACHE - plan_bytes) // a_row, -(-ROWS // share)))
        held = 0 if self._plan is None else self._plan.bytes
        if self._frozen is not None:
            plan_bytes, held = self._frozen.bytes_for(self.precision), self._frozen.held
        if self._workspace is not None:
            held += self._workspace.bytes
        return rows_within(
            group,
            lambda rows: plan_bytes + Workspace.bytes_of(sizes, rows * share),
            self.memory_limit,
            lambda: available_memory(held),
            lambda: f"plans {plan_bytes:,}, workspace {one:,}",
        )


class CpuPasses:
    """The native engine on one block and one batch."""

    def __init__(
        self, engine: Engine, bijection: Bijection, y: Tensor | None, guidance: Guidance, weights: Weights
    ) -> None:
        self.engine, self.bijection, self.y, self.guidance, self.weights = engine, bijection, y, guidance, weights
        self._plan: Plan | None = None

    def solve(self, z: Tensor, on_token: Callable[[], None] | None = None) -> tuple[Tensor, Tensor]:
        return self.engine.invert(self.bijection, z, self.y, self.guidance, on_token, self.weights)

    def tile(self, B: int) -> tuple[int, int]:
        """How many rows and how many tokens of a batch of B a pass over known tokens should take."""
        return self.engine.tile(Sizes.of(self.weights, self.bijection.transform, self.engine.precision), B)

    def rows_for(self, B: int, window: int) -> int:
        """How many rows of a batch of B to solve together by windows."""
        sizes = Sizes.of(self.weights, self.bijection.transform, self.engine.precision)
        return self.engine.rows_by_windows(sizes, B, window, 2 if self.guidance.active else 1) if B else 0

    def steps(self, rows: slice, B: int, window: int) -> CpuSteps:
        """Passes by windows of these B rows of the batch."""
        y = None if self.y is None else self.y[rows]
        plan = self.engine.plan_for(self.bijection, self.weights)
        space = self.engine.workspace_for(plan.sizes, B * (2 if self.guidance.active else 1), window)
        return CpuSteps(plan, space, self.bijection, y, B, self.guidance, self.engine.call_tokens(plan.sizes))

    def run(self, tokens: Tensor, position: int, rows: slice = slice(None)) -> Tensor:
        """The net on W tokens a row, which follow those it saw before.

        tokens: (b, W, D) float32 of net order, of the rows `rows` of the batch.  position: of the first of them.
        Returns (b, W, P D), guided, float32.
        """
        if self._plan is None:
            self._plan = self.engine.plan_for(self.bijection, self.weights)
        y = None if self.y is None else self.y[rows]
        return self.engine.run(self._plan, self.bijection, tokens, position, y, self.guidance)


class CpuEngine:
    """The entry of the native engine in the table."""

    name = "cpu"

    def missing(self) -> str:
        return native.reason()

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str:
        return cpu_refuses(device, dtype)

    def why_not(self, bijection: Bijection, weights: Weights, z: Tensor, call: Call) -> str:
        if bijection.transform.name not in TRANSFORM_CODES:
            return f"it has no transform {bijection.transform.name!r}"
        return why_not_weights(weights)

    def open(
        self, bijection: Bijection, z: Tensor, y: Tensor | None, guidance: Guidance, call: Call, weights: Weights
    ) -> CpuPasses:
        # half precision has no kernels here: its weights are exact in float32
        own = "bf16" if torch_precision(bijection.net, z) == "bf16" else "fp32"
        precision = call.precision or own
        engine = call.state(
            f"{self.name} {precision}", lambda: Engine(precision, call.memory_limit, frozen=call.frozen)
        )
        return CpuPasses(engine, bijection, y, guidance, weights)
