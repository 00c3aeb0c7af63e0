"""What the native engine works with: sizes, plan (packed weights) and workspace (cache, activations).

Both say their bytes before anything is allocated, can be closed, and are refused after a fork.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tarflow_fast import native
from tarflow_fast.engines.weights import Weights
from tarflow_fast.transforms import Transform

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "PRECISIONS",
    "SECONDS",
    "SPLITS",
    "Following",
    "InversionArguments",
    "Plan",
    "Sizes",
    "Workspace",
    "run_pass",
]
__all__ += ["why_not_weights"]

EPS = 1e-5
HEAD_SIZES = range(16, 129)
PRECISIONS = {"fp32": 0, "bf16": 1, "int8": 2}  # enum tf_precision
TRANSFORM_CODES = {"shift": 0, "affine": 1}  # enum tf_transform
TRANSFORM_PARTS = {0: 1, 1: 2}
SECONDS = 0.03  # a native call returns after about this long
SPLITS = {"auto": 0, "columns": 1, "rows": 2}  # enum tf_split
BAD_SIZE, NOT_FINITE, BAD_LABEL = 5, 6, 7  # enum tf_status


def why_not_weights(weights: Weights) -> str:
    """Why the native engine does not take such weights; "" when it does."""
    if weights.head_size not in HEAD_SIZES:
        return f"head size {weights.head_size} is not {HEAD_SIZES[0]} to {HEAD_SIZES[-1]}"
    for number, layer in enumerate(weights.layers):
        for part, eps in zip(("attention.norm", "mlp.norm"), layer.eps, strict=True):
            if eps != EPS:
                return f"attn_blocks.{number}.{part} has eps {eps}, not {EPS}"
    return ""


class Sizes(ctypes.Structure):
    """struct tf_block: what a plan and a workspace must agree on."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("tokens", "token_size", "channels", "layers", "head_size", "hidden", "classes")
        ),
        *((name, ctypes.c_int32) for name in ("transform", "precision")),
    ]

    @classmethod
    def of(cls, weights: Weights, transform: Transform, precision: str) -> Sizes:
        (T, C), D, L = weights.pos_embed.shape, weights.token_size, len(weights.layers)
        classes = 0 if weights.class_embed is None else len(weights.class_embed)
        kind = TRANSFORM_CODES[transform.name], PRECISIONS[precision]
        return cls(T, D, C, L, weights.head_size, weights.hidden, classes, *kind)

    def key(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name, _ in self._fields_)


class _Native:
    """Memory of the library: usable in the process that made it, until closed."""

    _rest: str
    _destroy: str

    def __init__(self, sizes: Sizes, nbytes: int, *more: int) -> None:
        self._handle: ctypes.c_void_p | None = None
        self.sizes, self.bytes, self._pid = sizes, nbytes, os.getpid()
        self.key = (*sizes.key(), *more)
        self.library = native.library()
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

    @property
    def usable(self) -> bool:
        return self._handle is not None and self._pid == os.getpid()

    @classmethod
    def of(cls, *key: Any) -> Self:
        """One made before and put aside, or a new one."""
        return _spares.take(cls, (*key[0].key(), *key[1:])) or cls(*key)

    def put_aside(self) -> None:
        """Keep it for the next call, which owns it from then on; or give its memory back."""
        _spares.put(self)

    def rest(self) -> bool:
        """From now on what it holds may be lost, its memory going back to a system that runs short of it; whether that
        is so (not for small ones, nor on every system)."""
        return bool(getattr(self.library, self._rest)(self.handle))

    def close(self) -> None:
        """Give the memory back; further use raises ValueError."""
        handle, self._handle = getattr(self, "_handle", None), None
        if handle is not None:
            getattr(self.library, self._destroy)(handle)

    __del__ = close


