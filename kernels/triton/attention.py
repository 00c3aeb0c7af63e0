"""The Triton kernel of causal attention; formulas in tarflow_fast/ops/attention.py, gradients in attention_backward.py.

A program owns a tile of queries and walks over the keys up to it. It writes `out`, and `lse`: log2 of the softmax's
denominator, from which the backward kernels compute the softmax again.
"""

import triton
import triton.language as tl
from tarflow_fast.kernels.triton.attention_tiles import PADDING, launch, load_tile, owned_tile, store_tile
from tarflow_fast.kernels.triton.device import on


@triton.jit
def _attend(
    softmax,  # (accumulator, total, largest) over the keys so far; returned with those of this walk in it
    # the tile of queries, and where it begins
    q,
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
    BLOCK_OWN: tl.constexpr = q.shape[0]
    E: tl.constexpr = q.shape[1]
    WHOLE: tl.constexpr = EVEN or not DIAGONAL
    accumulator, total, largest = softmax
    if DIAGONAL:
        k_ptr += start.to(tl.int64) * stride
        v_ptr += start.to(tl.int64) * stride
        first, last = start, tl.minimum(start + BLOCK_OWN, T)
    else:
        first, last = 0, start
    for at in range(first, last, BLOCK_WALK):
        k = load_tile(k_ptr, stride, at, T, BLOCK_WALK, E, WHOLE)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if DIAGONAL:
            later = (at + tl.arange(0, BLOCK_WALK))[None, :] > (start + tl.arange(0, BLOCK_OWN))[:, None]
            logits = tl.where(later, float("-inf"), logits)
        new = tl.maximum(largest, tl.max(logits, 1) * scale)
        p = tl.exp2(logits * scale - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(p, 1)
        accumulator = accumulator * shrink[:, None]
        v = load_tile(v_ptr, stride, at, T, BLOCK_WALK, E, WHOLE)
        accumulator = tl.dot(p.to(v.dtype), v, accumulator, input_precision="ieee")
        largest = new
        k_ptr += BLOCK_WALK * stride
        v_ptr += BLOCK_WALK * stride
    return accumulator, total, largest


@triton.jit
def forward_kernel(
    # in: (B, T, H, E) of the strides below
    q_ptr,
    k_ptr,
    v_ptr,
    # out: (B, T, H, E) and (B, H, T rounded up to PADDING), contiguous
    out_ptr,
    lse_ptr,
    # sizes: heads = B H, and how many of them are worked on together
    T,
    heads,
    H,
    together,
    stride_b,
    stride_t,
    stride_h,
    scale,  # of the logits, in units of log2
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
    q = load_tile(q_ptr + base + start.to(tl.int64) * stride_t, stride_t, start, T, BLOCK_OWN, E, EVEN)
    accumulator = tl.zeros((BLOCK_OWN, E), tl.float32)
    total = tl.zeros((BLOCK_OWN,), tl.float32)
    largest = tl.full((BLOCK_OWN,), float("-inf"), tl.float32)
    k_ptr, v_ptr = k_ptr + base, v_ptr + base
    softmax = (accumulator, total, largest)
    softmax = _attend(softmax, q, start, k_ptr, v_ptr, stride_t, T, scale, EVEN, BLOCK_WALK, DIAGONAL=False)
    softmax = _attend(softmax, q, start, k_ptr, v_ptr, stride_t, T, scale, EVEN, BLOCK_WALK, DIAGONAL=True)
    accumulator, total, largest = softmax
    out_ptr += ((row * T + start) * H + head_of_row) * E
    store_tile(out_ptr, H * E, accumulator / total[:, None], start, T, EVEN)
    lse_ptr += head.to(tl.int64) * (tl.cdiv(T, PADDING) * PADDING) + start
    tl.store(lse_ptr + tl.arange(0, BLOCK_OWN), largest + tl.log2(total))


def attention_forward(query, key, value, *, out, lse, temperature):
    """Fills out and lse. query, key, value: (B, T, H, E) of equal strides, E adjacent. The rest is contiguous."""
    if query.numel() == 0:
        return
    grid, arguments = launch("forward", query, temperature)
    if arguments["BLOCK_OWN"] < PADDING.value:
        lse.zero_()  # the last tile may not reach the end
    with on(query.device):
        forward_kernel[grid](query, key, value, out, lse, **arguments)
