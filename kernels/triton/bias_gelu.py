"""Triton kernels of bias + GELU; formulas in tarflow_fast/ops/bias_gelu.py."""

import triton
import triton.language as tl
from tarflow_fast.kernels.triton.columns import chunks, column_sums, partial_sums, tiles
from tarflow_fast.kernels.triton.device import on

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi), the normal density at 0


@triton.jit
def forward_kernel(
    # in: (rows, N) and (N,); out: (rows, N)
    x_ptr,
    bias_ptr,
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
    u = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    u += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(COMPUTE)
    out = 0.5 * u * (1 + tl.math.erf(u * SQRT_HALF))
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    # in: (rows, N) twice and (N,)
    dout_ptr,
    x_ptr,
    bias_ptr,
    # out: (rows, N), and the sums over each chunk of rows, if BIAS
    dx_ptr,
    partial_ptr,
    # sizes; steps: tiles that a program walks over
    rows,
    steps,
    N: tl.constexpr,
    BIAS: tl.constexpr,
    # tiles, and the type that everything is computed in
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    across: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    chunk = (tl.program_id(0) // across).to(tl.int64)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(bias_ptr + column, mask=column < N, other=0.0).to(COMPUTE)[None, :]
    if BIAS:
        dbias = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for step in range(0, steps):
        row = (chunk * steps + step) * ROWS + tl.arange(0, ROWS)[:, None]
        at, inside = row * N + column[None, :], (row < rows) & (column < N)[None, :]
        u = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE) + bias
        g = tl.load(dout_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        g *= 0.5 * (1 + tl.math.erf(u * SQRT_HALF)) + u * (DENSITY * tl.exp(-0.5 * u * u))
        if BIAS:
            dbias += tl.where(inside, g, 0.0)
        tl.store(dx_ptr + at, g.to(dx_ptr.dtype.element_ty), mask=inside)
    if BIAS:
        tl.store(partial_ptr + chunk * N + column, tl.sum(dbias, 0), mask=column < N)


def bias_gelu_forward(x, bias, out):
    """Fills out, of the shape of x. bias: (N,). All are contiguous and on one device."""
    rows, across, settings = tiles(x)
    if rows == 0:
        return
    with on(x.device):
        forward_kernel[(triton.cdiv(rows, settings["ROWS"]) * across,)](x, bias, out, rows, **settings)


def bias_gelu_backward(dout, x, bias, dx, dbias=None):
    """Fills dx, of the shape of x, and dbias (N,) where it is given. All are contiguous and on one device."""
    rows, across, settings = tiles(x)
    if rows == 0:
        if dbias is not None:
            dbias.zero_()
        return
    down, steps = chunks(rows=rows, tile_rows=settings["ROWS"], across=across)
    if dbias is None:
        down, steps = triton.cdiv(rows, settings["ROWS"]), 1
    partial = partial_sums(down if dbias is not None else 0, x)
    with on(x.device):
        backward_kernel[(down * across,)](dout, x, bias, dx, partial, rows, steps, BIAS=dbias is not None, **settings)
        if dbias is not None:
            column_sums(partial, dbias)
