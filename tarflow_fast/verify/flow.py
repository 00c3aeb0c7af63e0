"""Does a user's flow invert itself in the arithmetic it runs in? Round trips, log-determinants, and what amplifies."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from tarflow_fast.engines.call import PRECISIONS, torch_precision
from tarflow_fast.flow import TokenFlow
from tarflow_fast.validate import check_labels, check_positive_int, seeded
from tarflow_fast.verify.amplification import Amplification
from tarflow_fast.verify.jacobian import Autograd, against_autograd
from tarflow_fast.verify.judge import Judge
from tarflow_fast.verify.report import FlowReport
from tarflow_fast.verify.stages import finite_rows, forward_stages, inverse_stages
from tarflow_fast.verify.trip import Trip, measure_trip

__all__ = ["verify_flow"]

# Half a step between neighbouring numbers near 1. int8 holds weights alone: half a step is 1/254 of the largest weight
# of a channel, which is about four times as large as a typical one.
_ROUNDOFF = {"fp64": 2.0**-53, "fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 2.0**-6}
_VALUES = 12  # a token and channel, alive at once in a layer's forward pass: the MLP's width twice, and the stream
_JACOBIAN_DIMS = 512  # T D up to which there is a Jacobian: one row costs 3 T D forward passes


@torch.no_grad()
def verify_flow(
    flow: TokenFlow,
    x: Tensor | None = None,
    y: Tensor | int | None = None,
    *,
    n: int | None = None,
    seed: int = 0,
    precision: str | None = None,
    directions: int = 2,
    jacobian_rows: int | None = None,
    batch_size: int | None = None,
) -> FlowReport:
    """Measure how well a flow inverts itself on data and on noise, and hold the errors to limits derived from it.

    The limit of a round trip is m (u + v) R, and at most sqrt(2 max(u, v)) times the largest number of the rows, which
    is half of its digits: m = 4 L + 4 roundings follow one another in a block of L layers, u and v are the unit
    roundoffs of forward and inverse, and R is the flow's reach, measured by moving the tokens between all blocks at
    random (see `Amplification`). Log-determinants have a reach of their own, plus the sum of abs(a). A fault of the
    code exceeds the first limit; a flow whose inverse explodes (arXiv 2006.09347) exceeds the second, or overflows.

    Args:
        flow: a `TokenFlow` or `TarFlow` in any dtype and on any device. Nothing of it is changed.
        x: data as the flow's `forward` takes it, all finite; None: samples of the flow itself.
        y: labels of the rows as `forward` takes them; the noise gets the same ones.
        n: rows where x is None (256). Where x is given there is as much noise as data.
        seed: of the noise, which is that of `sample`, and of the directions.
        precision: of the inverse, as in `inverse`.
        directions: random directions a row in which the stretch of a block is measured.
        jacobian_rows: rows whose Jacobian is computed in float64 where T D <= 512; 0: none; None: 4 up to T D = 64,
            fewer above, and at least one.
        batch_size: rows computed together; None: 64, or fewer where they would take more than a GiB. The random
            directions depend on it, and nothing else.

    Returns:
        The figures. `report.ok` is the verdict; `report.table()` and `report.json()` show them.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range; x not finite.
        RuntimeError: a backend or precision asked for by name cannot run.
    """
    where = "verify_flow"
    if not isinstance(flow, TokenFlow):
        raise TypeError(f"{where}: flow must be a TokenFlow or a TarFlow, got {type(flow).__name__}")
    if others := [str(block.transform) for block in flow.blocks if block.transform.name not in ("affine", "shift")]:
        raise ValueError(f"{where}: flow must have the transform affine or shift, got {others[0]}: no limit is derived")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"{where}: precision must be None or one of {', '.join(PRECISIONS)}, got {precision!r}")
    directions = check_positive_int(where, "directions", directions)
    T, D = flow.var.shape
    if batch_size is None:
        row_bytes = (directions + 2) * T * flow.channels * _VALUES * 4
        batch_size = max(1, min(64, 2**30 // row_bytes))
    batch_size = check_positive_int(where, "batch_size", batch_size)
    wanted = min(4, max(1, 256 // (T * D))) if jacobian_rows is None else jacobian_rows
    wanted = check_positive_int(where, "jacobian_rows", wanted, 0)
    generator = seeded(where, seed)
    given, y, n = _check_rows(where, flow, x, y, n)
    noise = torch.randn(n, T, D, generator=generator, dtype=torch.float32, device="cpu").to(flow.var)
    ruler = flow if flow.var.dtype in (torch.float32, torch.float64) else copy.deepcopy(flow).float()
    reach, data, samples, gradients = Amplification(ruler, directions, generator), [], [], []
    for start in range(0, n, batch_size):
        rows = slice(start, start + batch_size)
        labels = None if y is None else y[rows]
        back = inverse_stages(flow, noise[rows] * flow.var.sqrt(), labels, precision)
        there = forward_stages(flow, back.tokens[0], labels)
        samples.append(measure_trip(flow, there, back, labels, from_x=False))
        sets = [back.tokens[0]]
        if given is not None:
            sets.append(given[rows])
            there = forward_stages(flow, given[rows], labels)
        back = inverse_stages(flow, there.tokens[-1], labels, precision)
        data.append(measure_trip(flow, there, back, labels, from_x=True))
        with torch.autocast(flow.var.device.type, enabled=False):
            for tokens in sets:
                reach.measure(tokens.to(ruler.var), labels)
            if T * D <= _JACOBIAN_DIMS and (missing := wanted - sum(len(part.off) for part in gradients)):
                gradients.append(against_autograd(flow, there, labels, missing))
    computed = "fp64" if flow.var.dtype == torch.float64 else torch_precision(flow.blocks[0], noise)
    stored = torch.finfo(flow.var.dtype).eps / 2  # of the tokens between blocks, whatever the precision within
    autograd = Autograd(*map(torch.cat, zip(*gradients, strict=True))) if gradients else None
    why = "no row is finite" if gradients else "jacobian_rows is 0"
    if T * D > _JACOBIAN_DIMS:
        why = f"T D = {T * D} is more than {_JACOBIAN_DIMS}"
    return Judge(
        facts={
            "flow": type(flow).__name__, "blocks": len(flow.blocks), "tokens": T, "token_size": D, "rows": n,
            "x": "samples of the flow" if x is None else "given", "dtype": str(flow.var.dtype).removeprefix("torch."),
            "precision": precision or computed, "device": str(flow.var.device), "seed": seed,
            "directions": directions, "batch_size": batch_size,
        },
        m=4 * max(len(block.attn_blocks) for block in flow.blocks) + 4, u=_ROUNDOFF[computed],
        v=max(stored, _ROUNDOFF[precision or computed]), reach=reach, data=Trip.joined(data),
        noise=Trip.joined(samples), autograd=autograd if autograd and len(autograd.off) else None, why=why,
        scaled=any("a" in block.transform.parts for block in flow.blocks),
    ).report()  # fmt: skip


def _check_rows(
    where: str, flow: TokenFlow, x: Tensor | None, y: Tensor | int | None, n: int | None
) -> tuple[Tensor | None, Tensor | None, int]:
    """Tokens of x, labels, and how many rows there are of each."""
    if x is None:
        n = 256 if n is None else check_positive_int(where, "n", n)
        return None, check_labels(where, y, n, flow.num_classes, flow.var), n
    y = flow._check_input(where, x, y)
    if len(x) == 0:
        raise ValueError(f"{where}: x must hold at least one row, got 0")
    if n is not None and check_positive_int(where, "n", n) != len(x):
        raise ValueError(f"{where}: n must be left out where x is given, or be its {len(x)} rows, got {n}")
    tokens = flow._to_tokens(x.detach())
    bad = ~finite_rows(tokens)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"{where}: x must be finite, got {int(bad.sum())} rows that are not, first row {first}")
    return tokens, y, len(x)
