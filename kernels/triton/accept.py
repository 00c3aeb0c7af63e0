"""What a pass over a window makes of its tokens: the rule of tarflow_fast/solvers/windows.py, row by row on the device.

    v = transform^-1(z; parameters);   token i+1 is accepted if all earlier ones are final and max |v - u| <= tolerance

u are the values in x that the pass computed with. Accepted tokens keep u. The first one that is not takes v and is
final too. Later tokens take v, and those that enter the window are guessed with the parameters of the last final one.

A program owns a row. It reads nothing that it has written. It leaves a row that is done as it is: a pass too many
changes nothing.
"""

import triton
import triton.language as tl
from tarflow_fast.kernels.triton.device import on
from tarflow_fast.kernels.triton.exponential import exp

STATE = ("final", "alone", "idle", "fallbacks", "lost", "taken")  # of each row, int32
TILE = 1024


@triton.jit
def accept_kernel(
    # what the pass gave: (B, W, D) and (B, W, P D)
    v_ptr,
    parameters_ptr,
    # the noise and the tokens, (B, T, D), and the order in which the net sees them
    z_ptr,
    x_ptr,
    order_ptr,
    # of the rows: state (6, B), places (2, R), the largest residual (B,), tokens by pass (., B)
    state_ptr,
    starts_ptr,
    residual_ptr,
    history_ptr,
    # tokens of all rows that are not final, one number
    left_ptr,
    tolerance,
    # sizes; last: the place of the last token; R is B, or 2B where there is guidance
    W,
    last,
    B,
    R,
    T,
    D: tl.constexpr,
    # what is asked for; EXACT: no bit may move
    SCALE: tl.constexpr,
    EXACT: tl.constexpr,
    # tiles
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0)
    old = tl.load(state_ptr + row)
    if old >= last:
        return
    slow, lost = old < tl.load(state_ptr + B + row), tl.load(state_ptr + 4 * B + row) != 0
    idle = tl.load(state_ptr + 2 * B + row)
    begin = tl.load(starts_ptr + row)
    d, wide = tl.arange(0, BLOCK_D)[None, :], row.to(tl.int64)
    x_row, z_row, v_row = x_ptr + wide * T * D + d, z_ptr + wide * T * D + d, v_ptr + wide * W * D + d

    stop, peak = tl.full((), 0, tl.int32) + W, tl.full((), 0.0, tl.float32)  # tokens of the accepted prefix, residual
    for first in range(0, W, BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        known = begin + 1 + w <= old
        inside = (w < W)[:, None] & (d < D)
        place = tl.load(order_ptr + tl.minimum(begin + 1 + w, last))[:, None]
        u = tl.load(x_row + place * D, mask=inside, other=0.0)
        v = tl.load(v_row + w[:, None] * D, mask=inside, other=0.0)
        gap = tl.abs(v - u)
        if EXACT:
            equal = v.to(tl.int32, bitcast=True) == u.to(tl.int32, bitcast=True)
        else:
            equal = gap <= tolerance  # NaN is not
        # The last token of a window was no input of the pass.
        same = (tl.min(equal.to(tl.int32), axis=1) > 0) & (w < W - 1) & (slow == 0)
        stop = tl.minimum(stop, tl.min(tl.where(known | same, W, w), axis=0))
        moved = tl.max(tl.where(((w < stop) & (known == 0))[:, None], gap, 0.0), axis=1)
        peak = tl.maximum(peak, tl.max(moved, axis=0))

    end = begin + W
    final = tl.maximum(old, tl.where(lost & (slow == 0), end, tl.minimum(begin + 1 + stop, end)))
    at_last = final - 1 - begin  # the place in the window of the last final token
    parameters = parameters_ptr + (wide * W + at_last) * (D * (2 if SCALE else 1)) + d
    shift = tl.load(parameters + (D if SCALE else 0), mask=d < D, other=0.0)
    if SCALE:
        scale = exp(tl.load(parameters, mask=d < D, other=0.0))
    ends = tl.load(v_row + at_last * D, mask=d < D, other=0.0)
    lost_now = lost | (tl.min((tl.abs(ends) < float("inf")).to(tl.int32)) == 0)

    for first in range(0, 2 * W, BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        token = begin + 1 + w
        inside = (w < W)[:, None] & (d < D)
        there = ((token <= last) & (w < 2 * W))[:, None] & (d < D)
        place = tl.load(order_ptr + tl.minimum(token, last))[:, None]
        v = tl.load(v_row + w[:, None] * D, mask=inside, other=0.0)
        guess = tl.load(z_row + place * D, mask=there, other=0.0)
        guess = guess * scale + shift if SCALE else guess + shift
        finite = tl.min((tl.abs(v) < float("inf")).to(tl.int32), axis=1) > 0
        fresh = (token > final) & ((w >= W) | slow | (finite == 0))
        kept = (token <= old) | ((w < stop) & (lost == 0))
        tl.store(x_row + place * D, tl.where(fresh[:, None], guess, v), mask=there & (kept == 0)[:, None])

    fast = (slow == 0) & (W > 1)
    idle = tl.where((old == begin) & (final == old + 1), idle + fast.to(tl.int32), 0)
    hopeless = (idle >= W) & (final < last) & (W > 1)
    taken = tl.load(state_ptr + 5 * B + row)
    tl.store(state_ptr + row, final)
    tl.store(state_ptr + B + row, final + W, mask=hopeless)
    tl.store(state_ptr + 2 * B + row, tl.where(hopeless, 0, idle))
    tl.store(state_ptr + 3 * B + row, tl.load(state_ptr + 3 * B + row) + 1, mask=hopeless)
    tl.store(state_ptr + 4 * B + row, lost_now.to(tl.int32))
    tl.store(state_ptr + 5 * B + row, taken + 1)
    tl.store(history_ptr + taken * B + row, final - old)
    tl.store(residual_ptr + row, tl.maximum(tl.load(residual_ptr + row), peak))
    next_begin = tl.minimum(final, last - W)
    tl.store(starts_ptr + R + row, next_begin)
    tl.store(starts_ptr + 2 * R - B + row, next_begin)  # the unguided row, where there is one
    tl.atomic_add(left_ptr, old - final)


def accept(*, v, parameters, z, x, order, state, starts, residual, history, left, tolerance, last):
    """Takes what a pass over W tokens of each row gave, moves the rows on in starts[1], and counts what is left.

    Args:
        v, parameters: (B, W, D) and (B, W, P D) fp32, of the tokens after starts[0] .. + W - 1.
        z, x: (B, T, D) fp32; order: (T,) int32, order[i] is the place in them of the i-th token of the net.
        state: (6, B) int32, named by STATE; starts: (2, R) int32, R = B or 2B.
        residual: (B,) fp32; history: (passes, B) int32; left: (1,) int32.
        tolerance: 0 accepts tokens of which no bit moved.
        last: the place of the last token, in the order of the net; W <= last < T.
    """
    (B, W, D), T = v.shape, x.shape[1]
    block_d = triton.next_power_of_2(D)
    block_w = min(max(TILE // block_d, 1), triton.next_power_of_2(W))
    with on(x.device):
        accept_kernel[(B,)](
            v_ptr=v, parameters_ptr=parameters, z_ptr=z, x_ptr=x, order_ptr=order,
            state_ptr=state, starts_ptr=starts, residual_ptr=residual, history_ptr=history,
            left_ptr=left, tolerance=float(tolerance), W=W, last=last, B=B, R=starts.shape[1], T=T, D=D,
            SCALE=parameters.shape[2] == 2 * D, EXACT=tolerance == 0,
            BLOCK_W=block_w, BLOCK_D=block_d, num_warps=4 if block_d <= 2 * TILE else 8,
        )  # fmt: skip
