"""Triton kernels of the affine step; formulas in tarflow_fast/ops/affine.py.

A program owns a tile of BLOCK_T tokens (in net order) and BLOCK_D of their elements, all from one row. The tiles depend
on T and D alone, and no two programs write to the same address. So the bits depend neither on the batch nor on the run.
"""

import torch
import triton
import triton.language as tl
from tarflow_fast.kernels.triton.device import on
from tarflow_fast.kernels.triton.exponential import exp
from tarflow_fast.kernels.triton.tuning import AFFINE_TILE as TILE
from tarflow_fast.kernels.triton.tuning import AFFINE_WARPS as NUM_WARPS


def tile(D):
    """(BLOCK_T, BLOCK_D) for tokens of D elements."""
    block_d = min(triton.next_power_of_2(D), TILE)
    return TILE // block_d, block_d


@triton.jit
def _places(T, chunks, D: tl.constexpr, FLIP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    # Everything lies on one grid axis, because the other axes end at 65535.
    parts: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    item = tl.program_id(0).to(tl.int64)
    row, rest = item // (chunks * parts), item % (chunks * parts)
    token = (rest // parts) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    d = (rest % parts).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    place = T - 1 - token if FLIP else token
    return row, token, d, (row * T + place) * D + d, (token < T) & (d < D)


@triton.jit
def forward_kernel(
    # in: (B, T, D) and (B, T, 2D or D)
    x_ptr,
    ab_ptr,
    # out: (B, T, D), and the sum of a of each tile
    z_ptr,
    sum_ptr,
    # sizes; chunks: tiles along T
    T,
    chunks,
    D: tl.constexpr,
    # what is asked for
    SCALE: tl.constexpr,
    FLIP: tl.constexpr,
    # tiles, and the type that everything is computed in
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    row, token, d, at, inside = _places(T, chunks, D, FLIP, BLOCK_T, BLOCK_D)
    width: tl.constexpr = 2 * D if SCALE else D
    from_ = (row * T + token - 1) * width + d
    conditioned = inside & (token > 0)
    y = tl.load(x_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    if SCALE:
        a = tl.load(ab_ptr + from_, mask=conditioned, other=0.0).to(COMPUTE)
        b = tl.load(ab_ptr + from_ + D, mask=conditioned, other=0.0).to(COMPUTE)
        y = (y - b) * exp(-a)
        tl.store(sum_ptr + tl.program_id(0), tl.sum(tl.sum(a, axis=1), axis=0))
    else:
        y = y - tl.load(ab_ptr + from_, mask=conditioned, other=0.0).to(COMPUTE)
    tl.store(z_ptr + at, y.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def log_det_kernel(sum_ptr, log_det_ptr, count, BLOCK: tl.constexpr):
    """log_det[row] is minus the sum over the row's tiles. It is added up in fp64 and always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    start = 0
    while start < count:
        total += tl.load(sum_ptr + row * count + start + lane, mask=start + lane < count, other=0.0).to(tl.float64)
        start += BLOCK
    tl.store(log_det_ptr + row, (0.0 - tl.sum(total, axis=0)).to(log_det_ptr.dtype.element_ty))


@triton.jit
def backward_kernel(
    # in: (B, T, D), (B,), (B, T, D) and (B, T, 2D or D)
    dz_ptr,
    dlog_det_ptr,
    x_ptr,
    ab_ptr,
    # out: as x and ab
    dx_ptr,
    dab_ptr,
    # sizes; chunks: tiles along T
    T,
    chunks,
    D: tl.constexpr,
    # what is asked for
    SCALE: tl.constexpr,
    FLIP: tl.constexpr,
    # tiles, and the type that everything is computed in
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    row, token, d, at, inside = _places(T, chunks, D, FLIP, BLOCK_T, BLOCK_D)
    width: tl.constexpr = 2 * D if SCALE else D
    # Nothing conditions token 0. Its programs write the zeros of dab at the last token, whose output conditions
    # nothing.
    source = tl.where(token > 0, token, T) - 1
    from_ = (row * T + source) * width + d
    conditioned = inside & (token > 0)
    g = tl.load(dz_ptr + at, mask=inside, other=0.0).to(COMPUTE)
    if SCALE:
        a = tl.load(ab_ptr + from_, mask=conditioned, other=0.0).to(COMPUTE)
        b = tl.load(ab_ptr + from_ + D, mask=conditioned, other=0.0).to(COMPUTE)
        y = tl.load(x_ptr + at, mask=conditioned, other=0.0).to(COMPUTE)
        dlog_det = tl.load(dlog_det_ptr + row).to(COMPUTE)
        g = g * exp(-a)
        da = tl.where(token > 0, -(g * (y - b)) - dlog_det, 0.0)
        tl.store(dab_ptr + from_, da.to(dab_ptr.dtype.element_ty), mask=inside)
        from_ += D
    db = tl.where(token > 0, -g, 0.0)
    tl.store(dab_ptr + from_, db.to(dab_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + at, g.to(dx_ptr.dtype.element_ty), mask=inside)


def affine_forward(x, ab, z, log_det, flip):
    """Fills z and log_det. All are contiguous, on one device, of the shapes and dtypes of the op."""
    B, T = x.shape[:2]
    programs, settings = _launch(x, ab, flip)
    if not settings["SCALE"]:
        log_det.zero_()
    if B == 0:
        return
    sums = torch.empty(B * programs, dtype=log_det.dtype, device=x.device)
    with on(x.device):
        forward_kernel[(B * programs,)](x, ab, z, sums, T, **settings)
        if settings["SCALE"]:
            log_det_kernel[(B,)](sums, log_det, programs, BLOCK=256)


def affine_backward(dz, dlog_det, x, ab, dx, dab, flip):
    """Fills every element of dx and dab. All are contiguous, on one device, of the shapes and dtypes of the op."""
    programs, settings = _launch(x, ab, flip)
    if x.shape[0] == 0:
        return
    with on(x.device):
        backward_kernel[(x.shape[0] * programs,)](dz, dlog_det, x, ab, dx, dab, x.shape[1], **settings)


def _launch(x, ab, flip):
    """The number of programs a row, and the kernels' settings."""
    T, D = x.shape[1:]
    block_t, block_d = tile(D)
    chunks = triton.cdiv(T, block_t)
    settings = {
        "chunks": chunks,
        "D": D,
        "SCALE": ab.shape[2] == 2 * D,
        "FLIP": flip,
        "BLOCK_T": block_t,
        "BLOCK_D": block_d,
        "COMPUTE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "num_warps": NUM_WARPS,
    }
    return chunks * triton.cdiv(D, block_d), settings
