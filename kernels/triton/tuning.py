"""Launch configurations of the Triton kernels: one place, chosen by shape, storage and architecture.

Nothing is tuned at import or while running: the same call always launches the same kernel, so the same bits come out,
and every configuration named here is compiled in the tests (tests/test_training_compile.py), where none may spill.
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
    """A program owns `rows` rows at a time and `columns` columns of them, a power of two each."""

    rows: int
    columns: int
    num_warps: int


# ---- attention -------------------------------------------------------------------------------------------------------

# Of (head size, architecture), for 16-bit storage. Accumulators stay in registers; `walk` divides `own`. On sm_90 a
# group of four warps owns 64 rows, the smallest wgmma, and (up to head size 64) the registers leave room for a second
# program on the processor, whose products run while the first is at its exponentials.
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
    (64, 90): Tiles(64, 64, 4, 2),
    (128, 90): Tiles(128, 32, 8, 2),
}
# IEEE float32 has no tensor cores: a product is a loop over registers, and tiles are small.
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
L2_BYTES = 32 << 20  # keys and values of the heads worked on together should stay in the 40 to 50 MB of an A100 or H100


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
AFFINE_WARPS = 8  # 4 spill a register in the backward of mixed types

NORM_WIDTH = 8192  # the widest row that one program of layer_norm holds in registers
PROGRAMS = 528  # of kernels that add up columns: 4 on each of 132 processors; the sums do not depend on the GPU at hand


def layer_norm(C):
    """Whole rows of C numbers a program: 8 numbers a thread, which is 16 bytes of 16-bit storage, 16 in long rows."""
    columns = triton.next_power_of_2(C)
    return Rows(rows=max(1, 1024 // columns), columns=columns, num_warps=min(max(columns // 512, 4), 16))


def bias(N):
    """Tiles of rows of N numbers: wide enough for 16-byte loads, several rows where N is small."""
    columns = min(triton.next_power_of_2(N), 512)
    return Rows(rows=2048 // columns, columns=columns, num_warps=4)


COLUMN_SUMS = Rows(rows=32, columns=64, num_warps=4)  # 64 columns a program: even 768 of them keep 12 programs busy
