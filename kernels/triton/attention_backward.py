"""Triton kernels of the gradient of causal attention; formulas in tarflow_fast/ops/attention.py.

    query_kernel     a tile of queries against the keys up to it: dq, and delta = sum_e dout out, which key_kernel needs
    key_kernel       a tile of keys against the queries from it on: dk and dv

There are two walks and not one with atomic additions to dq. They make 7 products where 5 would do, but every run has
the same bits.
"""

import triton
import triton.language as tl
from tarflow_fast.kernels.triton.attention_tiles import PADDING, launch, load_tile, owned_tile, store_tile
from tarflow_fast.kernels.triton.device import on


@triton.jit
def _store_statistics(pointer, lse, delta, BLOCK: tl.constexpr):
    """Stores (lse, delta) of BLOCK queries side by side.

    So key_kernel reads them as one load of 2 BLOCK numbers. Two loads of BLOCK numbers each would be of fewer numbers
    than there are threads, and the compiler would make many loads of them: each thread would read all that it needs.
    """
    at = tl.arange(0, BLOCK)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(pointer + at, tl.join(lse, delta))


@triton.jit
def _load_statistics(pointer, BLOCK: tl.constexpr):
    return tl.split(tl.reshape(tl.load(pointer + tl.arange(0, 2 * BLOCK)), (BLOCK, 2)))


@triton.jit
def _query_gradient(
    dq,  # the sum so far; returned with the keys of this walk in it
    # the tile of queries (q, dout, lse, delta), and where it begins
    queries,
    start,
    # keys and values of its head
    k_ptr,
    v_ptr,
    stride,
    T,
    scale,
    EVEN: tl.constexpr,
    BLOCK_WALK: tl.constexpr,
    DIAGONAL: tl.constexpr,  # walk over the keys of the tile itself, else over those before it
):
    q, dout, lse, delta = queries
    BLOCK_OWN: tl.constexpr = q.shape[0]
    E: tl.constexpr = q.shape[1]
    WHOLE: tl.constexpr = EVEN or not DIAGONAL
    if DIAGONAL:
        k_ptr += start.to(tl.int64) * stride
        v_ptr += start.to(tl.int64) * stride
        first, last = start, tl.minimum(start + BLOCK_OWN, T)
    else:
        first, last = 0, start
    for at in range(first, last, BLOCK_WALK):
        k = load_tile(k_ptr, stride, at, T, BLOCK_WALK, E, WHOLE)
        v = load_tile(v_ptr, stride, at, T, BLOCK_WALK, E, WHOLE)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
        if DIAGONAL:
            later = (at + tl.arange(0, BLOCK_WALK))[None, :] > (start + tl.arange(0, BLOCK_OWN))[:, None]
            p = tl.where(later, 0.0, p)
        ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        k_ptr += BLOCK_WALK * stride
        v_ptr += BLOCK_WALK * stride
    return dq


@triton.jit
def query_kernel(
    # in: (B, T, H, E) of the strides below
    q_ptr,
    k_ptr,
    v_ptr,
    # in: (B, T, H, E) twice and (B, H, T rounded up to PADDING), contiguous
    out_ptr,
    dout_ptr,
    lse_ptr,
    # out: lse and delta for key_kernel, (B, H, T rounded up, 2), and (B, T, 3, H, E), of which dq is the first
    statistics_ptr,
    dqkv_ptr,
    # sizes: heads = B H, and how many of them are worked on together
    T,
    heads,
    H,
    together,
    stride_b,
    stride_t,
    stride_h,
    # of the logits, in units of log2 and as they are
    scale,
    logit_scale,
    # tiles
    E: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_WALK: tl.constexpr,
):
    tile, head = owned_tile(T, heads, together, BLOCK_OWN, True)
    row, head_of_row = (head // H).to(tl.int64), (head % H).to(tl.int64)
    start = tile * BLOCK_OWN
    base = row * stride_b + head_of_row * stride_h
    k_ptr, v_ptr = k_ptr + base, v_ptr + base
    q = load_tile(q_ptr + base + start.to(tl.int64) * stride_t, stride_t, start, T, BLOCK_OWN, E, EVEN)
    here = ((row * T + start) * H + head_of_row) * E
    out = load_tile(out_ptr + here, H * E, start, T, BLOCK_OWN, E, EVEN)
    dout = load_tile(dout_ptr + here, H * E, start, T, BLOCK_OWN, E, EVEN)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    padded = head.to(tl.int64) * (tl.cdiv(T, PADDING) * PADDING) + start
    lse = tl.load(lse_ptr + padded + tl.arange(0, BLOCK_OWN))
    _store_statistics(statistics_ptr + 2 * padded, lse, delta, BLOCK_OWN)
    dq = tl.zeros((BLOCK_OWN, E), tl.float32)
    queries = (q, dout, lse, delta)
    dq = _query_gradient(dq, queries, start, k_ptr, v_ptr, stride_t, T, scale, EVEN, BLOCK_WALK, DIAGONAL=False)
    dq = _query_gradient(dq, queries, start, k_ptr, v_ptr, stride_t, T, scale, EVEN, BLOCK_WALK, DIAGONAL=True)
    dqkv_ptr += ((row * T + start) * (3 * H) + head_of_row) * E
    store_tile(dqkv_ptr, H * (3 * E), dq * logit_scale, start, T, EVEN)


@triton.jit
def _key_gradient(
    gradients,  # (dk, dv) so far; returned with the queries of this walk in them
    # the tile of keys, and where it begins
    k,
    v,
    start,
    # the queries of its head, from `start` on: what they are, what comes back to them, and (lse, delta)
    q_ptr,
    dout_ptr,
    statistics_ptr,
    stride,
    dout_stride,
    T,
    scale,
    EVEN: tl.constexpr,
    BLOCK_WALK: tl.constexpr,
    DIAGONAL: tl.constexpr,  # walk over the queries of the tile itself, else over those after it
):
    """Everything is transposed, (keys, queries), so that both sums have the keys as rows."""
    BLOCK_OWN: tl.constexpr = k.shape[0]
    E: tl.constexpr = k.shape[1]
    dk, dv = gradients
    if DIAGONAL:
        first, last = start, tl.minimum(start + BLOCK_OWN, T)
    else:
        q_ptr += BLOCK_OWN * stride
        dout_ptr += BLOCK_OWN * dout_stride
        statistics_ptr += 2 * BLOCK_OWN
        first, last = start + BLOCK_OWN, T
    for at in range(first, last, BLOCK_WALK):
        q = load_tile(q_ptr, stride, at, T, BLOCK_WALK, E, EVEN)
        lse, delta = _load_statistics(statistics_ptr, BLOCK_WALK)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])
        if DIAGONAL:
            later = (start + tl.arange(0, BLOCK_OWN))[:, None] > (at + tl.arange(0, BLOCK_WALK))[None, :]
            p = tl.where(later, 0.0, p)
        dout = load_tile(dout_ptr, dout_stride, at, T, BLOCK_WALK, E, EVEN)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        q_ptr += BLOCK_WALK * stride
        dout_ptr += BLOCK_WALK * dout_stride
        statistics_ptr += 2 * BLOCK_WALK
    return dk, dv


