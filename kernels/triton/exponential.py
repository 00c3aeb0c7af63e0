"""exp as the kernels compute it."""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """exp(x), in fp32 without the rounding of x log2(e), which tl.exp takes along.

    The error of that rounding grows with |x|. At -12 the result is more than twice as far off as with the correctly
    rounded product, and at -40 four times.
    """
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        t = x * 1.4426950408889634
        rest = tl.fma(x, tl.full(x.shape, 1.4426950408889634, tl.float32), -t) + x * 1.9259629911e-8
        rest = tl.where(tl.abs(rest) < 1.0, rest, 0.0)  # that of an infinity is NaN
        y = tl.exp2(t) * (1.0 + rest * 0.6931471805599453)
    return y
