"""The solver by windows: many tokens at a time, every one of them tested against its own equation.

A pass evaluates the net at the values u of W tokens of a row, and gives each token after one of them its new value

    v_{i+1} = transform^-1(z_{i+1}; net(u_0 .. u_i))             (Jacobi's iteration, in the order of the net)

Token i+1 is accepted when every earlier token is final and max over D of |v_{i+1} - u_{i+1}| <= tolerance. It keeps the
value u that was tested. The first token that is not accepted takes v: all its inputs are final, so that is its value.
The window then begins there. So every pass makes at least one more token final, and a row never takes more passes than
tokens one by one, T - 1. Each row is tested by itself, and moves on by itself where the engine allows that.

Tokens that the window has not reached yet need first values. They are guessed, or come from a draft: the solution of
the block in a cheaper precision, one token after another.

Every token x returned has |transform^-1(z_{i+1}; net(x_0 .. x_i)) - x_{i+1}| <= tolerance, but for rounding: x is the
exact inverse of a z' within tolerance * exp(-a) of z. Values are never clamped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tarflow_fast.dtypes import wide_dtype
from tarflow_fast.solvers.report import BlockReport
from tarflow_fast.solvers.sequential import Passes
from tarflow_fast.transforms import Bijection, Transform

__all__ = ["CommonSteps", "Guess", "Steps", "guess_from_last", "guess_noise", "solve_by_windows"]

Guess = Callable[[Transform, Tensor, Tensor], Tensor]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def guess_from_last(transform: Transform, z: Tensor, parameters: Tensor) -> Tensor:
    """First values of tokens with the noise z (B, n, D): as if the parameters (B, 1, P D) of the last final token were
    theirs. Measured on two trained flows, this took 2 to 13 % fewer passes than the noise itself."""
    return transform.inverse(z, parameters.expand(-1, z.size(1), -1))[0].to(z.dtype)


def guess_noise(transform: Transform, z: Tensor, parameters: Tensor) -> Tensor:
    """The noise itself."""
    return z


class Steps(Protocol):
    """Passes over windows of a batch, with the tokens that follow."""

    own_positions: bool  # whether each row may be at a place of its own, and rows may be left out

    def step(self, tokens: Tensor, z: Tensor, begin: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The net on W tokens (b, W, D) of the rows `rows` (b,), ascending, from the places `begin` (b,) on.

        z: (b, W, D), of the token after each.  Returns x (b, W, D), the tokens after each, their log |dx/dz| (b, W) and
        parameters (b, W, P D).
        """


@runtime_checkable
class SolvesByWindows(Protocol):
    """Steps that run the whole loop by themselves."""

    def solve(
        self,
        z: Tensor,
        window: int,
        tolerance: float,
        on_tokens: Callable[[int], object] | None,
        draft: Tensor | None,
    ) -> tuple[Tensor, Tensor, tuple]:
        """As `solve_by_windows`, with the fields of `BlockReport`."""


