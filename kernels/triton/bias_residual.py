"""Triton kernels of bias + residual; formulas in tarflow_fast/ops/bias_residual.py."""

import triton
import triton.language as tl
from tarflow_fast.kernels.triton.columns import chunks, column_sums, partial_sums, tiles
from tarflow_fast.kernels.triton.device import on


@triton.jit
def forward_kernel(
    # in: (rows, N), (N,) and (rows, N); out: (rows, N)
    x_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    # sizes
    rows,
    N: tl.constexpr,
    # tiles, and the type that everything is computed in
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    across: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at, inside = row * N + column, (row < rows) & (column < N)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    x += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(COMPUTE)
    out = tl.load(residual_ptr + at, mask=inside, other=0.0).to(COMPUTE) + x
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    # in: (rows, N)
    dout_ptr,
    # out: (rows, N), if INPUT, and the sums over each chunk of rows, if BIAS
    dx_ptr,
    partial_ptr,
    # sizes; steps: tiles that a program walks over
    rows,
    steps,
    N: tl.constexpr,
    INPUT: tl.constexpr,
    BIAS: tl.constexpr,
    # tiles, and the type that everything is computed in
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    across: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    chunk = (tl.program_id(0) // across).to(tl.int64)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    if BIAS:
        dbias = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for step in range(0, steps):
        row = (chunk * steps + step) * ROWS + tl.arange(0, ROWS)[:, None]
        at, inside = row * N + column[None, :], (row < rows) & (column < N)[None, :]
        g = tl.load(dout_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        if BIAS:
            dbias += g
        if INPUT:
            tl.store(dx_ptr + at, g.to(dx_ptr.dtype.element_ty), mask=inside)
    if BIAS:
        tl.store(partial_ptr + chunk * N + column, tl.sum(dbias, 0), mask=column < N)


def bias_residual_forward(x, bias, residual, out):
    """Fills out. x, residual and out are of one shape; bias: (N,). All are contiguous and on one device."""
    rows, across, settings = tiles(residual)
    if rows == 0:
        return
    with on(x.device):
        forward_kernel[(triton.cdiv(rows, settings["ROWS"]) * across,)](x, bias, residual, out, rows, **settings)


def bias_residual_backward(dout, dx=None, dbias=None):
    """Fills those of dx and dbias that are given, in one pass over dout. All are contiguous and on one device."""
    rows, across, settings = tiles(dout)
    if rows == 0:
        if dbias is not None:
            dbias.zero_()
        return
    down, steps = chunks(rows=rows, tile_rows=settings["ROWS"], across=across)
    partial = partial_sums(down if dbias is not None else 0, dout)
    given = {"INPUT": dx is not None, "BIAS": dbias is not None}
    with on(dout.device):
        backward_kernel[(down * across,)](
            dout, partial if dx is None else dx, partial, rows, steps, **given, **settings
        )
        if dbias is not None:
            column_sums(partial, dbias)
