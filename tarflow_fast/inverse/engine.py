"""The native engine as Python sees it: plan (packed weights), workspace (cache, activations), and the run.

All of one block's inversion happens in a few native calls; each returns within about 50 ms, so that Ctrl-C and progress
work. Precisions:

    fp32   weights, products and cache float32
    bf16   weights, products and cache bfloat16, accumulated in float32
    int8   weights int8 with a scale per output channel (proj_in and proj_out float32), activations float32, cache bf16

Residual stream, normalisation, softmax, GELU, exp and log-det are float32 in all three.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tarflow_fast import native
from tarflow_fast.inverse.guidance import Guidance

if TYPE_CHECKING:
    from tarflow_fast.block import MetaBlock

__all__ = ["PRECISIONS", "Engine", "Plan", "Sizes", "Workspace"]

PRECISIONS = {"fp32": 0, "bf16": 1, "int8": 2}  # enum tf_precision
SPLITS = {"auto": 0, "columns": 1, "rows": 2}  # enum tf_split
SECONDS = 0.03  # a native call returns after about this long
BAD_SIZE, NOT_FINITE = 5, 6  # enum tf_status
_UNCHECKED = 1 << 26  # bytes below this are taken without a look at the machine's memory


class Sizes(ctypes.Structure):
    """struct tf_block: what a plan and a workspace must agree on."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "token_size", "channels", "layers", "head_size", "hidden")),
        *((name, ctypes.c_int32) for name in ("scale", "precision")),
    ]

    @classmethod
    def of(cls, block: MetaBlock, precision: str) -> Sizes:
        T, C = block.pos_embed.shape
        first = block.attn_blocks[0]
        return cls(
            T,
            block.proj_in.in_features,
            C,
            len(block.attn_blocks),
            first.attention.head_size,
            first.mlp.main[0].out_features,
            block.nvp,
            PRECISIONS[precision],
        )

    def key(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name, _ in self._fields_)


class _Inversion(ctypes.Structure):
    """struct tf_inversion."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("z", "x", "log_det", "classes", "query_scale", "guidance")),
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("guide_a", "guide_b", "annealed", "flip", "split")),
    ]


class _Pass(ctypes.Structure):
    """struct tf_pass_arguments."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tokens", "classes", "query_scale", "ab")),
        *((name, ctypes.c_int64) for name in ("rows", "window", "position")),
        *((name, ctypes.c_int32) for name in ("guided", "flip", "split")),
    ]


class _Native:
    """Memory of the library: usable in the process that made it, until closed."""

    _destroy: str

    def __init__(self, sizes: Sizes, nbytes: int) -> None:
        self._handle: ctypes.c_void_p | None = None
        self.sizes, self.bytes, self._pid = sizes, nbytes, os.getpid()
        self._library = native.library()
        if nbytes < 0:
            raise ValueError(f"block_inverse: the sizes of this block overflow: {sizes.key()}")

    def _made(self, status: int, handle: ctypes.c_void_p) -> None:
        if status != 0:
            raise MemoryError(
                f"block_inverse: no memory for the {self.bytes:,} bytes of its {type(self).__name__.lower()}"
            )
        self._handle = handle

    @property
    def handle(self) -> ctypes.c_void_p:
        what = type(self).__name__.lower()
        if self._handle is None:
            raise ValueError(f"block_inverse: this {what} is closed")
        if self._pid != os.getpid():
            raise RuntimeError(f"block_inverse: this {what} was made before a fork; make another in this process")
        return self._handle

    def close(self) -> None:
        """Give the memory back; further use raises ValueError."""
        handle, self._handle = getattr(self, "_handle", None), None
        if handle is not None:
            getattr(self._library, self._destroy)(handle)

    __del__ = close


class Plan(_Native):
    """One block's weights in the layout of the kernels. `bytes` is known before anything is allocated."""

    _destroy = "tf_plan_destroy"

    @staticmethod
    def bytes_of(sizes: Sizes) -> int:
        """What a plan of these sizes takes; -1 when that overflows."""
        return native.library().tf_plan_bytes(ctypes.byref(sizes))

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes, self.bytes_of(sizes))
        handle = ctypes.c_void_p()
        self._made(self._library.tf_plan_create(ctypes.byref(sizes), ctypes.byref(handle)), handle)

    def pack(self, block: MetaBlock) -> Plan:
        """Copy the weights of `block` in.

        Raises:
            ValueError: a weight is NaN or infinite; named. The plan is then not usable until packed again.
        """
        names, tensors = _tensors(block)
        dtype = native.DTYPES[block.pos_embed.dtype]
        pointers = (ctypes.c_void_p * len(tensors))(*(native.pointer(tensor) for tensor in tensors))
        bad = ctypes.c_int64(-1)
        status = self._library.tf_plan_pack(self.handle, pointers, dtype, native.threads(), ctypes.byref(bad))
        if status == NOT_FINITE:
            raise ValueError(f"block_inverse: weights must be finite, got NaN or infinity in {names(bad.value)}")
        native.check(status, "block_inverse")
        return self


