"""What the kernels of a sampling step share: where a query stands, and how programs that split a sum meet.

A step runs W queries of each of R rows: query m = r W + w of row r stands at position start[r] + w of net order. The
positions live in device memory, `starts` (2, R) int32, so that one captured graph serves every token: starts[1] is
written by the end of a step, and its first kernel copies it to starts[0], which all others read. No kernel reads what
it writes itself, hence no race, and no kernel of its own to count.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def query_places(start_ptr, m, M, W, T):
    """Row and position of queries m, and which of them compute: the last token conditions nothing and needs no pass."""
    row = m // W
    position = tl.load(start_ptr + row, mask=m < M, other=T) + m % W
    return row.to(tl.int64), position, (m < M) & (position < T - 1)


@triton.jit
def place_of(order_ptr, i, T):
    """The place in x, z and pos_embed of the i-th token that the net sees.

    A query past the end gets the place of the last token, and nothing uses it. A masked load would do the same, but it
    makes the fp32 head of a step spill two registers on sm_80.
    """
    return tl.load(order_ptr + tl.minimum(i, T - 1))


@triton.jit
def last_to_arrive(counter_ptr, expected):
    """True in the last of `expected` programs that call it; by then the stores of all of them can be read.

    The last one sums in a fixed order, so who it is does not show in the bits. It leaves the counter at zero for the
    next launch. The barrier puts every thread's stores before the release of the one thread that counts.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    last = arrived == expected - 1
    tl.store(counter_ptr, 0, mask=last)
    return last


def dot_type(dtype):
    """The type of the operands of tl.dot for tensors stored as `dtype`."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


cdiv = triton.cdiv
