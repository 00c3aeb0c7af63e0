"""Launch configurations of the Triton kernels: one place, chosen by shape, storage and architecture.

Nothing is tuned at import or while running: the same call always launches the same kernel, so the same bits come out,
and every configuration named here is compiled in the tests (tests/test_triton_compile.py), where none may spill.
"""

from typing import NamedTuple

import torch
import triton

ARCHITECTURES = (80, 90)  # what the tests compile for; anything newer takes the configurations of 90


class Tiles(NamedTuple):
    """A program owns block_m tokens and walks over the others block_n at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Rows(NamedTuple):
    """A program owns `rows` rows at a time and `columns` columns of them, a power of two each."""

    rows: int
    columns: int
    num_warps: int


# ---- attention -------------------------------------------------------------------------------------------------------

# Of (head size, architecture): 16-bit storage. Tiles that keep both accumulators in registers; on sm_90 a warp group of
# four warps owns 64 rows, the smallest wgmma.
_FORWARD = {
    (16, 80): Tiles(128, 64, 4, 3),
    (32, 80): Tiles(128, 64, 4, 3),
    (64, 80): Tiles(128, 64, 4, 3),
    (128, 80): Tiles(128, 64, 8, 2),
    (16, 90): Tiles(128, 64, 4, 3),
    (32, 90): Tiles(128, 64, 4, 3),
    (64, 90): Tiles(128, 64, 8, 3),
    (128, 90): Tiles(128, 64, 8, 2),
}
_BACKWARD_QUERY = {
    (16, 80): Tiles(64, 64, 4, 3),
    (32, 80): Tiles(64, 64, 4, 3),
    (64, 80): Tiles(64, 64, 4, 2),
    (128, 80): Tiles(64, 32, 4, 2),
    (16, 90): Tiles(64, 64, 4, 3),
    (32, 90): Tiles(64, 64, 4, 3),
    (64, 90): Tiles(128, 64, 8, 2),
    (128, 90): Tiles(128, 64, 8, 2),
}
_BACKWARD_KEY = {
    (16, 80): Tiles(64, 64, 4, 3),
    (32, 80): Tiles(64, 64, 4, 3),
    (64, 80): Tiles(64, 64, 4, 2),
    (128, 80): Tiles(64, 32, 4, 2),
    (16, 90): Tiles(64, 64, 4, 3),
    (32, 90): Tiles(64, 64, 4, 3),
    (64, 90): Tiles(128, 64, 8, 2),
    (128, 90): Tiles(128, 64, 8, 2),
}
ATTENTION = {"forward": _FORWARD, "query": _BACKWARD_QUERY, "key": _BACKWARD_KEY}

L2_BYTES = 32 << 20  # keys and values of the heads worked on together should stay in the 40 to 50 MB of an A100 or H100


def attention(part, head_size, dtype, arch):
    """Tiles of the attention kernel `part`: forward, query (dq) or key (dk, dv)."""
    if dtype == torch.float32:  # no tensor cores for IEEE float32: a dot is a loop over registers
        return Tiles(32, 32, 4, 1)
    return ATTENTION[part][head_size, arch]


def attention_heads_together(T, head_size, dtype):
    """How many heads are worked on at a time, so that their keys and values stay in the L2 cache."""
    return max(1, L2_BYTES // (2 * T * head_size * dtype.itemsize))


# ---- rows and columns ------------------------------------------------------------------------------------------------

AFFINE_TILE = 2048  # elements a program: 16 a thread at 4 warps, no spills on sm_80 and sm_90 in fp32
AFFINE_WARPS = 4

NORM_WIDTH = 16384  # the widest row that one program holds in registers

PARTIAL_SUMS = 528  # rows of partial sums a gradient of a weight is added from: 4 programs on each of 132 processors


def layer_norm(C):
    """Whole rows of C numbers a program, about 2048 numbers at 4 warps."""
    columns = triton.next_power_of_2(C)
    warps = min(max(columns // 512, 4), 16)
    return Rows(max(1, 2048 // columns), columns, warps)


def bias(N):
    """A tile of rows of N numbers: wide enough for 16-byte loads, several rows where N is small."""
    columns = min(triton.next_power_of_2(N), 512)
    return Rows(2048 // columns, columns, 4)


def column_sums(count):
    """Rows of partial sums added at a time; 64 columns a program, so that even 768 columns fill 12 programs."""
    return Rows(min(triton.next_power_of_2(max(count, 1)), 32), 64, 4)