class Workspace(_Native):
    """Cache and activations for passes of up to `rows` rows (twice the batch under guidance) of `window` tokens."""

    _destroy = "tf_workspace_destroy"

    @staticmethod
    def bytes_of(sizes: Sizes, rows: int, window: int = 1, threads: int | None = None) -> int:
        """What a workspace takes; -1 when that overflows."""
        threads = native.threads() if threads is None else threads
        return native.library().tf_workspace_bytes(ctypes.byref(sizes), rows, window, threads)

    def __init__(self, sizes: Sizes, rows: int, window: int = 1, threads: int | None = None) -> None:
        self.rows, self.window = rows, window
        self.threads = native.threads() if threads is None else threads
        super().__init__(sizes, self.bytes_of(sizes, rows, window, self.threads))
        handle = ctypes.c_void_p()
        status = self._library.tf_workspace_create(
            ctypes.byref(sizes), rows, window, self.threads, ctypes.byref(handle)
        )
        self._made(status, handle)


class Engine:
    """The native side of one inverse call: one plan, packed anew for every block, and one workspace.

    Args:
        precision: 'fp32', 'bf16' or 'int8'.
        memory_limit: bytes the plan and the workspace may take together; None: most of what the machine has left. A
            batch that needs more is inverted in smaller parts; the results have the same bits.
        split: 'auto', or 'rows' or 'columns' over the threads.
    """

    def __init__(self, precision: str, memory_limit: int | None = None, split: str = "auto") -> None:
        self.precision, self.memory_limit, self.split = precision, memory_limit, SPLITS[split]
        self._plan: Plan | None = None
        self._workspace: Workspace | None = None

    @torch.no_grad()
    def invert(
        self,
        block: MetaBlock,
        z: Tensor,
        y: Tensor | None,
        guidance: Guidance,
        on_token: Callable[[], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The contract of `invert_sequential`: x (B, T, D) in z's dtype and log_det (B,) float32."""
        B = z.size(0)
        if B == 0:
            return z.clone(), torch.zeros(0)
        sizes, share = Sizes.of(block, self.precision), 2 if guidance.active else 1
        group = self._fit(sizes, B, share)
        plan = self._packed(sizes, block)
        z32 = z.detach().to(torch.float32).contiguous()
        x, log_det = torch.empty_like(z32), torch.empty(B, dtype=torch.float64)
        classes = _class_rows(block, y, B, guidance.active)
        scale = (
            torch.tensor([1.0, 1.0 / guidance.attn_temp]).repeat(B) if share == 2 and guidance.attn_temp != 1 else None
        )
        weights = torch.full((B,), guidance.weight) if share == 2 else None
        for begin in range(0, B, group):
            end = min(begin + group, B)
            rows = slice(begin * share, end * share)
            parts = (z32[begin:end], x[begin:end], log_det[begin:end], classes, scale, weights)
            pointers = [native.pointer(part) for part in parts[:3]]
            pointers += [None if part is None else native.pointer(part[rows]) for part in parts[3:5]]
            pointers += [None if weights is None else native.pointer(weights[begin:end])]
            what = "a" in guidance.what, "b" in guidance.what
            job = _Inversion(*pointers, end - begin, *what, guidance.annealed, block.flip, self.split)
            self._run(plan, job, sizes, on_token if end == B else None)
        return x.to(z.dtype), log_det.to(torch.float32)

    def _run(self, plan: Plan, job: _Inversion, sizes: Sizes, on_token: Callable[[], None] | None) -> None:
        stages = sizes.layers + 2  # a token
        end, stage, told = (sizes.tokens - 1) * stages, ctypes.c_int64(0), 0
        run, arguments = self._workspace._library.tf_invert, (ctypes.byref(job), ctypes.byref(stage))
        while True:
            # returns every SECONDS: this loop is where Python sees Ctrl-C
            status = run(plan.handle, self._workspace.handle, *arguments, SECONDS, native.threads())
            native.check(status, "block_inverse")
            if on_token is not None:
                for _ in range(stage.value // stages - told):
                    on_token()
                told = stage.value // stages
            if stage.value >= end:
                return

    def pass_(self, plan: Plan, tokens: Tensor, position: int, *, flip: bool = False) -> Tensor:
        """One pass of the net over W tokens of each row, in net order from `position` on; see tf_pass.

        Args:
            tokens: (R, W, D) float32; the cache holds the tokens before them.

        Returns:
            (R, W, 2D) float32, a then b (volume preserving: (R, W, D), b alone).
        """
        R, W, D = tokens.shape
        tokens = tokens.contiguous()
        ab = tokens.new_empty(R, W, D * (2 if plan.sizes.scale else 1))
        if self._workspace is None or self._workspace.rows < R or self._workspace.window < W:
            self._workspace = Workspace(plan.sizes, R, W)
        job = _Pass(native.pointer(tokens), None, None, native.pointer(ab), R, W, position, 0, flip, self.split)
        status = plan._library.tf_pass(plan.handle, self._workspace.handle, ctypes.byref(job), native.threads())
        native.check(status, "block_inverse")
        return ab

    def _packed(self, sizes: Sizes, block: MetaBlock) -> Plan:
        if self._plan is None or self._plan.sizes.key() != sizes.key():
            self._plan = Plan(sizes)
        return self._plan.pack(block)

    def _fit(self, sizes: Sizes, B: int, share: int) -> int:
        """Batch rows to invert together, their workspace made."""
        space = self._workspace
        if space is not None and space.sizes.key() == sizes.key() and space.threads >= native.threads():
            if space.rows >= B * share or space.rows == self._group * share:
                return min(B, space.rows // share)
        plan_bytes = Plan.bytes_of(sizes)
        group, limit = B, self.memory_limit
        while True:
            needed = Workspace.bytes_of(sizes, group * share)
            if needed < 0 or plan_bytes < 0:
                raise ValueError(f"block_inverse: the bytes of this block at batch {group} overflow: {sizes.key()}")
            if limit is None and needed + plan_bytes > _UNCHECKED:
                limit = available_memory()
            if limit is None or needed + plan_bytes <= limit:
                break
            if group == 1:
                raise MemoryError(
                    f"block_inverse: one row needs {needed + plan_bytes:,} bytes (plan {plan_bytes:,}, "
                    f"workspace {needed:,}), over the limit of {limit:,}"
                )
            group = (group + 1) // 2
        self._group, self._workspace = group, None  # the old one is freed before the new one is made
        self._workspace = Workspace(sizes, group * share)
        return group


def available_memory() -> int | None:
    """Nine tenths of the memory the kernel says is available; None where it does not say."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024 * 9 // 10
    except OSError:
        pass
    return None


def _tensors(block: MetaBlock) -> tuple[Callable[[int], str], list[Tensor | None]]:
    """The weights in the order of tf_plan_pack, contiguous, and what to call the i-th of them."""
    modules = [("proj_in", block.proj_in), ("pos_embed", None), ("proj_out", block.proj_out)]
    for number, layer in enumerate(block.attn_blocks):
        attention, mlp = layer.attention, layer.mlp
        inside = [
            ("attention.norm", attention.norm),
            ("attention.qkv", attention.qkv),
            ("attention.proj", attention.proj),
        ]
        inside += [("mlp.norm", mlp.norm), ("mlp.main.0", mlp.main[0]), ("mlp.main.2", mlp.main[2])]
        modules += [(f"attn_blocks.{number}.{name}", module) for name, module in inside]
    tensors: list[Tensor | None] = []
    for _, module in modules:
        tensors += [block.pos_embed] if module is None else [module.weight, module.bias]
    tensors = [None if tensor is None else tensor.detach().contiguous() for tensor in tensors]

    def name_of(index: int) -> str:
        names = []
        for name, module in modules:
            names += [name] if module is None else [f"{name}.weight", f"{name}.bias"]
        return names[index]

    return name_of, tensors


def _class_rows(block: MetaBlock, y: Tensor | None, B: int, guided: bool) -> Tensor | None:
    """Class embeddings of the engine's rows, (R, C) float32; None for an unconditional block."""
    if block.class_embed is None:
        return None
    embeddings = block.class_embed.detach()[:, 0].to(torch.float32)
    if not torch.isfinite(embeddings).all():
        raise ValueError("block_inverse: weights must be finite, got NaN or infinity in class_embed")
    mean = embeddings.mean(dim=0)
    rows = mean.expand(B, -1) if y is None else torch.where((y < 0)[:, None], mean, embeddings[y.clamp(min=0)])
    return (torch.stack([rows, mean.expand(B, -1)], dim=1) if guided else rows).reshape(-1, mean.numel()).contiguous()
