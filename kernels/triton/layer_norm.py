"""Triton kernels of LayerNorm; formulas in tarflow_fast/ops/layer_norm.py.

A program holds whole rows in registers.
"""

import torch
import triton
import triton.language as tl
from tarflow_fast.kernels.triton import tuning
from tarflow_fast.kernels.triton.columns import chunks, column_sums
from tarflow_fast.kernels.triton.device import on


@triton.jit
def forward_kernel(
    # in: (rows, C), and (C,) twice
    x_ptr,
    weight_ptr,
    bias_ptr,
    # out: (rows, C), and (rows,) twice
    out_ptr,
    mean_ptr,
    rstd_ptr,
    # sizes
    rows,
    C: tl.constexpr,
    EPS: tl.constexpr,
    # tiles, and the type that everything is computed in
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    at, inside = row[:, None] * C + c[None, :], (row < rows)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    mean = tl.sum(x, 1) / C
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + EPS)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(COMPUTE)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(COMPUTE)
    out = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def backward_kernel(
    # in: (rows, C) twice, (C,), and (rows,) twice
    dout_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    # out: (rows, C), and the two sums over each chunk of rows, if WEIGHTS
    dx_ptr,
    partial_ptr,
    # sizes; steps: tiles that a program walks over
    rows,
    steps,
    C: tl.constexpr,
    WEIGHTS: tl.constexpr,
    # tiles, and the type that everything is computed in
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    c = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(COMPUTE)[None, :]
    if WEIGHTS:
        dweight = tl.zeros((ROWS, COLUMNS), COMPUTE)
        dbias = tl.zeros((ROWS, COLUMNS), COMPUTE)
    first = tl.program_id(0).to(tl.int64) * steps * ROWS
    for step in range(0, steps):
        row = first + step * ROWS + tl.arange(0, ROWS)
        at, inside = row[:, None] * C + c[None, :], (row < rows)[:, None] & (c < C)[None, :]
        g = tl.load(dout_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE)
        normed = tl.where(inside, (x - mean) * rstd, 0.0)
        if WEIGHTS:
            dweight += g * normed
            dbias += g
        g *= weight
        dx = rstd * (g - (tl.sum(g, 1)[:, None] + normed * tl.sum(g * normed, 1)[:, None]) / C)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if WEIGHTS:
        place = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * C) + c
        tl.store(place, tl.sum(dweight, 0), mask=c < C)
        tl.store(place + C, tl.sum(dbias, 0), mask=c < C)


def layer_norm_forward(x, weight, bias, out, mean, rstd, eps):
    """Fills out, of the shape of x, and mean and rstd, one number a row. All are contiguous and on one device."""
    rows, settings = _settings(x)
    if rows == 0:
        return
    grid = (triton.cdiv(rows, settings["ROWS"]),)
    with on(x.device):
        forward_kernel[grid](x, weight, bias, out, mean, rstd, rows, EPS=eps, **settings)


def layer_norm_backward(dout, x, weight, mean, rstd, dx, dweight=None, dbias=None):
    """Fills dx, of the shape of x, and dweight and dbias (C,) where they are given. All are contiguous."""
    rows, settings = _settings(x)
    weights = dweight is not None
    if rows == 0:
        if weights:
            dweight.zero_(), dbias.zero_()
        return
    programs, steps = triton.cdiv(rows, settings["ROWS"]), 1
    if weights:
        programs, steps = chunks(rows=rows, tile_rows=settings["ROWS"], across=1)
    partial = mean.new_empty(programs, 2, x.shape[-1]) if weights else mean
    with on(x.device):
        backward_kernel[(programs,)](dout, x, weight, mean, rstd, dx, partial, rows, steps, WEIGHTS=weights, **settings)
        if weights:
            column_sums(partial, dweight, dbias)


def _settings(x):
    """The number of rows, and the kernels' settings."""
    C = x.shape[-1]
    rows, columns, num_warps = tuning.layer_norm(C)
    settings = {
        "C": C,
        "ROWS": rows,
        "COLUMNS": columns,
        "COMPUTE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "num_warps": num_warps,
    }
    return x.numel() // C, settings
