"""The head of a sampling step: it gathers the tokens that the step starts from, and embeds them.

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
    # the tokens, proj_in, and what is added to it
    x_ptr,
    weight_ptr,
    bias_ptr,
    pos_ptr,
    class_ptr,
    # the residual stream
    h_ptr,
    # positions of the rows, and the order of the tokens
    starts_ptr,
    order_ptr,
    # sizes: M = R W queries; R is B, or 2B where there is guidance
    M,
    W,
    R,
    B,
    T,
    C: tl.constexpr,
    D: tl.constexpr,
    # tiles, and the type of the products' operands
    BLOCK_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DOT: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        first = 0
        while first < R:
            r = first + tl.arange(0, BLOCK_OUT)
            tl.store(starts_ptr + r, tl.load(starts_ptr + R + r, mask=r < R, other=0), mask=r < R)
            first += BLOCK_OUT
    row, position, active = query_places(starts_ptr + R, m, M, W, T)
    place = place_of(order_ptr, position, T)
    x_row = (tl.where(row < B, row, row - B) * T + place) * D
    acc = tl.zeros((BLOCK_OUT, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_IN):
        d = start + tl.arange(0, BLOCK_IN)
        w = tl.load(weight_ptr + c[:, None] * D + d[None, :], mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
        x = tl.load(x_ptr + x_row[None, :] + d[:, None], mask=active[None, :] & (d < D)[:, None], other=0.0)
        acc = tl.dot(w.to(DOT), x.to(DOT), acc, input_precision="ieee")
    inside = (c < C)[:, None] & active[None, :]
    h = acc + tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
    h += tl.load(pos_ptr + place.to(tl.int64)[None, :] * C + c[:, None], mask=inside, other=0.0)
    h += tl.load(class_ptr + row[None, :] * C + c[:, None], mask=inside, other=0.0)
    # Queries past the end hold zeros. So whatever the layers make of them stays finite, and nothing uses it.
    h = tl.where(inside, h, 0.0)
    tl.store(h_ptr + m.to(tl.int64)[None, :] * C + c[:, None], h, mask=(c < C)[:, None] & (m < M)[None, :])


def embed(*, x, weight, bias, pos_embed, classes, h, starts, order, W, tuned_queries=None):
    """Fills h.

    Args:
        x: (B, T, D) fp32.
        weight, bias: (C, D) storage type, and (C,); pos_embed: (T, C) fp32; classes: (R, C) fp32.
        h: (M, C) fp32, M = R W.
        starts: (2, R) int32; order: (T,) int32, a permutation.
        W: queries a row.
        tuned_queries: number of queries whose tiles are taken; M by default.
    """
    (B, T, D), (M, C) = x.shape, h.shape
    config = tuning_step.embed(M=tuned_queries or M, C=C, D=D, dtype=weight.dtype)
    grid = (cdiv(C, config["BLOCK_OUT"]), cdiv(M, config["BLOCK_M"]))
    with on(x.device):
        embed_kernel[grid](
            x_ptr=x, weight_ptr=weight, bias_ptr=bias, pos_ptr=pos_embed, class_ptr=classes,
            h_ptr=h, starts_ptr=starts, order_ptr=order,
            M=M, W=W, R=classes.shape[0], B=B, T=T, C=C, D=D, DOT=dot_type(weight.dtype), **config,
        )  # fmt: skip