class _Spares:
    """Memory of finished calls, kept for the next of the same sizes: a small block is inverted in the time that fresh
    pages take, and packing 230 MB into fresh pages of a virtual machine took 250 ms, into these 22. Only memory is
    kept: a plan is packed anew by every call, and all a run reads of a workspace that it did not write are the zeros
    between rows, and how long stages took. What is large the system may take back when it runs short of memory; the
    rest is kept up to a smaller sum."""

    LIMITS = {True: 1 << 30, False: 1 << 26}  # bytes of what can be taken back, and of what cannot

    def __init__(self) -> None:
        # reentrant: a signal handler, or what the collector runs, may invert inside take or put
        self._lock, self._kept = threading.RLock(), []

    def take(self, kind: type[_Native], key: tuple[int, ...]) -> _Native | None:
        with self._lock:
            for pair in self._kept:
                if type(pair[0]) is kind and pair[0].key == key and pair[0].usable:
                    self._kept = [kept for kept in self._kept if kept is not pair]
                    return pair[0]
        return None

    def put(self, thing: _Native) -> None:
        with self._lock:
            if not thing.usable:
                return
            rests = thing.rest()
            alike = [kept for kept, kept_rests in self._kept if kept_rests == rests] + [thing]
            while sum(kept.bytes for kept in alike) > self.LIMITS[rests]:
                alike.pop(0)  # the oldest; its memory goes back with it
            self._kept = [pair for pair in self._kept if pair[1] != rests] + [(kept, rests) for kept in alike]


_spares = _Spares()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_spares.__init__)  # the lock may be held, and the memory is refused anyway


class Plan(_Native):
    """One block's weights in the layout of the kernels. `bytes` is known before anything is allocated."""

    _rest, _destroy = "tf_plan_rest", "tf_plan_destroy"

    @staticmethod
    def bytes_of(sizes: Sizes) -> int:
        """What a plan of these sizes takes; -1 when that overflows."""
        return native.library().tf_plan_bytes(ctypes.byref(sizes))

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes, self.bytes_of(sizes))
        handle = ctypes.c_void_p()
        self._made(self.library.tf_plan_create(ctypes.byref(sizes), ctypes.byref(handle)), handle)

    def pack(self, weights: Weights) -> Plan:
        """Copy the weights in.

        Raises:
            ValueError: a weight is NaN or infinite; named. The plan is then not usable until packed again.
        """
        tensors = [None if each is None else each.contiguous() for each in weights.tensors]
        pointers = (ctypes.c_void_p * len(tensors))(*(native.pointer(tensor) for tensor in tensors))
        dtype, bad = native.DTYPES[tensors[0].dtype], ctypes.c_int64(-1)
        status = self.library.tf_plan_pack(self.handle, pointers, dtype, native.threads(), ctypes.byref(bad))
        if status == NOT_FINITE:
            raise ValueError(
                f"block_inverse: weights must be finite, got NaN or infinity in {weights.names[bad.value]}"
            )
        native.check(status, "block_inverse")
        return self


class Workspace(_Native):
    """Cache and activations for passes of up to `rows` rows (twice the batch under guidance) of `window` tokens."""

    _rest, _destroy = "tf_workspace_rest", "tf_workspace_destroy"

    @staticmethod
    def bytes_of(sizes: Sizes, rows: int, window: int = 1, threads: int | None = None) -> int:
        """What a workspace takes; -1 when that overflows."""
        threads = native.threads() if threads is None else threads
        return native.library().tf_workspace_bytes(ctypes.byref(sizes), rows, window, threads)

    def __init__(self, sizes: Sizes, rows: int, window: int = 1, threads: int | None = None) -> None:
        self.rows, self.window = rows, window
        self.threads = native.threads() if threads is None else threads
        super().__init__(sizes, self.bytes_of(sizes, rows, window, self.threads), rows, window, self.threads)
        handle = ctypes.c_void_p()
        status = self.library.tf_workspace_create(ctypes.byref(sizes), rows, window, self.threads, ctypes.byref(handle))
        self._made(status, handle)


class InversionArguments(ctypes.Structure):
    """struct tf_inversion."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("z", "x", "log_det", "labels", "query_scale", "guidance")),
        *((name, ctypes.c_void_p) for name in ("order", "clock")),
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("guided_parts", "annealed", "split")),
    ]


class _Pass(ctypes.Structure):
    """struct tf_pass_arguments."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tokens", "labels", "query_scale", "order", "ab", "positions", "slots")),
        *((name, ctypes.c_void_p) for name in ("z", "x", "log_det", "guidance")),
        *((name, ctypes.c_int64) for name in ("rows", "window", "position")),
        *((name, ctypes.c_int32) for name in ("guided", "split", "guided_parts", "annealed")),
    ]


class Following(NamedTuple):
    """The tokens that follow those of a pass, to be found as `tf_invert` finds them, with the same bits.

    z: as `tokens`, float32: the noise of each.  strength: (rows of tokens,) float32 weights of guidance, or None.
    guided_parts: bit p for part p of the parameters.  annealed: whether guidance grows over the tokens.
    """

    z: Tensor
    strength: Tensor | None = None
    guided_parts: int = 0
    annealed: bool = False


