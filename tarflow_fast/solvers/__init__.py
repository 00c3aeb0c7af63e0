"""Solvers: in which order the tokens of a flow block are found, on whichever engine runs the passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tarflow_fast.engines.call import Call
from tarflow_fast.engines.table import Path, find_path, open_passes
from tarflow_fast.ops.registry import under_transform
from tarflow_fast.solvers.sequential import solve_sequentially
from tarflow_fast.transforms import Bijection, Guidance

__all__ = ["invert", "invert_all"]

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
    passes = open_passes(bijection, z, y, guidance, call, path)
    if passes.solve is not None:
        return passes.solve(z, on_token)
    return solve_sequentially(passes, bijection, z, on_token)


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

    return checkpoint(run, z, use_reentrant=False, preserve_rng_state=False)
