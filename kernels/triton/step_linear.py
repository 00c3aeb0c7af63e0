"""The linear layers of a sampling step, each with what comes before and after it:

    append     q = LN(h) Wq + bq -> queries (M, C);  k, v likewise -> straight into the cache (2, R, H, T, E)
    gelu       GELU(LN(h) W + b), erf form
    residual   h += x W + b

Few queries meet large weights: the weights are the first operand of the product (64 rows of them make a wgmma on
sm_90, whatever the number of queries), and where their tiles cannot fill the machine the sum over K is split. LayerNorm
is computed by every program for its own queries, which costs less than a kernel of its own until there are many.
"""

import triton
import triton.language as tl
from tarflow_fast.kernels.triton import tuning_step
from tarflow_fast.kernels.triton.device import on
from tarflow_fast.kernels.triton.step_rows import cdiv, dot_type, last_to_arrive, query_places


@triton.jit
def linear_kernel(
    in_ptr,
    weight_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    out_ptr,
    cache_ptr,
    start_ptr,
    partial_ptr,
    counter_ptr,
    M,
    W,
    R,
    T,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
):
    # Programs of neighbouring numbers share a tile of the weights, which the L2 then holds.
    m_tiles = tl.cdiv(M, BLOCK_M)
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile // m_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    real = (m < M)[None, :]
    k = tl.arange(0, BLOCK_K)
    input_at = in_ptr + m.to(tl.int64)[None, :] * K + k[:, None]
    weight_at = weight_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    if NORM:
        total = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
        for start in range(0, K, BLOCK_K):
            total += tl.load(input_at + start, mask=real, other=0.0)
        mean = tl.sum(total, axis=0) / K
        # What rounding left in the mean comes off in a second step: a large mean would tilt every output by it.
        total = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
        squares = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
        for start in range(0, K, BLOCK_K):
            centred = tl.load(input_at + start, mask=real, other=0.0) - mean[None, :]
            total += centred
            squares += centred * centred
        rest = tl.sum(total, axis=0) / K
        scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / K - rest * rest + eps)

    SPAN: tl.constexpr = (K // BLOCK_K + SPLITS - 1) // SPLITS * BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(0, SPAN, BLOCK_K):
        start = split * SPAN + step
        # Only the last split can run past the end of K.
        within = start < K
        w = tl.load(weight_at + start, mask=(n < N)[:, None] & within, other=0.0)
        x = tl.load(input_at + start, mask=real & within, other=0.0)
        if NORM:
            gain = tl.load(norm_weight_ptr + start + k, mask=(start + k) < K, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias_ptr + start + k, mask=(start + k) < K, other=0.0).to(tl.float32)
            x = ((x - mean[None, :]) - rest[None, :]) * scale[None, :] * gain[:, None] + shift[:, None]
        acc = tl.dot(w.to(DOT), x.to(DOT), acc, input_precision="ieee")

    inside = (n < N)[:, None] & real
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if SPLITS > 1:
        tl.store(partial_ptr + split.to(tl.int64) * M * N + at, acc, mask=inside)
        if not last_to_arrive(counter_ptr + tile, SPLITS):
            return
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for s in tl.static_range(SPLITS):
            # From the L2: another program wrote it during this launch.
            its = tl.full((1, 1), s * N, tl.int64) * M + at
            acc += tl.load(partial_ptr + its, mask=inside, other=0.0, cache_modifier=".cg")
    y = acc + tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]

    if EPILOGUE == "residual":
        tl.store(out_ptr + at, tl.load(out_ptr + at, mask=inside, other=0.0) + y, mask=inside)
    elif EPILOGUE == "gelu":
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        C: tl.constexpr = N // 3
        row, position, active = query_places(start_ptr, m, M, W, T)
        y = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + m.to(tl.int64)[None, :] * C + n[:, None], y, mask=inside & (n < C)[:, None])
        # The n-th output is key (n in C .. 2C) or value n; head and element are those of n mod C.
        heads = (n // C - 1).to(tl.int64) * R * (C // E) + n % C // E
        keys = heads[:, None] + row[None, :] * (C // E)
        at = (keys * T + position[None, :]) * E + (n % E)[:, None]
        tl.store(cache_ptr + at, y, mask=inside & active[None, :] & (n >= C)[:, None])


@triton.jit
def normalize_kernel(h_ptr, weight_ptr, bias_ptr, out_ptr, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    """out = LN(h), a program a query; used where queries are too many for every program to do it again."""
    at = tl.program_id(0).to(tl.int64) * C
    c = tl.arange(0, BLOCK)
    h = tl.load(h_ptr + at + c, mask=c < C, other=0.0)
    centred = tl.where(c < C, h - tl.sum(h, axis=0) / C, 0.0)
    centred = tl.where(c < C, centred - tl.sum(centred, axis=0) / C, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + eps)
    gain = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    shift = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(out_ptr + at + c, (centred * scale * gain + shift).to(out_ptr.dtype.element_ty), mask=c < C)


def linear(x, weight, bias, out, scratch, epilogue, norm=None, append=None, tuned_for=None):
    """One of the three layers above, in place.

    Args:
        x: (M, K); the residual stream h, fp32, where there is a norm, else in the storage type.
        weight, bias: (N, K) and (N,), storage type.
        out: (M, C) queries, (M, N) activations, or (M, N) fp32 residual stream.
        scratch: what `tuning_step.scratch` asked for: partials fp32, counters int32 (zero), normalized (M, K).
        norm: (weight, bias, eps) of the LayerNorm before, or None.
        append: (cache (2, R, H, T, E), starts, W) of the epilogue "append".
        tuned_for: number of queries whose tiles are taken; M by default.
    """
    (M, K), N = x.shape, weight.shape[0]
    cache, starts, W = append or (out, scratch["counters"], 1)
    R, T, E = (cache.shape[1], cache.shape[3], cache.shape[4]) if append else (M, 1, 1)
    config = tuning_step.linear(tuned_for or M, N, K, weight.dtype, norm is not None)
    fused = config.pop("NORM")
    gain, shift, eps = norm or (bias, bias, 0.0)
    with on(x.device):
        if norm and not fused:
            normalized = scratch["normalized"]
            normalize_kernel[(M,)](x, gain, shift, normalized, eps, C=K, **tuning_step.normalize(K))
            x = normalized
        grid = (cdiv(N, config["BLOCK_N"]) * cdiv(M, config["BLOCK_M"]), config["SPLITS"])
        linear_kernel[grid](
            x, weight, bias, gain, shift, out, cache, starts, scratch["partials"], scratch["counters"], M, W, R, T, eps,
            N=N, K=K, E=E, NORM=bool(norm) and fused, EPILOGUE=epilogue, DOT=dot_type(weight.dtype), **config,
        )  # fmt: skip
