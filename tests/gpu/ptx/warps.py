"""Instructions that a warp computes together, on arrays (warps, 32): shuffles, ldmatrix and mma.sync.

The layouts are those of the PTX ISA: shfl.sync, ldmatrix, and "Matrix fragments for mma.m16n8k16" and ".m16n8k8".
With g = lane / 4 and t = lane % 4, a thread holds of A (16 x 16) rows g and g + 8, columns 2t, 2t + 1, 2t + 8, 2t + 9;
of B (16 x 8) those rows of column g; and of the sums (16 x 8) rows g and g + 8, columns 2t and 2t + 1.
"""

import numpy as np

from ptx.kinds import halves

LANES = np.arange(32)


def sources(mode, by, control):
    """The lane that each thread of a shuffle reads, from arrays (warps, 32) of its last two operands."""
    by, control = by.astype(np.int64) & 31, control.astype(np.int64)
    clamp, segment = control & 31, (control >> 8) & 31
    least, most = LANES & segment, (LANES & segment) | (clamp & ~segment)
    if mode == "up":
        wanted = LANES - by
        valid = wanted >= most
    else:
        wanted = {"down": LANES + by, "bfly": LANES ^ by, "idx": least | (by & ~segment)}[mode]
        valid = wanted <= most
    return np.where(valid, wanted, LANES)


def shuffle(values, lanes):
    """values (warps, 32), each thread's taken from the lane it names."""
    return np.take_along_axis(values, lanes, 1)


def matrices(rows, transposed):
    """ldmatrix: rows (warps, matrices, 8, 8) of 16 bits -> registers (matrices, warps, 32) of 32 bits."""
    rows = rows.swapaxes(2, 3) if transposed else rows
    warps, count = rows.shape[:2]
    registers = np.ascontiguousarray(rows).view(np.uint32).reshape(warps, count, 32)
    return registers.swapaxes(0, 1)


def multiply(a, b, c, kind):
    """mma.sync.m16n8k16 (a: 4 registers, b: 2) and m16n8k8 (2 and 1), with c and the result 4 registers of float32.

    a, b: (registers, warps, 32) uint32 with two numbers of 16 bits each; c: (4, warps, 32) float32.
    The products and their sum with c are taken in float64, and rounded once.
    """
    warps, steps = a.shape[1], len(b)
    a, b = (halves(np.ascontiguousarray(x), kind + "x2") for x in (a, b))
    # a: register = (half of k, half of the rows), lane = (g, t), pair
    a = a.reshape(steps, 2, warps, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 8 * steps)
    b = b.reshape(steps, warps, 8, 4, 2).transpose(1, 0, 3, 4, 2).reshape(warps, 8 * steps, 8)
    total = np.matmul(a, b)
    total = total.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, warps, 32)
    return (total + c.astype(np.float64)).astype(np.float32)