@triton.jit
def key_kernel(
    # in: (B, T, H, E) of the strides below
    q_ptr,
    k_ptr,
    v_ptr,
    # in: (B, T, H, E) and what query_kernel left, contiguous
    dout_ptr,
    statistics_ptr,
    # out: (B, T, 3, H, E), of which dk and dv are the second and the third
    dqkv_ptr,
    # sizes: heads = B H, and how many of them are worked on together
    T,
    heads,
    H,
    together,
    stride_b,
    stride_t,
    stride_h,
    # of the logits, in units of log2 and as they are
    scale,
    logit_scale,
    # tiles
    E: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_WALK: tl.constexpr,
):
    tile, head = owned_tile(T, heads, together, BLOCK_OWN, False)
    row, head_of_row = (head // H).to(tl.int64), (head % H).to(tl.int64)
    start = tile * BLOCK_OWN
    here = row * stride_b + head_of_row * stride_h + start.to(tl.int64) * stride_t
    k = load_tile(k_ptr + here, stride_t, start, T, BLOCK_OWN, E, EVEN)
    v = load_tile(v_ptr + here, stride_t, start, T, BLOCK_OWN, E, EVEN)
    q_ptr += here
    dout_ptr += ((row * T + start) * H + head_of_row) * E
    statistics_ptr += 2 * (head.to(tl.int64) * (tl.cdiv(T, PADDING) * PADDING) + start)
    gradients = (tl.zeros((BLOCK_OWN, E), tl.float32), tl.zeros((BLOCK_OWN, E), tl.float32))
    gradients = _key_gradient(
        gradients,
        k,
        v,
        start,
        q_ptr,
        dout_ptr,
        statistics_ptr,
        stride_t,
        H * E,
        T,
        scale,
        EVEN,
        BLOCK_WALK,
        DIAGONAL=True,
    )
    gradients = _key_gradient(
        gradients,
        k,
        v,
        start,
        q_ptr,
        dout_ptr,
        statistics_ptr,
        stride_t,
        H * E,
        T,
        scale,
        EVEN,
        BLOCK_WALK,
        DIAGONAL=False,
    )
    dk, dv = gradients
    dqkv_ptr += ((row * T + start) * (3 * H) + H + head_of_row) * E
    store_tile(dqkv_ptr, H * (3 * E), dk * logit_scale, start, T, EVEN)
    store_tile(dqkv_ptr + H * E, H * (3 * E), dv, start, T, EVEN)


def attention_backward(query, key, value, *, dout, out, lse, dqkv, temperature):
    """Fills dqkv (B, T, 3, H, E), every element. out and lse are those of `attention_forward`; dout is contiguous."""
    if query.numel() == 0:
        return
    statistics, logit_scale = lse.new_empty(*lse.shape, 2), query.shape[3] ** -0.5 / temperature
    with on(query.device):
        grid, arguments = launch("query", query, temperature)
        query_kernel[grid](query, key, value, out, dout, lse, statistics, dqkv, logit_scale=logit_scale, **arguments)
        grid, arguments = launch("key", query, temperature)
        key_kernel[grid](query, key, value, dout, statistics, dqkv, logit_scale=logit_scale, **arguments)
