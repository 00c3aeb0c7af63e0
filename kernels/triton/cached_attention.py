"""Attention of W queries of each row over the key/value cache, causal within the window.

The cache holds the keys and values of the window already.

    out[m, h] = softmax(q[m, h] . K[row, h, :p+1] * scale[row]) V[row, h, :p+1],   p = start[row] + w

A program owns one row, one head, one tile of queries, and one of SPLITS parts of the keys so far. The grid is that of
the longest cache, and programs without keys leave at once. Each part leaves its maximum, its sum and its weighted
values, and the last program to arrive adds the parts up in order.

With one query every lane of keys keeps a maximum and a sum of its own. So nothing crosses lanes inside the loop, and
all arithmetic is fp32. The compiler pipelines a loop by itself only where it has a matrix product. This one has none,
so it is asked to. Else each thread would wait for one load before it issues the next. With several queries the sums are
matrix products.
"""

import triton
import triton.language as tl
from tarflow_fast.kernels.triton import tuning_step
from tarflow_fast.kernels.triton.device import on
from tarflow_fast.kernels.triton.step_rows import cdiv, dot_type, last_to_arrive


@triton.jit
def _exp2(score, maximum):
    """exp2(score - maximum). It is 0 where no key was seen yet, and NaN stays NaN."""
    return tl.exp2(score - tl.where(maximum == float("-inf"), 0.0, maximum))


