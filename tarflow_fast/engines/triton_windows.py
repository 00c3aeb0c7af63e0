"""The inverse by windows on the GPU: acceptance on the device, and a host that learns of it one pass late.

    net on W tokens a row -> proj_out, guidance, affine -> acceptance (kernels/triton/accept.py)

is one CUDA graph. Each row has a place of its own, in device memory. All that the host decides is whether to replay the
graph once more. After each pass the number of tokens that are left goes to pinned memory, and an event follows it. The
host asks for the event of pass n when pass n + 1 is enqueued already. So the device has always work, and the last pass
of a block changes nothing.

A row that goes one token after another, because its windows gained nothing, does so in passes over W tokens as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from tarflow_fast.engines.triton_graph import GraphWorkspace
from tarflow_fast.engines.weights import Weights
from tarflow_fast.kernels.triton.device import on
from tarflow_fast.transforms import Bijection, Guidance

__all__ = ["LateCount", "Mail", "TritonSteps", "WindowWorkspace", "passes_until_none_is_left"]

SPINS, PAUSE = 100, 2e-5  # questions in a row, then seconds between two; a pass takes 1e-4 s and more


class WindowWorkspace(GraphWorkspace):
    """Memory and graph of the passes over windows, for blocks of one shape.

    Args:
        weights, B, guided, dtype, capture, batch, device: of `GraphWorkspace`.
        window: W, tokens a pass, 1 to T - 1.
        tolerance: the largest residual of an accepted token; 0 accepts tokens of which no bit moved.
    """

    apart = True

    def __init__(
        self,
        weights: Weights,
        B: int,
        guided: bool,
        dtype: torch.dtype,
        window: int,
        tolerance: float,
        capture: bool = True,
        batch: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(weights, B, guided, dtype, window, capture, batch, device)
        self.key = (*self.key, window, tolerance)
        self.tolerance, (_, T, D) = tolerance, self.x.shape

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.x.device)

        self.values = zeros(B, self.W, D)
        self.parameters = zeros(B, self.W, len(self.weights["proj_out.weight"]))
        self.state, self.history = zeros(6, B, dtype=torch.int32), zeros(T - 1, B, dtype=torch.int32)
        self.residual, self.left = zeros(B), zeros(1, dtype=torch.int32)

    @torch.no_grad()
    def load_rows(self, bijection: Bijection, z: Tensor, y: Tensor | None, guidance: Guidance) -> None:
        """z (b, T, D) with b <= B; places without a row count as done."""
        rows, last = len(z), self.T - 1
        if rows < self.B:
            again = torch.arange(self.B, device=z.device).clamp(max=rows - 1)
            z, y = z[again], None if y is None else y[again]
        super().load_rows(bijection, z, y, guidance)
        for tensor in (self.state, self.history, self.residual):
            tensor.zero_()
        self.state[0, rows:] = last
        self.state[4] = ~self.x[:, bijection.order.places[0]].isfinite().all(dim=1)
        self.left.fill_(rows * last)

    def step(self) -> None:
        """Launch one pass, acceptance included."""
        from tarflow_fast.kernels.triton.accept import accept

        self.net()
        self.tail(values=self.values, parameters=self.parameters)
        accept(
            v=self.values, parameters=self.parameters, z=self.z, x=self.x, order=self.order, state=self.state,
            starts=self.starts, residual=self.residual, history=self.history, left=self.left,
            tolerance=self.tolerance, last=self.T - 1,
        )  # fmt: skip


class Mail(Protocol):
    """How the host learns, after a while, what a pass has left."""

    def send(self, number: int) -> None:
        """Enqueues, after pass `number`, a copy of the number of tokens that are left."""

    def read(self, number: int) -> int:
        """What pass `number` left; waits until that has arrived. Asked once, before pass number + 2 is sent."""


class LateCount:
    """`Mail` through two numbers in pinned memory: one is on its way while the other is read.

    It asks for the event again and again and never waits inside the driver, so that Ctrl-C works.

    left: (1,) int32, on the GPU; or on the CPU, where every copy has arrived at once.
    """

    def __init__(self, left: Tensor) -> None:
        self._left, cuda = left, left.is_cuda
        self._slots = torch.zeros(2, dtype=torch.int32, pin_memory=cuda)
        self._events = [torch.cuda.Event(), torch.cuda.Event()] if cuda else None

    def send(self, number: int) -> None:
        with on(self._left.device):
            self._slots[number % 2].copy_(self._left[0], non_blocking=True)
            if self._events is not None:
                self._events[number % 2].record()

    def read(self, number: int) -> int:
        asked = 0
        while self._events is not None and not self._events[number % 2].query():
            asked += 1
            time.sleep(PAUSE if asked > SPINS else 0)
        return int(self._slots[number % 2])


def passes_until_none_is_left(
    run: Callable[[], object], mail: Mail, most: int, left: int, on_tokens: Callable[[int], object] | None
) -> int:
    """Runs passes until the host has read that no token is left. Returns how many passes made a token final.

    Args:
        run: enqueues a pass.
        most: as many passes are always enough.
        left: tokens that are not final before the first pass.
        on_tokens: called with the number of tokens that a pass made final, once the host has read of it.
    """

    def learn(number: int) -> int:
        now = mail.read(number)
        if on_tokens is not None:
            on_tokens(left - now)
        return now

    for number in range(most):
        run()
        mail.send(number)
        if number and (left := learn(number - 1)) == 0:
            return number
    if most and (left := learn(most - 1)) > 0:
        raise RuntimeError(f"block_inverse: {left} tokens are left after {most} passes over windows")
    return most


class TritonSteps:
    """The passes over windows of some rows of the batch: the whole loop."""

    own_positions = True

    def __init__(
        self, workspace: WindowWorkspace | None, bijection: Bijection, y: Tensor | None, guidance: Guidance
    ) -> None:
        self._workspace, self._bijection, self._y, self._guidance = workspace, bijection, y, guidance

    @torch.no_grad()
    def solve(
        self,
        z: Tensor,
        window: int,
        tolerance: float,
        on_tokens: Callable[[int], object] | None,
        draft: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, tuple]:
        """z (b, T, D) -> x (b, T, D) float32, log |det dx/dz| (b,) float32, and the fields of `BlockReport`, whose
        tensors stay on z's device.

        Raises:
            ValueError: window or tolerance are not those that the workspace was made for; a draft.
            RuntimeError: the current stream is being captured.
        """
        if draft is not None:
            raise ValueError("solve: draft must be None on the GPU path")
        (B, T, _), space = z.shape, self._workspace
        none = torch.zeros(0, B, dtype=torch.int64, device=z.device)
        if space is None:  # one token, which is its own noise
            still = torch.zeros(B, device=z.device)
            return z.float(), still, (0, 0, 0, none, still.long(), still.clone())
        if (window, tolerance) != space.key[-2:]:
            raise ValueError(
                f"solve: window and tolerance must be {space.key[-2:]}, as prepared, got {(window, tolerance)}"
            )
        if z.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "block_inverse: solver 'windows' asks the GPU whether it is done, so it cannot be captured in a CUDA "
                "graph; solver 'sequential' can"
            )
        with torch.autocast(z.device.type, enabled=False):
            space.load_rows(self._bijection, z, self._y, self._guidance)
            again = space.graph.replay if space.graph is not None else space.step
            passes = passes_until_none_is_left(again, LateCount(space.left), T - 1, B * (T - 1), on_tokens)
            # float64: a sum of T D terms whose parts are float32
            log_det = space.sums.sum(dim=(0, 2), dtype=torch.float64).float()[:B]
        residual = space.residual.masked_fill(space.state[4] != 0, torch.nan)[:B]
        done = (
            passes, passes if space.W == 1 else 0, passes * B * space.W,
            space.history[:passes, :B].long(), space.state[3, :B].long(), residual,
        )  # fmt: skip
        return space.x[:B].clone(), log_det, done
