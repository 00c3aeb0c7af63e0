"""The tail of a sampling step: the net's output, guidance, and the tokens it solves.

    (a, b) = halves of proj_out(h);   a += ga[p] (a - a_u), b += gb[p] (b - b_u) under guidance
    x[next] = z[next] exp(a) + b,   sums[., p] = sum_d a,   next = order[p + 1]

Rows B .. 2B-1 of a guided pass are the unguided ones. x and z (B, T, D) are fp32, and order[i] is the place in them of
the i-th token that the net sees. The sums of a are kept by position: a pass over a window may be repeated, and log_det
still counts each token once.

The solver by windows decides by itself what becomes of x. For it x[next] and (a, b) go to buffers of their own.
"""

import triton
import triton.language as tl
from tarflow_fast.kernels.triton import tuning_step
from tarflow_fast.kernels.triton.device import on
from tarflow_fast.kernels.triton.exponential import exp
from tarflow_fast.kernels.triton.step_rows import cdiv, dot_type, place_of, query_places


@triton.jit
def tail_kernel(
    # the residual stream and proj_out
    h_ptr,
    weight_ptr,
    bias_ptr,
    # the noise, the tokens, and the sums of a
    z_ptr,
    x_ptr,
    sums_ptr,
    # (B, W, D) instead of x, and (a, b), (B, W, P D), if APART
    values_ptr,
    parameters_ptr,
    # positions of the rows, the order of the tokens, and the weights of guidance
    starts_ptr,
    order_ptr,
    guidance_ptr,
    # sizes: R is B, or 2B where there is guidance
    W,
    R,
    B,
    T,
    C: tl.constexpr,
    D: tl.constexpr,
    # what is asked for; ADVANCE: how far the rows move on
    SCALE: tl.constexpr,
    GUIDED: tl.constexpr,
    ADVANCE: tl.constexpr,
    APART: tl.constexpr,
    # tiles, and the type of the products' operands
    BLOCK_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DOT: tl.constexpr,
):
    d = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        first = 0
        while first < R:
            r = first + tl.arange(0, BLOCK_M)
            now = tl.load(starts_ptr + r, mask=r < R, other=0)
            tl.store(starts_ptr + R + r, now + ADVANCE, mask=r < R)
            first += BLOCK_M
    row, position, active = query_places(starts_ptr, m, B * W, W, T)
    c = tl.arange(0, BLOCK_IN)
    owned, active_row = (d < D)[:, None], active[None, :]
    h_at = h_ptr + m.to(tl.int64)[None, :] * C + c[:, None]
    unguided_at = h_at + tl.full((1, 1), C, tl.int64) * B * W
    inside = owned & active_row

    # One walk over the channels makes all of up to four products, so that their loads are under way together. A tile of
    # the weights serves both passes.
    shift_at = weight_ptr + d[:, None] * C + c[None, :] + (D * C if SCALE else 0)
    a, a_u = tl.zeros((BLOCK_OUT, BLOCK_M), tl.float32), tl.zeros((BLOCK_OUT, BLOCK_M), tl.float32)
    b, b_u = tl.zeros((BLOCK_OUT, BLOCK_M), tl.float32), tl.zeros((BLOCK_OUT, BLOCK_M), tl.float32)
    for start in range(0, C, BLOCK_IN):
        h = tl.load(h_at + start, mask=active_row, other=0.0).to(DOT)
        w = tl.load(shift_at + start, mask=owned, other=0.0).to(DOT)
        b = tl.dot(w, h, b, input_precision="ieee")
        if SCALE:
            v = tl.load(shift_at - D * C + start, mask=owned, other=0.0).to(DOT)
            a = tl.dot(v, h, a, input_precision="ieee")
        if GUIDED:
            u = tl.load(unguided_at + start, mask=active_row, other=0.0).to(DOT)
            b_u = tl.dot(w, u, b_u, input_precision="ieee")
            if SCALE:
                a_u = tl.dot(v, u, a_u, input_precision="ieee")

    bias = tl.load(bias_ptr + d + (D if SCALE else 0), mask=d < D, other=0.0).to(tl.float32)[:, None]
    b += bias
    if GUIDED:
        g = tl.load(guidance_ptr + T + position, mask=active, other=0.0)[None, :]
        b += tl.where(g == 0.0, 0.0, g * (b - (b_u + bias)))
    place = place_of(order_ptr, position + 1, T)
    token = (row * T + place)[None, :] * D + d[:, None]
    y = tl.load(z_ptr + token, mask=inside, other=0.0)
    if SCALE:
        bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[:, None]
        a += bias
        if GUIDED:
            g = tl.load(guidance_ptr + position, mask=active, other=0.0)[None, :]
            a += tl.where(g == 0.0, 0.0, g * (a - (a_u + bias)))
        y = y * exp(a)
        total = tl.sum(tl.where(inside, a, 0.0), axis=0)
        tl.store(sums_ptr + (row + tl.program_id(0).to(tl.int64) * B) * T + position, total, mask=active)
    if APART:
        query = m.to(tl.int64)[None, :] * D
        kept = parameters_ptr + (query * 2 if SCALE else query) + d[:, None]
        if SCALE:
            tl.store(kept, a, mask=inside)
        tl.store(kept + (D if SCALE else 0), b, mask=inside)
        tl.store(values_ptr + query + d[:, None], y + b, mask=inside)
    else:
        tl.store(x_ptr + token, y + b, mask=inside)


def affine_inverse(*, h, weight, bias, z, x, sums, starts, order, guidance, W, guided, values=None, parameters=None):
    """Solves the tokens after the queries of this pass, in x. With W = 1 the rows move on to these tokens.

    Where `values` is given, the tokens go there, x is not written, and no row moves on.

    Args:
        h: (R W, C) fp32, R = 2B where `guided`, else B.
        weight, bias: (2D or D, C) storage type, and (2D or D,).
        z, x: (B, T, D) fp32.
        sums: (tiles, B, T) fp32, with the tiles of `tuning_step.tail_tiles`.
        starts: (2, R) int32; order: (T,) int32, a permutation.
        guidance: (2, T) fp32, ga and gb.
        values, parameters: None, or (B, W, D) and (B, W, 2D or D) fp32.
    """
    (B, T, D), C = x.shape, h.shape[1]
    config = tuning_step.tail(C, weight.dtype, guided or values is not None)
    with on(x.device):
        tail_kernel[(cdiv(D, config["BLOCK_OUT"]), cdiv(B * W, config["BLOCK_M"]))](
            h_ptr=h, weight_ptr=weight, bias_ptr=bias, z_ptr=z, x_ptr=x, sums_ptr=sums,
            values_ptr=x if values is None else values, parameters_ptr=x if parameters is None else parameters,
            starts_ptr=starts, order_ptr=order, guidance_ptr=guidance,
            W=W, R=starts.shape[1], B=B, T=T, C=C, D=D,
            SCALE=weight.shape[0] == 2 * D, GUIDED=guided, APART=values is not None,
            ADVANCE=int(W == 1 and values is None), DOT=dot_type(weight.dtype), **config,
        )  # fmt: skip
