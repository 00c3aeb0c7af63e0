"""What the kernels of a sampling step share: where a query stands, and how programs that split a sum meet.

A step runs W queries of each of R rows: query m = r W + w of row r stands at position start[r] + w of net order. The
positions live in device memory, `starts` (2, R) int32, so that one captured graph serves every token. The last kernel
of a step writes starts[1], and the first kernel of the next one copies it to starts[0], which all other kernels read.
No kernel reads what it writes itself, so there is no race, and no kernel is needed that only counts.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def query_places(start_ptr, m, M, W, T):
    """Row and position of the queries m, and which of them compute.

    The last token conditions nothing, so it needs no pass.
    """
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
    """True in the last of `expected` programs that call it. By then the stores of all of them can be read.

    The last one adds up in a fixed order, so the bits do not show which one it is. It leaves the counter at zero for
    the next launch. The barrier puts the stores of every thread before the release by the one thread that counts.
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