def run_pass(
    plan: Plan,
    workspace: Workspace,
    tokens: Tensor,
    position: int | Tensor,
    *,
    labels: Tensor | None = None,
    query_scale: Tensor | None = None,
    guided: bool = False,
    order: Tensor | None = None,
    split: str = "auto",
    slots: Tensor | None = None,
    following: Following | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """One pass of the net over W tokens a row, from `position` on in net order; their keys and values go to the cache.

    The cache must hold the tokens before `position`; a later pass may overwrite these. How tokens are cut into passes
    does not change a bit of the result.

    Args:
        tokens: (R, W, D) float32, or with guided (R / 2, W, D), each row for two rows of the pass.
        position: of the first token of all rows, or (rows of tokens,) int64, of each.
        labels: int64, one for each row of `tokens`, negative for none; None: no labels.
        query_scale: (R,) float32, 1 over the temperature of the row's attention; None for 1.
        order: (T,) int32, the row of pos_embed of each token of net order, all tokens of the block; None: as they are.
        slots: (rows of tokens,) int64, ascending: the row of the cache in which each row is kept; None: in their order.
        following: find the tokens that follow as well.

    Returns:
        (R, W, 2D) float32, a then b (volume preserving: (R, W, D), b alone); with `following` a triple of that, the
        tokens as z, and of each log |dx/dz| (rows of tokens, W), float64. With `following` and guided, every second
        row, from the first on, holds guided parameters.

    Raises:
        ValueError: sizes, labels or order do not fit the plan or the workspace.
    """
    T = plan.sizes.tokens
    if order is not None and (order.shape != (T,) or order.dtype != torch.int32 or order.device.type != "cpu"):
        got = f"{tuple(order.shape)} of {order.dtype} on {order.device}"
        raise ValueError(f"run_pass: order must be ({T},) of torch.int32 on cpu, got {got}")
    share = 2 if guided else 1
    R, W, D = tokens.size(0) * share, tokens.size(1), tokens.size(2)
    own = isinstance(position, Tensor)
    z, strength, guided_parts, annealed = following or (None, None, 0, False)
    if z is not None and (z.shape != tokens.shape or z.dtype != tokens.dtype or (strength is None) == guided):
        raise ValueError("run_pass: following must hold noise like tokens, and a strength where the pass is guided")
    inputs = [None if tensor is None else tensor.contiguous() for tensor in (tokens, labels, query_scale, order)]
    ab = tokens.new_empty(R, W, D * TRANSFORM_PARTS[plan.sizes.transform])
    x = None if z is None else torch.empty_like(tokens, memory_format=torch.contiguous_format)
    log_det = None if z is None else tokens.new_empty(tokens.shape[:2], dtype=torch.float64)
    places = [None if each is None else each.contiguous() for each in (position if own else None, slots)]
    for name, each in zip(("position", "slots"), places, strict=True):
        if each is not None and (each.shape != tokens.shape[:1] or each.dtype != torch.int64):
            got = f"{tuple(each.shape)} of {each.dtype}"
            raise ValueError(f"run_pass: {name} must be ({len(tokens)},) of torch.int64, got {got}")
    z, strength = (None if each is None else each.contiguous() for each in (z, strength))
    pointers = [native.pointer(tensor) for tensor in (*inputs, ab, *places, z, x, log_det, strength)]
    arguments = _Pass(*pointers, R, W, 0 if own else position, guided, SPLITS[split], guided_parts, annealed)
    status = plan.library.tf_pass(plan.handle, workspace.handle, ctypes.byref(arguments), native.threads())
    if status == BAD_SIZE and order is not None and not 0 <= int(order.min()) <= int(order.max()) < T:
        raise ValueError(
            f"run_pass: order must hold places from 0 to {T - 1}, got {int(order.min())} to {int(order.max())}"
        )
    if status == BAD_SIZE:
        where = position.tolist() if own else position
        raise ValueError(
            f"run_pass: {R} rows of {W} tokens from {where} on do not fit a workspace of {workspace.rows} rows of "
            f"{workspace.window} and {T} tokens, or plan and workspace are of different sizes"
        )
    if status == BAD_LABEL:
        raise ValueError(f"run_pass: labels must be below {plan.sizes.classes}")
    native.check(status, "run_pass")
    return ab if following is None else (ab, x, log_det)
