"""Solvers: in which order the tokens of a flow block are found, on whichever engine runs the passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tarflow_fast.engines.call import Call, torch_precision
from tarflow_fast.engines.cpu import CpuPasses
from tarflow_fast.engines.table import Path, find_path, open_passes
from tarflow_fast.ops.registry import under_transform
from tarflow_fast.solvers.plan import SEQUENTIAL, Way
from tarflow_fast.solvers.report import BlockReport, Report, Solving
from tarflow_fast.solvers.sequential import Passes, solve_sequentially
from tarflow_fast.solvers.windows import CommonSteps, solve_by_windows
from tarflow_fast.transforms import Bijection, Guidance

__all__ = ["BlockReport", "Report", "Solving", "invert", "invert_all"]

OnToken = Callable[[], None] | None


def invert(
    bijection: Bijection,
    z: Tensor,
    y: Tensor | None,
    guidance: Guidance,
    call: Call,
    on_token: OnToken = None,
    path: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """The inverse of a flow block at z.

    Args:
        bijection: net, transform and order of the block.
        z: (B, T, D) noise, never written.
        y: (B,) int64 labels, negative for none; or None.
        guidance: weight, what it acts on, temperature, annealing.
        call: backend, precision and memory of the call this block is part of.
        on_token: called once for every token solved.
        path: what `find_path` gave, if that was asked already.

    Returns:
        x: (B, T, D) in z's dtype. log_det: (B,) nats, log |det dx/dz|, float32 (float64 for a float64 block).

    Raises:
        RuntimeError: a backend or a precision asked for by name cannot run; the reason is named.
        ValueError: z or y of the wrong shape, y of the wrong dtype or device; weights that are not finite, labels not
            below num_classes (native engine), sizes that overflow.
        MemoryError: one row alone needs more than the memory limit.
    """
    passes, solving = open_passes(bijection, z, y, guidance, call, path), call.solving
    if solving is not None:
        way = _way_for(solving, passes, bijection, z, guidance, call)
        if way.window:
            draft = None
            if way.draft is not None:
                draft = open_passes(bijection, z, y, guidance, call.at(way.draft)).solve(z)[0]
            return _invert_by_windows(passes, bijection, z, way.window, draft, solving, call, on_token)
        solving.add(call.number_of(bijection.net), BlockReport.sequential(*z.shape[:2]))
    if passes.solve is not None:
        return passes.solve(z, on_token)
    return solve_sequentially(passes, bijection, z, on_token)


def _way_for(solving: Solving, passes: Passes, bijection: Bijection, z: Tensor, guidance: Guidance, call: Call) -> Way:
    """A plan is for the native engine, and so are drafts.

    Raises:
        RuntimeError: a draft was asked for, and another engine takes the block.
    """
    native = isinstance(passes, CpuPasses)
    if solving.solver == "auto" and not native:
        return SEQUENTIAL
    precision = call.precision or torch_precision(bijection.net, z)
    way = solving.way_for(call.number_of(bijection.net), len(z), precision, guidance.weight)
    if way.draft is not None and not native:
        raise RuntimeError(f"{call.where}: draft={way.draft!r} needs the native CPU engine, which does not take "
                           f"{call.name_of(bijection.net)} here")  # fmt: skip
    return way


def _invert_by_windows(
    passes: Passes,
    bijection: Bijection,
    z: Tensor,
    window: int,
    draft: Tensor | None,
    solving: Solving,
    call: Call,
    on_token: OnToken,
) -> tuple[Tensor, Tensor]:
    # Engines with a loop of their own take float32 tokens, and as many rows together as fit their memory.
    tokens = z if passes.solve is None else z.float()
    B, window = z.size(0), max(1, min(window, z.size(1) - 1))
    grouped = B > 0 and hasattr(passes, "steps")
    together = passes.rows_for(B, window) if grouped else max(B, 1)
    x, log_dets, tell = torch.empty_like(z), [], _ticks(on_token, B)
    for begin in range(0, max(B, 1), together):
        rows = slice(begin, min(begin + together, B))
        count = rows.stop - rows.start
        steps = passes.steps(rows, count, window) if grouped else CommonSteps(passes, bijection)
        found, log_det, report = solve_by_windows(
            steps, bijection, tokens[rows], window, solving.tolerance, tell,
            draft=None if draft is None else draft[rows],
        )  # fmt: skip
        x[rows] = found.to(z.dtype)
        log_dets.append(log_det)
        solving.add(call.number_of(bijection.net), report)
    return x, torch.cat(log_dets)


def _ticks(on_token: OnToken, B: int) -> Callable[[int], None] | None:
    """What to tell of tokens of any row, so that on_token is called once for B of them."""
    if on_token is None:
        return None
    rest = 0

    def tell(count: int) -> None:
        nonlocal rest
        rest += count
        for _ in range(rest // B):
            on_token()
        rest %= B

    return tell


def invert_all(
    bijections: Sequence[Bijection],
    z: Tensor,
    y: Tensor | None,
    guidance: Guidance,
    call: Call,
    on_token: OnToken = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`invert` through all blocks of a model, the last first: yields x and log_det after each.

    All blocks are looked at before the first is inverted. Between inversions, which leave none of Python's code in the
    caches, the looks took longer: four blocks of four layers of C 128, one row, 3.6 ms a call; now 3.2 ms. Once a
    block's own modules have run, with whatever hooks they have, the rest is looked at again.
    """
    backwards = bijections[::-1]
    paths: list[Path | None] = [find_path(bijection, z, call) for bijection in backwards]
    recomputed = call.differentiable and torch.is_grad_enabled() and len(backwards) > 1 and not under_transform()
    for number, bijection in enumerate(backwards):
        if recomputed:
            z, log_det = _invert_again_in_backward(bijection, z, y, guidance, call, on_token)
        else:
            z, log_det = invert(bijection, z, y, guidance, call, on_token, paths[number])
        yield z, log_det
        if paths[number] is None or paths[number].engine == "torch":
            paths = [None] * len(paths)


def _invert_again_in_backward(
    bijection: Bijection, z: Tensor, y: Tensor | None, guidance: Guidance, call: Call, on_token: OnToken
) -> tuple[Tensor, Tensor]:
    """`invert` that keeps only z for autograd, and inverts once more in the backward pass.

    The graph of one block grows with T^2. So a model keeps that of one block at a time and not of all K; a step takes a
    third longer, since every block is inverted twice and differentiated once.
    """
    runs = 0

    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal runs
        runs += 1
        # Its own call: the user's is over when the backward pass comes. Tokens are told of in the first run alone.
        with Call(call.backend, call.precision, True, call.memory_limit, call.nets, where=call.where) as own:
            own.told = True
            return invert(bijection, z, y, guidance, own, on_token if runs == 1 else None)

    # With the states of the generators kept, modules that draw (dropout, noise in a hook) draw the same twice.
    return checkpoint(run, z, use_reentrant=False, preserve_rng_state=True)