class CommonSteps:
    """Any engine's passes, whose rows are all at one place."""

    own_positions = False

    def __init__(self, passes: Passes, bijection: Bijection) -> None:
        self._passes, self._transform = passes, bijection.transform

    def step(self, tokens: Tensor, z: Tensor, begin: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parameters = self._passes.run(tokens, int(begin[0]))
        return *self._transform.inverse(z, parameters), parameters


@torch.no_grad()
def solve_by_windows(
    steps: Steps,
    bijection: Bijection,
    z: Tensor,
    window: int,
    tolerance: float,
    on_tokens: Callable[[int], object] | None = None,
    guess: Guess | None = None,
    draft: Tensor | None = None,
) -> tuple[Tensor, Tensor, BlockReport]:
    """z (B, T, D) -> x (B, T, D) in z's dtype, log |det dx/dz| (B,) at x, nats, float32 or wider, and what was done.

    Args:
        window: W, the most tokens of a row in a pass.
        tolerance: the largest residual of an accepted token. 0 accepts values of which no bit moves: then x has the
            bits of one token after another, on engines whose passes of W tokens have the bits of W passes of one.
        on_tokens: called after each pass with the number of tokens, of all rows, that it made final.
        guess: first values of tokens that enter the window; None for `guess_from_last`, which the native engine has
            in a loop of its own.
        draft: (B, T, D) first values of all tokens; None: those that enter the window are guessed.
    """
    if guess is None and isinstance(steps, SolvesByWindows):
        x, log_det, done = steps.solve(z, window, tolerance, on_tokens, draft)
        return x.to(z.dtype), log_det, BlockReport(*done)
    guess = guess or guess_from_last
    rows = _Rows(bijection, z, window, tolerance, guess, steps.own_positions, draft)
    accepted, single, work = [], 0, 0
    while (chosen := rows.next()) is not None:
        which, begin, W = chosen
        gained = rows.advance(steps, which, begin, W)
        accepted.append(gained.cpu())
        single, work = single + (W == 1), work + W * len(which)
        if on_tokens is not None:
            on_tokens(int(gained.sum()))
    none = torch.zeros(0, len(z), dtype=torch.int64)
    return (
        bijection.order.put(rows.x),
        rows.log_det(),
        BlockReport(
            len(accepted), single, work, torch.stack(accepted) if accepted else none, rows.fallbacks, rows.residuals()
        ),
    )


class _Rows:
    """The tokens of a batch on their way, in the order of the net.

    x (B, T, D) is final up to the place `final` (B,) of each row, and holds guesses after it.
    """

    def __init__(
        self,
        bijection: Bijection,
        z: Tensor,
        window: int,
        tolerance: float,
        guess: Guess,
        own_positions: bool,
        draft: Tensor | None = None,
    ) -> None:
        _, self.transform, order = bijection
        B, T, _ = z.shape
        self.z, self.window, self.tolerance, self.guess, self.own = (
            order.take(z),
            window,
            tolerance,
            guess,
            own_positions,
        )
        self.x, self.last, self.drafted = self.z.clone(), T - 1, draft is not None
        if draft is not None:
            known = draft.isfinite().all(dim=2, keepdim=True)
            self.x[:, 1:] = order.take(torch.where(known, draft.to(z), z))[:, 1:]
        self.final, self.alone, self.idle, self.fallbacks = z.new_zeros(4, B, dtype=torch.int64)
        self.lost = ~self.x[:, 0].isfinite().all(dim=1)  # rows that overflowed: all later tokens are NaN
        self.residual = z.new_zeros(B, T, dtype=wide_dtype(z))
        self.stretched: Tensor | None = None  # (B, T - 1), log |dx/dz| of each token

    def next(self) -> tuple[Tensor, Tensor, int] | None:
        """Rows, the place at which each begins, and the number of tokens of the next pass; None where all is done.

        Passes take one token while all rows are in windows that are solved one token after another; a row in such a
        window goes with the wider passes of others, where there are any. Some engines, those whose rows stay together,
        multiply the values of later tokens by zero weights; there a guess that overflows, itself or inside the net,
        spoils the pass for the tokens before it.
        """
        while (unfinished := self.final < self.last).any():
            if self.own:
                rows = unfinished.nonzero()[:, 0]
                begin = self.final[rows]
            else:
                rows = torch.arange(len(self.x), device=self.x.device)
                begin = self.final.min().expand(len(rows))
            if (begin < self.alone[rows]).all():
                return rows, begin, 1
            W = min(self.window, self.last if self.own else self.last - int(begin[0]))
            # A window that would reach past the end begins earlier, with tokens that are final.
            begin = begin.clamp(max=self.last - W)
            inputs = self.x[rows[:, None], self._places(begin, W)]
            bad = rows[~(inputs.isfinite().flatten(1).all(dim=1) | self.lost[rows])]
            if W == 1 or self.own or not len(bad):
                return rows, begin, W
            self._go_alone(bad, begin)
        return None

    def _go_alone(self, bad: Tensor, begin: Tensor) -> None:
        """Solves the next window of all rows one token after another, since rows `bad` would spoil their passes."""
        self.fallbacks[bad] += 1
        self.alone = begin + self.window

    def advance(self, steps: Steps, rows: Tensor, begin: Tensor, W: int) -> Tensor:
        """Runs a pass and takes what it gives. Returns how many tokens of each row became final, (B,)."""
        which, inputs = rows[:, None], self._places(begin, W)
        places = inputs + 1
        old, lost, end = self.final[rows], self.lost[rows], begin + W
        slow = (old < self.alone[rows])[:, None]
        u = self.x[which, places]
        v, stretched, parameters = steps.step(self.x[which, inputs], self.z[which, places], begin, rows)
        known = places <= old[:, None]
        moved = (v - u).abs().amax(dim=2)
        same = (v.view(BITS[v.itemsize]) == u.view(BITS[u.itemsize])).all(dim=2) if self.tolerance == 0 else None
        same = moved <= self.tolerance if same is None else same
        # The last one was no input of the pass. And a row that goes one by one does so in whatever company, so that its
        # result does not depend on the others.
        same = same & ~slow
        same[:, -1] = False
        kept = (known | same).long().cumprod(dim=1).bool()
        reached = torch.where(lost & ~slow[:, 0], end, torch.minimum(begin + 1 + kept.sum(dim=1), end))
        final = torch.maximum(old, reached)
        if W > 1 and not self.own:
            ends = v.gather(1, (final - begin - 1)[:, None, None].expand(-1, 1, v.size(2)))
            spoiled = (final > old) & ~lost & ~ends.isfinite().flatten(1).all(dim=1)
            if spoiled.any():
                self._go_alone(rows[spoiled], begin)
                return torch.zeros_like(self.final)
        kept &= known | ~lost[:, None]
        new = ~known & (places <= final[:, None])
        self.x[which, places] = torch.where(kept[:, :, None], u, v)
        if self.stretched is None:
            self.stretched = stretched.new_zeros(len(self.x), self.last)
        residual, sums = self.residual[which, places], self.stretched[which, inputs]
        self.residual[which, places] = torch.where(new, torch.where(kept, moved, 0).to(residual), residual)
        self.stretched[which, inputs] = torch.where(new, stretched, sums)
        self.final[rows], gained = final, torch.zeros_like(self.final)
        gained[rows] = final - old
        self.lost[rows] = lost | ~self.x[rows, final].isfinite().all(dim=1)
        self._enter(rows, begin, final, parameters, slow)
        self.idle[rows] = torch.where((old == begin) & (final == old + 1), self.idle[rows] + (~slow[:, 0] & (W > 1)), 0)
        hopeless = (self.idle >= self.window) & (self.final < self.last) & (W > 1)
        if hopeless.any():
            self.fallbacks[hopeless] += 1
            self.idle[hopeless] = 0
            self.alone = torch.where(hopeless, self.final + self.window, self.alone)
        return gained

    def _enter(self, rows: Tensor, begin: Tensor, final: Tensor, parameters: Tensor, slow: Tensor) -> None:
        """Guesses the tokens that follow a pass from `begin` on, as far as the next window may reach, and all of `slow`
        rows (b, 1), if there is no draft of them, and again those whose values overflowed."""
        W = parameters.size(1)
        latest = (final - 1 - begin).clamp(0, W - 1)[:, None, None].expand(-1, 1, parameters.size(2))
        places = self._places(begin + 1, W + self.window)
        inside = places.clamp(max=self.last)
        known = self.x[rows[:, None], inside]
        guesses = self.guess(self.transform, self.z[rows[:, None], inside], parameters.gather(1, latest))
        entering = (torch.arange(W + self.window, device=places.device) >= W) | slow
        again = ~known.isfinite().all(dim=2)
        fresh = (places <= self.last) & (places > final[:, None]) & (again if self.drafted else again | entering)
        self.x[rows[fresh.nonzero()[:, 0]], places[fresh]] = guesses[fresh]

    @staticmethod
    def _places(begin: Tensor, n: int) -> Tensor:
        return begin[:, None] + torch.arange(n, device=begin.device)

    def log_det(self) -> Tensor:
        """(B,), added in the order in which the sequential solvers add."""
        total = (
            self.residual.new_zeros(len(self.x)) if self.stretched is None else self.stretched.new_zeros(len(self.x))
        )
        for i in range(self.last if self.stretched is not None else 0):
            total = total + self.stretched[:, i]
        return total.to(self.residual.dtype)

    def residuals(self) -> Tensor:
        """(B,): the largest residual of each row, NaN for one that overflowed."""
        return self.residual.amax(dim=1).masked_fill(self.lost, torch.nan)
