"""Passes of the native engine for the solver by windows: each row at a position of its own."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tarflow_fast import native
from tarflow_fast.engines.cpu_native import (
    BAD_LABEL,
    BAD_SIZE,
    SECONDS,
    SPLITS,
    Following,
    InversionArguments,
    Plan,
    Workspace,
    run_pass,
)
from tarflow_fast.transforms import Bijection, Guidance

__all__ = ["CpuSteps", "WindowsDone"]

CALL_TOKENS = 512  # of all rows in a native call


class _Windows(ctypes.Structure):
    """struct tf_windows."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rows", "accepted", "residual")),
        *((name, ctypes.c_int64) for name in ("window", "call_tokens")),
        ("tolerance", ctypes.c_float),
        ("drafted", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("passes", "single", "work", "solved", "width", "next")),
    ]


class WindowsDone(NamedTuple):
    """What a solution by windows took: the fields of `BlockReport` (solvers/report.py)."""

    passes: int
    single: int
    work: int
    accepted: Tensor
    fallbacks: Tensor
    residual: Tensor


class CpuSteps:
    """The net of one block on windows of some rows, and the tokens that follow: with the bits of tokens one by one.

    Args:
        plan, workspace: packed weights; cache and activations for all B rows.
        y: (B,) int64 labels, negative for none; or None.
        call_tokens: tokens of all rows that one native call of `solve` may take; it cuts larger passes.
    """

    own_positions = True

    def __init__(
        self,
        plan: Plan,
        workspace: Workspace,
        bijection: Bijection,
        y: Tensor | None,
        B: int,
        guidance: Guidance,
        call_tokens: int = CALL_TOKENS,
    ) -> None:
        self._plan, self._workspace, self._guidance = plan, workspace, guidance
        self._call_tokens = call_tokens
        order = bijection.order
        self._order = None if order.identity else order.index(torch.device("cpu"), torch.int32)
        self._labels = None if y is None else y.to(torch.int64, copy=True)  # another thread may write the caller's
        tempered = guidance.active and guidance.attn_temp != 1
        # read by the library as float32 on the host, whatever the process's default dtype and device are
        plain = {"dtype": torch.float32, "device": "cpu"}
        self._scale = torch.tensor([1.0, 1.0 / guidance.attn_temp], **plain).repeat(B) if tempered else None
        self._strength = torch.full((B,), guidance.weight, **plain) if guidance.active else None
        self._guided_parts = sum((part in guidance.what) << k for k, part in enumerate(bijection.transform.parts))

    def step(self, tokens: Tensor, z: Tensor, begin: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A pass over W tokens of the rows `rows` (b,), ascending, from the places `begin` (b,) on.

        tokens, z: (b, W, D) float32 in the order of the net, z of the token after each. The cache must hold the tokens
        before `begin` of each row; a later pass may overwrite these.

        Returns x (b, W, D), the tokens after each; log |dx/dz| (b, W), float64; and the parameters (b, W, P D), guided.
        """
        active, b = self._guidance.active, len(tokens)
        following = Following(
            z, self._strength[:b] if active else None, self._guided_parts, active and self._guidance.annealed
        )
        parameters, x, log_det = run_pass(
            self._plan, self._workspace, tokens, begin, labels=None if self._labels is None else self._labels[rows],
            query_scale=None if self._scale is None else self._scale[: 2 * b], guided=active, order=self._order,
            slots=rows, following=following,
        )  # fmt: skip
        return x, log_det, parameters[0::2] if active else parameters

    def solve(
        self,
        z: Tensor,
        window: int,
        tolerance: float,
        on_tokens: Callable[[int], object] | None = None,
        draft: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, WindowsDone]:
        """The inverse by windows, the whole loop in the library; as `solve_by_windows` (solvers/windows.py) has it.

        z (B, T, D), B the rows of the workspace's batch -> x (B, T, D) float32 in z's order; log |det dx/dz| (B,),
        nats, float32; and what was done. A native call returns after SECONDS, so that Ctrl-C and progress work.

        Raises:
            ValueError: z, window or labels do not fit plan and workspace.
        """
        plan, (B, T, D) = self._plan, z.shape
        if (T, D) != (plan.sizes.tokens, plan.sizes.token_size):
            expected = f"(B, {plan.sizes.tokens}, {plan.sizes.token_size})"
            raise ValueError(f"solve_by_windows: z must be {expected}, got {tuple(z.shape)}")
        z = z.detach().resolve_neg().to(torch.float32).contiguous()
        x = torch.empty_like(z) if draft is None else draft.to(torch.float32, copy=True).contiguous()
        log_det = torch.empty(B, dtype=torch.float64, device="cpu")
        rows = torch.zeros(B, 5, dtype=torch.int64, device="cpu")  # struct tf_window_row
        accepted = torch.zeros(T - 1, B, dtype=torch.int64, device="cpu")
        residual = torch.zeros(B, dtype=torch.float32, device="cpu")
        job = InversionArguments(
            *(native.pointer(each) for each in (z, x, log_det, self._labels, self._scale, self._strength, self._order)),
            None, B, self._guided_parts, self._guidance.annealed, SPLITS["auto"],
        )  # fmt: skip
        state = _Windows(
            native.pointer(rows), native.pointer(accepted), native.pointer(residual), window, self._call_tokens,
            tolerance, draft is not None,
        )  # fmt: skip
        told, run, handles = 0, plan.library.tf_invert_windows, (plan.handle, self._workspace.handle)
        while True:
            # returns every SECONDS: this loop is where Python sees Ctrl-C
            status = run(*handles, ctypes.byref(job), ctypes.byref(state), SECONDS, native.threads())
            if status == BAD_LABEL:
                raise ValueError(f"solve_by_windows: y must be below num_classes = {plan.sizes.classes}")
            if status == BAD_SIZE:
                space = f"{self._workspace.rows} rows of {self._workspace.window}"
                raise ValueError(f"solve_by_windows: {B} rows by windows of {window} do not fit a workspace of {space}")
            native.check(status, "solve_by_windows")
            if on_tokens is not None:
                on_tokens(state.solved - told)
            told = state.solved
            if told == B * (T - 1):
                break
        residual.masked_fill_(rows[:, 4] != 0, torch.nan)
        done = WindowsDone(
            state.passes, state.single, state.work, accepted[: state.passes].clone(), rows[:, 3].clone(), residual
        )
        return x, log_det.to(torch.float32), done
