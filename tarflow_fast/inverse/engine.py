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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tarflow_fast import native
from tarflow_fast.inverse.eligibility import Weights, inspect
from tarflow_fast.inverse.guidance import Guidance
from tarflow_fast.inverse.memory import available_memory, most_rows
from tarflow_fast.inverse.plan import BAD_LABEL, SPLITS, Plan, Sizes, Workspace

if TYPE_CHECKING:
    from tarflow_fast.block import MetaBlock
    from tarflow_fast.inverse.frozen import FrozenBlocks

__all__ = ["Engine"]

SECONDS = 0.03  # a native call returns after about this long
CACHE = 16 << 20  # bytes of a shared last-level cache to count on
ROWS = 8  # fewer rows than this at a time waste the reads of the weights
MOST_ROWS = 256  # more would only lengthen what Ctrl-C waits for: 2048 rows of a layer of C 1024 take 480 ms
PARTS = ("proj_in", "qkv", "attention", "proj", "fc1", "fc2", "proj_out", "update", "wait")  # enum tf_part
_UNCHECKED = 1 << 26  # bytes below this are taken without a look at the machine's memory


class _Inversion(ctypes.Structure):
    """struct tf_inversion."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("z", "x", "log_det", "labels", "query_scale", "guidance")),
        *((name, ctypes.c_void_p) for name in ("order", "clock")),
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("guided_parts", "annealed", "split")),
    ]


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
        frozen: FrozenBlocks | None = None,
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
        block: MetaBlock,
        z: Tensor,
        y: Tensor | None,
        guidance: Guidance,
        on_token: Callable[[], None] | None = None,
        weights: Weights | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The contract of `invert_sequential`: x (B, T, D) in z's dtype and log_det (B,) float32.

        weights: what `inspect(block)` gave, if that was asked already.
        """
        B = z.size(0)
        if B == 0:
            return z.clone(), torch.zeros(0, dtype=torch.float32, device="cpu")
        if weights is None:
            weights = inspect(block)
            if isinstance(weights, str):
                raise RuntimeError(f"block_inverse: the native engine cannot take this block: {weights}")
        threads, clock = native.threads(), self.clock
        if clock is not None and (clock.shape != (threads, len(PARTS)) or clock.dtype != torch.float64):
            got = f"{tuple(clock.shape)} of {clock.dtype}"
            raise ValueError(f"block_inverse: clock must be {(threads, len(PARTS))} of torch.float64, got {got}")
        sizes, share = Sizes.of(block, weights, self.precision), 2 if guidance.active else 1
        if self._prepared != (sizes.key(), B, share, threads):  # else it is as for the block before
            self._prepare(sizes, B, share, threads)
        self._take_plan(block, sizes, weights)

        z32 = z.detach().resolve_neg().to(torch.float32).contiguous()  # a lazy minus sign is not in the memory read
        x, log_det = torch.empty_like(z32), torch.empty(B, dtype=torch.float64, device="cpu")
        # a copy: they are checked before they are read, and another thread may write the caller's meanwhile
        labels = None if y is None else y.to(torch.int64, copy=True).contiguous()
        tempered = guidance.active and guidance.attn_temp != 1
        # read by the library as float32 on the host, whatever the process's default dtype and device are
        plain = {"dtype": torch.float32, "device": "cpu"}
        scale = torch.tensor([1.0, 1.0 / guidance.attn_temp], **plain).repeat(B) if tempered else None
        strength = torch.full((B,), float(guidance.weight), **plain) if guidance.active else None
        order = torch.arange(z.size(1) - 1, -1, -1, dtype=torch.int32, device="cpu") if block.flip else None
        guided_parts = sum((part in guidance.what) << k for k, part in enumerate("ab" if block.nvp else "b"))
        groups = -(-B // self._group)
        for number in range(groups):
            begin, end = B * number // groups, B * (number + 1) // groups
            parts = [(z32, 1), (x, 1), (log_det, 1), (labels, 1), (scale, share), (strength, 1)]
            if begin:
                parts = [(None if part is None else part[begin * per :], per) for part, per in parts]
            pointers = [native.pointer(part) for part, _ in parts]
            pointers += [native.pointer(order), native.pointer(self.clock)]
            job = _Inversion(*pointers, end - begin, guided_parts, guidance.annealed, self.split)
            self._run(job, on_token, number, groups, threads)
        return x.to(z.dtype), log_det.to(torch.float32)

    def _run(
        self, job: _Inversion, on_token: Callable[[], None] | None, number: int, groups: int, threads: int
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

    def close(self) -> None:
        """Puts the memory aside for a later engine; without it the memory goes back with the object."""
        things = self._plan if self._frozen is None else None, self._workspace
        self._plan = self._workspace = self._prepared = None
        for thing in things:
            if thing is not None:
                thing.put_aside()

    def _take_plan(self, block: MetaBlock, sizes: Sizes, weights: Weights) -> None:
        """Makes `_plan` this block's."""
        if self._frozen is not None:
            self._plan = self._frozen.plan(block, sizes, weights)
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
        limit, held = self.memory_limit, 0 if self._plan is None else self._plan.bytes
        if self._frozen is not None:
            plan_bytes, held = self._frozen.bytes_for(self.precision), self._frozen.held
        if self._workspace is not None:
            held += self._workspace.bytes

        def needed(group: int) -> int:
            return plan_bytes + Workspace.bytes_of(sizes, group * share)

        if limit is None and needed(group) > _UNCHECKED:
            limit = available_memory(held)
        if limit is None or needed(group) <= limit:
            return group
        if needed(1) > limit:
            raise MemoryError(
                f"block_inverse: one row needs {needed(1):,} bytes (plans {plan_bytes:,}, workspace {one:,}), "
                f"over the limit of {limit:,}"
            )
        return most_rows(group, lambda rows: needed(rows) <= limit)
