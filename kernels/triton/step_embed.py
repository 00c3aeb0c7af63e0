"""The head of a sampling step: gathers the tokens it starts from and embeds them.

    h[m] = proj_in(x[row, place]) + pos_embed[place] + classes[row],   place = order[position]

x has B rows; the rows past B of a guided pass take the tokens of the first B again. order[i] is the place in x and in
pos_embed of the i-th token that the net sees. h is the fp32 residual stream.
"""

import triton
import triton.language as tl
from tarflow_fast.kernels.triton import tuning_step
from tarflow_fast.kernels.triton.device import on
from tarflow_fast.kernels.triton.step_rows import cdiv, dot_type, place_of, query_places


@triton.jit
def embed_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    pos_ptr,
    class_ptr,
    h_ptr,
    starts_ptr,
    order_ptr,
    M,
    W,
    R,
    B,
    T,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        first = 0
        while first < R:
            r = first + tl.arange(0, BLOCK_N)
            tl.store(starts_ptr + r, tl.load(starts_ptr + R + r, mask=r < R, other=0), mask=r < R)
            first += BLOCK_N
    row, position, active = query_places(starts_ptr + R, m, M, W, T)
    place = place_of(order_ptr, position, T)
    x_row = (tl.where(row < B, row, row - B) * T + place) * D
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(weight_ptr + n[:, None] * D + k[None, :], mask=(n < C)[:, None] & (k < D)[None, :], other=0.0)
        x = tl.load(x_ptr + x_row[None, :] + k[:, None], mask=active[None, :] & (k < D)[:, None], other=0.0)
        acc = tl.dot(w.to(DOT), x.to(DOT), acc, input_precision="ieee")
    inside = (n < C)[:, None] & active[None, :]
    h = acc + tl.load(bias_ptr + n, mask=n < C, other=0.0).to(tl.float32)[:, None]
    h += tl.load(pos_ptr + place.to(tl.int64)[None, :] * C + n[:, None], mask=inside, other=0.0)
    h += tl.load(class_ptr + row[None, :] * C + n[:, None], mask=inside, other=0.0)
    # Queries past the end hold zeros: whatever the layers make of them stays finite, and is never used.
    h = tl.where(inside, h, 0.0)
    tl.store(h_ptr + m.to(tl.int64)[None, :] * C + n[:, None], h, mask=(n < C)[:, None] & (m < M)[None, :])


def embed(x, weight, bias, pos_embed, classes, h, starts, order, W, tuned_for=None):
    """Fills h (M, C) fp32. x (B, T, D), pos_embed (T, C) and classes (R, C) fp32, weight (C, D), starts (2, R) and
    order (T,) int32, a permutation.

    tuned_for: number of queries whose tiles are taken; M by default.
    """
    (B, T, D), (M, C) = x.shape, h.shape
    config = tuning_step.embed(tuned_for or M, C, D, weight.dtype)
    grid = (cdiv(C, config["BLOCK_N"]), cdiv(M, config["BLOCK_M"]))
    with on(x.device):
        embed_kernel[grid](
            x, weight, bias, pos_embed, classes, h, starts, order, M, W, classes.shape[0], B, T,
            C=C, D=D, DOT=dot_type(weight.dtype), **config,
        )  # fmt: skip
