"""Triton kernels of causal attention; formulas in tarflow_fast/ops/attention.py.

    forward_kernel   a tile of queries against the keys up to it: out, and log2 of the softmax's denominator
    query_kernel     the same walk again: dq, and delta = sum_e dout out, which key_kernel needs
    key_kernel       a tile of keys against the queries from it on: dk and dv

Two walks backward, not one with atomic additions to dq: 7 products where 5 would do, but the same bits in every run. A
walk is a loop without mask over the tiles off the diagonal, and one with mask over those on it. Rows past T are read as
zeros and never written; a key past T is later than every query.
"""

import math

import triton
import triton.language as tl
from tarflow_fast.kernels.triton import tuning
from tarflow_fast.kernels.triton.device import architecture, on

# lse and what is kept beside it have room for whole tiles, so that no row of them is ever masked: a multiple of this.
PADDING: tl.constexpr = tl.constexpr(128)


@triton.jit
def _heaviest_first(T, heads, together, BLOCK: tl.constexpr, LAST_IS_HEAVY: tl.constexpr):
    """(tile, head) of this program: `together` heads at a time, so that their keys and values stay in the cache, and of
    those the tiles with the most work first, so that none is left for the end. One grid axis: others end at 65535."""
    tiles = tl.cdiv(T, BLOCK)
    item = tl.program_id(0)
    first = item // (together * tiles) * together
    count = tl.minimum(together, heads - first)
    place = item - first * tiles
    tile = place // count
    return tiles - 1 - tile if LAST_IS_HEAVY else tile, first + place % count


@triton.jit
def _load(pointer, stride, at, T, BLOCK: tl.constexpr, E: tl.constexpr, EVEN: tl.constexpr):
    """Tokens at .. at + BLOCK of a head, (BLOCK, E). pointer: to the first of them."""
    token, e = tl.arange(0, BLOCK)[:, None], tl.arange(0, E)[None, :]
    if EVEN:
        return tl.load(pointer + token * stride + e)
    return tl.load(pointer + token * stride + e, mask=at + token < T, other=0.0)


@triton.jit
def _store(pointer, stride, value, at, T, BLOCK: tl.constexpr, E: tl.constexpr, EVEN: tl.constexpr):
    token, e = tl.arange(0, BLOCK)[:, None], tl.arange(0, E)[None, :]
    value = value.to(pointer.dtype.element_ty)
    if EVEN:
        tl.store(pointer + token * stride + e, value)
    else:
        tl.store(pointer + token * stride + e, value, mask=at + token < T)


@triton.jit
def _store_statistics(pointer, lse, delta, BLOCK: tl.constexpr):
    """(lse, delta) of BLOCK queries side by side: key_kernel reads them as one load of 2 BLOCK numbers. Of two loads of
    BLOCK, fewer than there are threads, the compiler would make many: each thread would read all that it needs."""
    at = tl.arange(0, BLOCK)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(pointer + at, tl.join(lse, delta))


@triton.jit
def _load_statistics(pointer, BLOCK: tl.constexpr):
    return tl.split(tl.reshape(tl.load(pointer + tl.arange(0, 2 * BLOCK)), (BLOCK, 2)))


