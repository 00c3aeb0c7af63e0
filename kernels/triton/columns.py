"""What the kernels over rows of N numbers have in common: their tiles, and the sums over rows that gradients need.

Each program adds up a chunk of rows, and a second kernel adds up the chunks. The order of both sums depends on the
shape alone, and so do the bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from tarflow_fast.kernels.triton import tuning


class RowTiles(NamedTuple):
    """How x (..., N) is cut up: rows of N numbers, tiles across a row, and the kernels' settings."""

    rows: int
    across: int
    settings: dict


def tiles(x):
    """The tiles of x (..., N) that the programs of a kernel own."""
    N = x.shape[-1]
    rows, columns, num_warps = tuning.bias(N)
    settings = {
        "N": N,
        "ROWS": rows,
        "COLUMNS": columns,
        "COMPUTE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "num_warps": num_warps,
    }
    return RowTiles(x.numel() // N, triton.cdiv(N, columns), settings)


def partial_sums(count, x):
    """Room for the sums of `count` chunks of rows of x, (count, 1, N)."""
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(count, 1, x.shape[-1], dtype=sums)


def chunks(*, rows, tile_rows, across):
    """(programs down the rows, tiles that each walks over), for about tuning.PROGRAMS programs in all.

    rows: of the tensor; tile_rows: of a tile; across: number of tiles side by side in a row.
    """
    down = triton.cdiv(rows, tile_rows)
    steps = triton.cdiv(down, max(1, tuning.PROGRAMS // across))
    return triton.cdiv(down, steps), steps


@triton.jit
def sum_kernel(
    # in: (count, PARTS, N)
    partial_ptr,
    # out: (N,) each, the second only where there are two parts
    first_ptr,
    second_ptr,
    # sizes
    count,
    N,
    PARTS: tl.constexpr,
    # tiles
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """first[n] = sum_i partial[i, 0, n], and where PARTS is 2 also second[n] = sum_i partial[i, 1, n]."""
    blocks = tl.cdiv(N, COLUMNS)
    part = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < N)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, COLUMNS), partial_ptr.dtype.element_ty)
    for start in range(0, count, ROWS):
        at = ((start + row) * PARTS + part) * N + column[None, :]
        total += tl.load(partial_ptr + at, mask=(start + row < count) & inside, other=0.0)
    value = tl.sum(total, 0)
    if part == 0:
        tl.store(first_ptr + column, value.to(first_ptr.dtype.element_ty), mask=column < N)
    else:
        tl.store(second_ptr + column, value.to(second_ptr.dtype.element_ty), mask=column < N)


def column_sums(partial, *sums):
    """Fills each of `sums` (N,) from partial (count, len(sums), N)."""
    count, parts, N = partial.shape
    rows, columns, num_warps = tuning.COLUMN_SUMS
    grid = (parts * triton.cdiv(N, columns),)
    sum_kernel[grid](
        partial, sums[0], sums[-1],
        count=count, N=N, PARTS=parts, ROWS=rows, COLUMNS=columns, num_warps=num_warps,
    )  # fmt: skip