@triton.jit
def attention_kernel(
    # the queries, the cache, and for each row the scale of its logits and its position
    q_ptr,
    cache_ptr,
    scale_ptr,
    start_ptr,
    out_ptr,
    # scratch, if SPLITS > 1
    partial_ptr,
    sums_ptr,
    counter_ptr,
    # sizes: M = R W queries
    M,
    W,
    R,
    T,
    H: tl.constexpr,
    E: tl.constexpr,
    # tiles, and the type of the products' operands; ONE: W is 1; APART: what is not finite touches no earlier query
    # STAGES: tiles of keys under way and in use; PARTS: a power of two, at least SPLITS
    SPLITS: tl.constexpr,
    ONE: tl.constexpr,
    APART: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DOT: tl.constexpr,
):
    item, split = tl.program_id(0), tl.program_id(1)
    head, rest = item % H, item // H
    w_tiles = tl.cdiv(W, BLOCK_W)
    row, first_query = rest // w_tiles, rest % w_tiles * BLOCK_W
    start = tl.load(start_ptr + row)
    length = tl.minimum(start + tl.minimum(first_query + BLOCK_W, W), T - 1)
    if start + first_query >= length:
        return
    chunk = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_T) * BLOCK_T
    low = split * chunk
    if low >= length:
        return
    high = tl.minimum(low + chunk, length)

    e = tl.arange(0, E)
    t = tl.arange(0, BLOCK_T)
    w = first_query + tl.arange(0, BLOCK_W)
    real = (w < W) & (start + w < T - 1)
    scale = tl.load(scale_ptr + row)
    pair = (row.to(tl.int64) * W + w) * H + head  # of a query and a head
    q = tl.load(q_ptr + pair[None, :] * E + e[:, None], mask=real[None, :], other=0.0)
    keys = cache_ptr + (row.to(tl.int64) * H + head) * T * E
    values = keys + tl.full((1, 1), H, tl.int64) * R * T * E
    if ONE:
        query = tl.sum(q.to(tl.float32), axis=1)[None, :] * scale
        lane_peak = tl.full((BLOCK_T,), float("-inf"), tl.float32)
        lane_mass = tl.zeros((BLOCK_T,), tl.float32)
        lanes = tl.zeros((BLOCK_T, E), tl.float32)
        for first in tl.range(low, high, BLOCK_T, num_stages=STAGES):
            there = first + t < high
            at = (first + t)[:, None] * E + e[None, :]
            key = tl.load(keys + at, mask=there[:, None], other=0.0).to(tl.float32)
            value = tl.load(values + at, mask=there[:, None], other=0.0).to(tl.float32)
            score = tl.where(there, tl.sum(key * query, axis=1), float("-inf"))
            higher = tl.maximum(lane_peak, score)
            keep, weight = _exp2(lane_peak, higher), _exp2(score, higher)
            lane_mass = lane_mass * keep + weight
            lanes = lanes * keep[:, None] + weight[:, None] * value
            lane_peak = higher
        top = tl.max(lane_peak, axis=0)
        keep = _exp2(lane_peak, top)
        peak = tl.zeros((BLOCK_W,), tl.float32) + top
        mass = tl.zeros((BLOCK_W,), tl.float32) + tl.sum(lane_mass * keep, axis=0)
        out = tl.zeros((E, BLOCK_W), tl.float32) + tl.sum(lanes * keep[:, None], axis=0)[:, None]
    else:
        peak = tl.full((BLOCK_W,), float("-inf"), tl.float32)
        mass = tl.zeros((BLOCK_W,), tl.float32)
        out = tl.zeros((E, BLOCK_W), tl.float32)
        for first in range(low, high, BLOCK_T):
            at = (first + t)[:, None] * E + e[None, :]
            there = first + t < high
            key = tl.load(keys + at, mask=there[:, None], other=0.0)
            value = tl.load(values + at, mask=there[:, None], other=0.0)
            score = tl.dot(key.to(DOT), q.to(DOT), input_precision="ieee") * scale
            seen = there[:, None] & ((first + t)[:, None] <= (start + w)[None, :])
            score = tl.where(seen, score, float("-inf"))
            if APART:
                # A product with the weight 0 of a later key would be NaN. So such a value counts as 0, and the score of
                # a query that does see it is NaN.
                finite = tl.abs(value.to(tl.float32)) < float("inf")
                value = tl.where(finite, value, 0.0)
                whole = tl.min(finite.to(tl.int32), axis=1) > 0
                score = tl.where(seen & (whole == 0)[:, None], float("nan"), score)
            higher = tl.maximum(peak, tl.max(score, axis=0))
            keep, weight = _exp2(peak, higher), _exp2(score, higher[None, :])
            mass = mass * keep + tl.sum(weight, axis=0)
            out = tl.dot(tl.trans(value.to(DOT)), weight.to(DOT), out * keep[None, :], input_precision="ieee")
            peak = higher

    if SPLITS > 1:
        size = tl.full((1,), H, tl.int64) * M
        tl.store(sums_ptr + (split * size + pair) * 2, peak, mask=real)
        tl.store(sums_ptr + (split * size + pair) * 2 + 1, mass, mask=real)
        tl.store(partial_ptr + (split * size + pair)[None, :] * E + e[:, None], out, mask=real[None, :])
        parts = tl.cdiv(length, chunk)
        if not last_to_arrive(counter_ptr + item, parts):
            return
        # The parts are read from the L2, because other programs wrote them during this launch.
        if ONE:
            # All parts at once, and not one after another: else each would cost a wait of its own.
            p = tl.arange(0, PARTS)
            place = p * size + (row.to(tl.int64) * H + head)
            its_peak = tl.load(sums_ptr + place * 2, mask=p < parts, other=float("-inf"), cache_modifier=".cg")
            its_mass = tl.load(sums_ptr + place * 2 + 1, mask=p < parts, other=0.0, cache_modifier=".cg")
            out_at = partial_ptr + place[:, None] * E + e[None, :]
            its_out = tl.load(out_at, mask=(p < parts)[:, None], other=0.0, cache_modifier=".cg")
            its = _exp2(its_peak, tl.max(its_peak, axis=0))
            mass = tl.zeros((BLOCK_W,), tl.float32) + tl.sum(its_mass * its, axis=0)
            out = tl.zeros((E, BLOCK_W), tl.float32) + tl.sum(its_out * its[:, None], axis=0)[:, None]
        else:
            peak = tl.full((BLOCK_W,), float("-inf"), tl.float32)
            mass = tl.zeros((BLOCK_W,), tl.float32)
            out = tl.zeros((E, BLOCK_W), tl.float32)
            for part in range(0, parts):
                place = part * size + pair
                its_peak = tl.load(sums_ptr + place * 2, mask=real, other=float("-inf"), cache_modifier=".cg")
                its_mass = tl.load(sums_ptr + place * 2 + 1, mask=real, other=0.0, cache_modifier=".cg")
                its_out = tl.load(
                    partial_ptr + place[None, :] * E + e[:, None], mask=real[None, :], other=0.0, cache_modifier=".cg"
                )
                both = tl.maximum(peak, its_peak)
                ours, its = _exp2(peak, both), _exp2(its_peak, both)
                mass = mass * ours + its_mass * its
                out = out * ours[None, :] + its_out * its[None, :]
                peak = both
    out = out / tl.where(real, mass, 1.0)[None, :]
    tl.store(out_ptr + pair[None, :] * E + e[:, None], out.to(out_ptr.dtype.element_ty), mask=real[None, :])


def cached_attention(q, cache, *, scale, starts, out, scratch, W, tuned_rows=None, apart=False):
    """Fills out.

    Args:
        q, out: (M, C) storage type, M = R W.
        cache: (2, R, H, T, E) storage type.
        scale: (R,) fp32, of the logits in units of log2.
        starts: (2, R) int32.
        scratch: what `tuning_step.scratch` asked for: partials fp32, sums fp32, counters int32 (zero).
        W: queries a row.
        tuned_rows: number of rows whose tiles are taken; R by default.
        apart: keep values that are not finite from the queries before them, which weigh them with 0.
    """
    _, R, H, T, E = cache.shape
    config = tuning_step.attention(R=tuned_rows or R, W=W, H=H, T=T, dtype=cache.dtype, apart=apart)
    with on(q.device):
        attention_kernel[(R * H * cdiv(W, config["BLOCK_W"]), config["SPLITS"])](
            q_ptr=q, cache_ptr=cache, scale_ptr=scale, start_ptr=starts, out_ptr=out,
            partial_ptr=scratch["partials"], sums_ptr=scratch["sums"], counter_ptr=scratch["counters"],
            M=q.shape[0], W=W, R=R, T=T, H=H, E=E, APART=apart and W > 1, DOT=dot_type(cache.dtype), **config,
        )  # fmt: skip
