"""exp as the kernels compute it."""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """exp(x). fp32: without the rounding of x log2(e) that tl.exp takes along, an error that grows with |x|: at -12 it
    is past twice that of the correctly rounded product, at -40 four times."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        t = x * 1.4426950408889634
        rest = tl.fma(x, tl.full(x.shape, 1.4426950408889634, tl.float32), -t) + x * 1.9259629911e-8
        rest = tl.where(tl.abs(rest) < 1.0, rest, 0.0)  # of infinities nothing is left over
        y = tl.exp2(t) * (1.0 + rest * 0.6931471805599453)
    return y
