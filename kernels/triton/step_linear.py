"""The linear layers of a sampling step, each with what comes before and after it:

    append     q = LN(h) Wq + bq -> queries (M, C);  k, v likewise -> straight into the cache (2, R, H, T, E)
    gelu       GELU(LN(h) W + b), erf form
    residual   h += x W + b

Few queries meet large weights. So the weights are the first operand of the product: 64 rows of them make a wgmma on
sm_90, whatever the number of queries. Where their tiles cannot fill the machine, the sum over the inputs is split.
Every program computes LayerNorm for its own queries, which costs less than a kernel of its own until there are many
queries.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from tarflow_fast.kernels.triton import tuning_step
from tarflow_fast.kernels.triton.device import on
from tarflow_fast.kernels.triton.step_rows import cdiv, dot_type, last_to_arrive, query_places


class Norm(NamedTuple):
    """The LayerNorm before a layer: weight and bias (C,), and eps."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


class Append(NamedTuple):
    """Where the keys and values of a step go: cache (2, R, H, T, E), starts (2, R) int32, W queries a row."""

    cache: torch.Tensor
    starts: torch.Tensor
    W: int


@triton.jit
def linear_kernel(
    # the input (M, INPUTS) and the layer
    in_ptr,
    weight_ptr,
    bias_ptr,
    # the LayerNorm before it, if NORM
    norm_weight_ptr,
    norm_bias_ptr,
    # the output; and for "append" the cache and the positions of the rows
    out_ptr,
    cache_ptr,
    start_ptr,
    # scratch, if SPLITS > 1
    partial_ptr,
    counter_ptr,
    # sizes: M = R W queries
    M,
    W,
    R,
    T,
    eps,
    # the layer at compile time
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    E: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    # tiles, and the type of the products' operands
    SPLITS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DOT: tl.constexpr,
):
    # Programs of neighbouring numbers share a tile of the weights, which the L2 then holds. A program computes the
    # outputs o of the queries m, and takes the inputs i, `start` further on in each step.
    m_tiles = tl.cdiv(M, BLOCK_M)
    tile, split = tl.program_id(0), tl.program_id(1)
    o = tile // m_tiles * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m = tile % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    real = (m < M)[None, :]
    i = tl.arange(0, BLOCK_IN)
    input_at = in_ptr + m.to(tl.int64)[None, :] * INPUTS + i[:, None]
    weight_at = weight_ptr + o[:, None].to(tl.int64) * INPUTS + i[None, :]
    if NORM:
        total = tl.zeros((BLOCK_IN, BLOCK_M), tl.float32)
        for start in range(0, INPUTS, BLOCK_IN):
            total += tl.load(input_at + start, mask=real, other=0.0)
        mean = tl.sum(total, axis=0) / INPUTS
        # A second step takes off what rounding left in the mean. Else a large mean would tilt every output by it.
        total = tl.zeros((BLOCK_IN, BLOCK_M), tl.float32)
        squares = tl.zeros((BLOCK_IN, BLOCK_M), tl.float32)
        for start in range(0, INPUTS, BLOCK_IN):
            centred = tl.load(input_at + start, mask=real, other=0.0) - mean[None, :]
            total += centred
            squares += centred * centred
        rest = tl.sum(total, axis=0) / INPUTS
        scale = tl.rsqrt(tl.sum(squares, axis=0) / INPUTS - rest * rest + eps)

    SPAN: tl.constexpr = (INPUTS // BLOCK_IN + SPLITS - 1) // SPLITS * BLOCK_IN
    acc = tl.zeros((BLOCK_OUT, BLOCK_M), tl.float32)
    for step in range(0, SPAN, BLOCK_IN):
        start = split * SPAN + step
        # Only the last split can run past the last input.
        within = start < INPUTS
        w = tl.load(weight_at + start, mask=(o < OUTPUTS)[:, None] & within, other=0.0)
        x = tl.load(input_at + start, mask=real & within, other=0.0)
        if NORM:
            gain = tl.load(norm_weight_ptr + start + i, mask=(start + i) < INPUTS, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias_ptr + start + i, mask=(start + i) < INPUTS, other=0.0).to(tl.float32)
            x = ((x - mean[None, :]) - rest[None, :]) * scale[None, :] * gain[:, None] + shift[:, None]
        acc = tl.dot(w.to(DOT), x.to(DOT), acc, input_precision="ieee")

    inside = (o < OUTPUTS)[:, None] & real
    at = m.to(tl.int64)[None, :] * OUTPUTS + o[:, None]
    if SPLITS > 1:
        tl.store(partial_ptr + split.to(tl.int64) * M * OUTPUTS + at, acc, mask=inside)
        if not last_to_arrive(counter_ptr + tile, SPLITS):
            return
        acc = tl.zeros((BLOCK_OUT, BLOCK_M), tl.float32)
        for s in tl.static_range(SPLITS):
            # This is read from the L2, because another program wrote it during this launch.
            its = tl.full((1, 1), s * OUTPUTS, tl.int64) * M + at
            acc += tl.load(partial_ptr + its, mask=inside, other=0.0, cache_modifier=".cg")
    y = acc + tl.load(bias_ptr + o, mask=o < OUTPUTS, other=0.0).to(tl.float32)[:, None]

    if EPILOGUE == "residual":
        tl.store(out_ptr + at, tl.load(out_ptr + at, mask=inside, other=0.0) + y, mask=inside)
    elif EPILOGUE == "gelu":
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        C: tl.constexpr = OUTPUTS // 3
        row, position, active = query_places(start_ptr, m, M, W, T)
        y = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + m.to(tl.int64)[None, :] * C + o[:, None], y, mask=inside & (o < C)[:, None])
        # Outputs C .. 2C-1 are keys, and those from 2C on are values. Head and element are those of o mod C.
        heads = (o // C - 1).to(tl.int64) * R * (C // E) + o % C // E
        keys = heads[:, None] + row[None, :] * (C // E)
        at = (keys * T + position[None, :]) * E + (o % E)[:, None]
        tl.store(cache_ptr + at, y, mask=inside & active[None, :] & (o >= C)[:, None])


@triton.jit
def normalize_kernel(h_ptr, weight_ptr, bias_ptr, out_ptr, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    """out = LN(h), with one program a query. It is used where there are too many queries for every program to do it."""
    at = tl.program_id(0).to(tl.int64) * C
    c = tl.arange(0, BLOCK)
    h = tl.load(h_ptr + at + c, mask=c < C, other=0.0)
    centred = tl.where(c < C, h - tl.sum(h, axis=0) / C, 0.0)
    centred = tl.where(c < C, centred - tl.sum(centred, axis=0) / C, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / C + eps)
    gain = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    shift = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(out_ptr + at + c, (centred * scale * gain + shift).to(out_ptr.dtype.element_ty), mask=c < C)


def linear(x, weight, bias, *, out, scratch, epilogue, norm=None, append=None, tuned_queries=None):
    """One of the three layers above, in place.

    Args:
        x: (M, inputs); the residual stream h, fp32, where there is a norm, else in the storage type.
        weight, bias: (outputs, inputs) and (outputs,), storage type.
        out: (M, C) queries, (M, outputs) activations, or (M, outputs) fp32 residual stream.
        scratch: what `tuning_step.scratch` asked for: partials fp32, counters int32 (zero), normalized (M, inputs).
        epilogue: "append", "gelu" or "residual".
        norm: the `Norm` before, or None.
        append: the `Append` of the epilogue "append".
        tuned_queries: number of queries whose tiles are taken; M by default.
    """
    (M, inputs), outputs = x.shape, weight.shape[0]
    cache, starts, W = append or (out, scratch["counters"], 1)
    R, T, E = (cache.shape[1], cache.shape[3], cache.shape[4]) if append else (M, 1, 1)
    config = tuning_step.linear(
        M=tuned_queries or M, outputs=outputs, inputs=inputs, dtype=weight.dtype, norm=norm is not None
    )
    fused = config.pop("NORM")
    gain, shift, eps = norm or (bias, bias, 0.0)
    with on(x.device):
        if norm and not fused:
            normalized = scratch["normalized"]
            normalize_kernel[(M,)](x, gain, shift, normalized, eps, C=inputs, **tuning_step.normalize(inputs))
            x = normalized
        grid = (cdiv(outputs, config["BLOCK_OUT"]) * cdiv(M, config["BLOCK_M"]), config["SPLITS"])
        linear_kernel[grid](
            in_ptr=x, weight_ptr=weight, bias_ptr=bias, norm_weight_ptr=gain, norm_bias_ptr=shift,
            out_ptr=out, cache_ptr=cache, start_ptr=starts,
            partial_ptr=scratch["partials"], counter_ptr=scratch["counters"],
            M=M, W=W, R=R, T=T, eps=eps,
            OUTPUTS=outputs, INPUTS=inputs, E=E, NORM=bool(norm) and fused, EPILOGUE=epilogue,
            DOT=dot_type(weight.dtype), **config,
        )  # fmt: skip
