"""Launch configurations of the Triton kernels of training and density, chosen by shape, storage and architecture.

Nothing is tuned at import or while running. So the same call always launches the same kernel, and the same bits come
out. tests/test_training_compile.py compiles every configuration named here, and none may spill.
"""

from typing import NamedTuple

import torch
import triton


class Tiles(NamedTuple):
    """A program owns `own` tokens and walks over the others `walk` at a time."""

    own: int
    walk: int
    num_warps: int
    num_stages: int


class Rows(NamedTuple):
    """A program owns `rows` rows at a time and `columns` columns of them. Each is a power of two."""

    rows: int
    columns: int
    num_warps: int


# ---- attention -------------------------------------------------------------------------------------------------------

# (head size, architecture): Tiles(own, walk, num_warps, num_stages), for 16-bit storage. Accumulators stay in
# registers, and `walk` divides `own`. On sm_90 a group of four warps owns 64 rows, which is the smallest wgmma. Up to
# head size 64 the registers leave room for a second program on the processor, whose products run while the first
# computes its exponentials.
_FORWARD = {
    (16, 80): Tiles(128, 64, 4, 3),
    (32, 80): Tiles(128, 64, 4, 3),
    (64, 80): Tiles(128, 64, 4, 3),
    (128, 80): Tiles(128, 32, 8, 2),
    (16, 90): Tiles(128, 64, 4, 3),
    (32, 90): Tiles(128, 64, 4, 3),
    (64, 90): Tiles(128, 64, 8, 3),
    (128, 90): Tiles(128, 64, 8, 2),
}
_QUERY = {
    (16, 80): Tiles(64, 64, 4, 3),
    (32, 80): Tiles(64, 64, 4, 3),
    (64, 80): Tiles(64, 32, 4, 2),
    (128, 80): Tiles(64, 32, 4, 2),
    (16, 90): Tiles(64, 64, 4, 3),
    (32, 90): Tiles(64, 64, 4, 3),
    (64, 90): Tiles(128, 64, 8, 3),
    (128, 90): Tiles(128, 64, 8, 2),
}
_KEY = {
    (16, 80): Tiles(64, 64, 4, 3),
    (32, 80): Tiles(64, 64, 4, 3),
    (64, 80): Tiles(64, 32, 4, 2),
    (128, 80): Tiles(64, 32, 4, 2),
    (16, 90): Tiles(64, 64, 4, 3),
    (32, 90): Tiles(64, 64, 4, 3),
    # Walking 64 at a time, the assembler has no registers left to keep products under way, and waits for each of them.
    (64, 90): Tiles(64, 32, 4, 2),
    (128, 90): Tiles(128, 32, 8, 2),
}
# Tensor cores have no IEEE float32. A product is then a loop over registers, so the tiles are small.
_FLOAT32 = {
    ("forward", 64): Tiles(32, 32, 4, 1),
    ("query", 64): Tiles(32, 32, 8, 1),
    ("key", 64): Tiles(32, 32, 8, 1),
    ("forward", 128): Tiles(32, 16, 8, 1),
    ("query", 128): Tiles(16, 16, 8, 1),
    ("key", 128): Tiles(32, 16, 8, 1),
}
_SIXTEEN_BIT = {"forward": _FORWARD, "query": _QUERY, "key": _KEY}

HEAD_SIZES = (16, 32, 64, 128)
# Keys and values of the heads worked on together should stay in the L2 cache: an A100 has 40 MB of it, an H100 50 MB.
L2_BYTES = 32 << 20


def attention(part, head_size, dtype, arch):
    """Tiles of the attention kernel `part`: forward, query (dq) or key (dk, dv)."""
    if dtype == torch.float32:
        return _FLOAT32.get((part, head_size), Tiles(32, 32, 4, 1))
    return _SIXTEEN_BIT[part][head_size, arch]


def attention_heads_together(T, head_size, dtype):
    """How many heads are worked on at a time, so that their keys and values stay in the L2 cache."""
    return max(1, L2_BYTES // (2 * T * head_size * dtype.itemsize))


# ---- rows and columns ------------------------------------------------------------------------------------------------

AFFINE_TILE = 2048  # elements a program: 8 a thread, which is 16 bytes of 16-bit storage
AFFINE_WARPS = 8  # with 4, the backward of mixed types spills a register

NORM_WIDTH = 8192  # the widest row that one program of layer_norm holds in registers
# Programs of a kernel that adds up columns: 4 for each of the 132 processors of an H100. The number is the same on
# every GPU, so that the sums do not depend on the GPU at hand.
PROGRAMS = 528


def layer_norm(C):
    """Whole rows of C numbers a program: 8 numbers a thread, 16 bytes of 16-bit storage, or 16 numbers in long rows."""
    columns = triton.next_power_of_2(C)
    return Rows(rows=max(1, 1024 // columns), columns=columns, num_warps=min(max(columns // 512, 4), 16))


def bias(N):
    """Tiles of rows of N numbers: wide enough for 16-byte loads, and several rows high where N is small."""
    columns = min(triton.next_power_of_2(N), 512)
    return Rows(rows=2048 // columns, columns=columns, num_warps=4)


COLUMN_SUMS = Rows(rows=32, columns=64, num_warps=4)  # 64 columns a program: even rows of 768 keep 12 programs busy