@triton.jit
def _attend(
    accumulator,
    total,
    largest,
    q,
    k_ptr,
    v_ptr,
    stride,
    first,
    last,
    start,
    T,
    scale,
    E: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """The online softmax over keys first .. last; k_ptr and v_ptr point to the first."""
    WHOLE: tl.constexpr = EVEN or not DIAGONAL
    for at in range(first, last, BLOCK_N):
        k = _load(k_ptr, stride, at, T, BLOCK_N, E, WHOLE)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if DIAGONAL:
            later = (at + tl.arange(0, BLOCK_N))[None, :] > (start + tl.arange(0, BLOCK_M))[:, None]
            logits = tl.where(later, float("-inf"), logits)
        new = tl.maximum(largest, tl.max(logits, 1) * scale)
        p = tl.exp2(logits * scale - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(p, 1)
        accumulator = accumulator * shrink[:, None]
        v = _load(v_ptr, stride, at, T, BLOCK_N, E, WHOLE)
        accumulator = tl.dot(p.to(v.dtype), v, accumulator, input_precision="ieee")
        largest = new
        k_ptr += BLOCK_N * stride
        v_ptr += BLOCK_N * stride
    return accumulator, total, largest


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    T,
    heads,
    H,
    together,
    stride_b,
    stride_t,
    stride_h,
    scale,
    E: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, head = _heaviest_first(T, heads, together, BLOCK_M, True)
    row, head_of_row = (head // H).to(tl.int64), (head % H).to(tl.int64)
    start = tile * BLOCK_M
    base = row * stride_b + head_of_row * stride_h
    q = _load(q_ptr + base + start.to(tl.int64) * stride_t, stride_t, start, T, BLOCK_M, E, EVEN)
    accumulator = tl.zeros((BLOCK_M, E), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    k_ptr, v_ptr = k_ptr + base, v_ptr + base
    accumulator, total, largest = _attend(
        accumulator,
        total,
        largest,
        q,
        k_ptr,
        v_ptr,
        stride_t,
        0,
        start,
        start,
        T,
        scale,
        E,
        EVEN,
        BLOCK_M,
        BLOCK_N,
        False,
    )
    on_diagonal = start.to(tl.int64) * stride_t
    k_ptr, v_ptr, last = k_ptr + on_diagonal, v_ptr + on_diagonal, tl.minimum(start + BLOCK_M, T)
    accumulator, total, largest = _attend(
        accumulator,
        total,
        largest,
        q,
        k_ptr,
        v_ptr,
        stride_t,
        start,
        last,
        start,
        T,
        scale,
        E,
        EVEN,
        BLOCK_M,
        BLOCK_N,
        True,
    )
    out_ptr += ((row * T + start) * H + head_of_row) * E
    _store(out_ptr, H * E, accumulator / total[:, None], start, T, BLOCK_M, E, EVEN)
    lse_ptr += head.to(tl.int64) * (tl.cdiv(T, PADDING) * PADDING) + start
    tl.store(lse_ptr + tl.arange(0, BLOCK_M), largest + tl.log2(total))


@triton.jit
def _query_gradient(
    dq,
    q,
    dout,
    lse,
    delta,
    k_ptr,
    v_ptr,
    stride,
    first,
    last,
    start,
    T,
    scale,
    E: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    WHOLE: tl.constexpr = EVEN or not DIAGONAL
    for at in range(first, last, BLOCK_N):
        k = _load(k_ptr, stride, at, T, BLOCK_N, E, WHOLE)
        v = _load(v_ptr, stride, at, T, BLOCK_N, E, WHOLE)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
        if DIAGONAL:
            later = (at + tl.arange(0, BLOCK_N))[None, :] > (start + tl.arange(0, BLOCK_M))[:, None]
            p = tl.where(later, 0.0, p)
        ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        k_ptr += BLOCK_N * stride
        v_ptr += BLOCK_N * stride
    return dq


@triton.jit
def query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    statistics_ptr,
    dqkv_ptr,
    T,
    heads,
    H,
    together,
    stride_b,
    stride_t,
    stride_h,
    scale,
    logit_scale,
    E: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, head = _heaviest_first(T, heads, together, BLOCK_M, True)
    row, head_of_row = (head // H).to(tl.int64), (head % H).to(tl.int64)
    start = tile * BLOCK_M
    base = row * stride_b + head_of_row * stride_h
    k_ptr, v_ptr = k_ptr + base, v_ptr + base
    q = _load(q_ptr + base + start.to(tl.int64) * stride_t, stride_t, start, T, BLOCK_M, E, EVEN)
    here = ((row * T + start) * H + head_of_row) * E
    out = _load(out_ptr + here, H * E, start, T, BLOCK_M, E, EVEN)
    dout = _load(dout_ptr + here, H * E, start, T, BLOCK_M, E, EVEN)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    padded = head.to(tl.int64) * (tl.cdiv(T, PADDING) * PADDING) + start
    lse = tl.load(lse_ptr + padded + tl.arange(0, BLOCK_M))
    _store_statistics(statistics_ptr + 2 * padded, lse, delta, BLOCK_M)
    dq = tl.zeros((BLOCK_M, E), tl.float32)
    dq = _query_gradient(
        dq, q, dout, lse, delta, k_ptr, v_ptr, stride_t, 0, start, start, T, scale, E, EVEN, BLOCK_M, BLOCK_N, False
    )
    on_diagonal = start.to(tl.int64) * stride_t
    k_ptr, v_ptr, last = k_ptr + on_diagonal, v_ptr + on_diagonal, tl.minimum(start + BLOCK_M, T)
    dq = _query_gradient(
        dq, q, dout, lse, delta, k_ptr, v_ptr, stride_t, start, last, start, T, scale, E, EVEN, BLOCK_M, BLOCK_N, True
    )
    dqkv_ptr += ((row * T + start) * (3 * H) + head_of_row) * E
    _store(dqkv_ptr, H * (3 * E), dq * logit_scale, start, T, BLOCK_M, E, EVEN)


@triton.jit
def _key_gradient(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    statistics_ptr,
    stride,
    dout_stride,
    first,
    last,
    start,
    T,
    scale,
    E: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Everything transposed, (keys, queries), so that both sums have the keys as rows."""
    for at in range(first, last, BLOCK_N):
        q = _load(q_ptr, stride, at, T, BLOCK_N, E, EVEN)
        lse, delta = _load_statistics(statistics_ptr, BLOCK_N)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])
        if DIAGONAL:
            later = (start + tl.arange(0, BLOCK_M))[:, None] > (at + tl.arange(0, BLOCK_N))[None, :]
            p = tl.where(later, 0.0, p)
        dout = _load(dout_ptr, dout_stride, at, T, BLOCK_N, E, EVEN)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        q_ptr += BLOCK_N * stride
        dout_ptr += BLOCK_N * dout_stride
        statistics_ptr += 2 * BLOCK_N
    return dk, dv


@triton.jit
def key_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    statistics_ptr,
    dqkv_ptr,
    T,
    heads,
    H,
    together,
    stride_b,
    stride_t,
    stride_h,
    scale,
    logit_scale,
    E: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, head = _heaviest_first(T, heads, together, BLOCK_M, False)
    row, head_of_row = (head // H).to(tl.int64), (head % H).to(tl.int64)
    start = tile * BLOCK_M
    here = row * stride_b + head_of_row * stride_h + start.to(tl.int64) * stride_t
    k = _load(k_ptr + here, stride_t, start, T, BLOCK_M, E, EVEN)
    v = _load(v_ptr + here, stride_t, start, T, BLOCK_M, E, EVEN)
    q_ptr += here
    dout_ptr += ((row * T + start) * H + head_of_row) * E
    statistics_ptr += 2 * (head.to(tl.int64) * (tl.cdiv(T, PADDING) * PADDING) + start)
    dk = tl.zeros((BLOCK_M, E), tl.float32)
    dv = tl.zeros((BLOCK_M, E), tl.float32)
    past = tl.minimum(start + BLOCK_M, T)
    dk, dv = _key_gradient(
        dk, dv, k, v, q_ptr, dout_ptr, statistics_ptr, stride_t, H * E,
        start, past, start, T, scale, E, EVEN, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    q_ptr += BLOCK_M * stride_t
    dout_ptr += BLOCK_M * (H * E)
    statistics_ptr += 2 * BLOCK_M
    dk, dv = _key_gradient(
        dk, dv, k, v, q_ptr, dout_ptr, statistics_ptr, stride_t, H * E,
        start + BLOCK_M, T, start, T, scale, E, EVEN, BLOCK_M, BLOCK_N, False,
    )  # fmt: skip
    dqkv_ptr += ((row * T + start) * (3 * H) + H + head_of_row) * E
    _store(dqkv_ptr, H * (3 * E), dk * logit_scale, start, T, BLOCK_M, E, EVEN)
    _store(dqkv_ptr + H * E, H * (3 * E), dv, start, T, BLOCK_M, E, EVEN)


def attention_forward(query, key, value, out, lse, temperature, tiles=None):
    """Fills out and lse. query, key, value: (B, T, H, E) of equal strides, E adjacent; the rest contiguous."""
    if query.numel() == 0:
        return
    grid, arguments, settings = _launch("forward", query, temperature, tiles)
    if settings["BLOCK_M"] < PADDING.value:
        lse.zero_()  # the last tile may not reach the end
    with on(query.device):
        forward_kernel[grid](query, key, value, out, lse, *arguments, **settings)


def attention_backward(dout, query, key, value, out, lse, dqkv, temperature, tiles=None):
    """Fills dqkv (B, T, 3, H, E), every element."""
    if query.numel() == 0:
        return
    statistics, logit_scale = lse.new_empty(*lse.shape, 2), query.shape[3] ** -0.5 / temperature
    with on(query.device):
        grid, arguments, settings = _launch("query", query, temperature, tiles)
        query_kernel[grid](query, key, value, out, dout, lse, statistics, dqkv, *arguments, logit_scale, **settings)
        grid, arguments, settings = _launch("key", query, temperature, tiles)
        key_kernel[grid](query, key, value, dout, statistics, dqkv, *arguments, logit_scale, **settings)


def _launch(part, query, temperature, tiles):
    """Grid, arguments and settings that all three kernels have in common."""
    B, T, H, E = query.shape
    block_m, block_n, num_warps, num_stages = tiles or tuning.attention(
        part, E, query.dtype, architecture(query.device)
    )
    together = tuning.attention_heads_together(T, E, query.dtype)
    arguments = (T, B * H, H, together, *query.stride()[:3], E**-0.5 / temperature * math.log2(math.e))
    settings = {
        "E": E,
        "EVEN": T % block_m == 0 and T % block_n == 0,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    return (triton.cdiv(T, block_m) * B * H,), arguments, settings
