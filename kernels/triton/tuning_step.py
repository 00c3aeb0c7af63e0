"""Launch configurations of the sampling step's kernels, chosen by shape alone. M = R W queries.

Nothing is measured, at import or later, so the same call gives the same bits.

With few queries the time is that of reading weights and cache. So tiles are narrow until there are enough programs to
keep every memory channel busy. With many queries the weights' side of a tile is 64, which is a wgmma on sm_90.

The number of rows decides the following, and with it the order of sums and the last bits of a result:

    embed, tail        nothing: rows only decide how many programs there are
    linear             up to M = FEW one configuration serves all. Above it BLOCK_OUT and BLOCK_IN change, LayerNorm is
                       a kernel of its own, and SPLITS falls as ceil(M / BLOCK_M) grows
    attention          SPLITS falls as R H grows, and is 1 once RESIDENT programs are there

One number of splits for all would leave memory channels idle where there is one image, or move many partial sums where
there are many. So every launch function takes the number of rows (or queries) to be tuned for. A caller that solves a
batch in parts passes the number of the whole batch, and gets its bits (tests/test_step_bits.py).
"""

import torch
import triton

PROGRAMS = 132  # multiprocessors of an H100 or H200; an A100 has 108
# From 48 programs on attention is split until there are so many, 4 a multiprocessor, because a program mostly waits for
# its keys. Fewer programs have little to read in all, and more parts would cost them more than they hide. This is an
# estimate, and was not measured.
RESIDENT = 4 * PROGRAMS
FEW = 16  # up to so many queries LayerNorm is cheaper in every program of the next layer than as a kernel of its own
MAX_SPLITS = {"linear": 8, "attention": 16}  # the last program of a tile adds up so many parts at most


def _divisor(size, limit):
    """The largest power of two that divides `size`, at most `limit`."""
    return min(size & -size, limit)


def _queries(M):
    return min(max(triton.next_power_of_2(M), 16), 64)


def linear(*, M, outputs, inputs, dtype, norm):
    """Tiles of a linear layer of M queries, and whether it normalizes its input itself."""
    few, wide = M <= FEW, dtype == torch.float32
    # Tensor cores do not multiply fp32 in full precision. Its operands sit in registers, so its tiles are smaller.
    block_out = min(16 if few else 32 if wide else 64, triton.next_power_of_2(outputs))
    block_m = min(_queries(M), 32 if wide else 64)
    block_in = _divisor(inputs, (64 if few else 32) if wide else (256 if few else 64))
    programs = triton.cdiv(outputs, block_out) * triton.cdiv(M, block_m)
    splits = min(MAX_SPLITS["linear"], triton.cdiv(PROGRAMS, programs), inputs // block_in)
    splits = triton.cdiv(inputs // block_in, triton.cdiv(inputs // block_in, splits))  # no split is left without work
    return {
        "NORM": norm and few,
        "SPLITS": splits,
        "BLOCK_OUT": block_out,
        "BLOCK_M": block_m,
        "BLOCK_IN": block_in,
        # LayerNorm runs over a tile of 256 x 16, which is more than 4 warps hold on sm_80.
        "num_warps": 8 if norm and few and not wide else 4,
        "num_stages": 3,
    }


def normalize(C):
    """Settings of LayerNorm as a kernel of its own, over rows of C numbers."""
    return {"BLOCK": triton.next_power_of_2(C), "num_warps": 4}


def embed(*, M, C, D, dtype):
    """Tiles of the head of a step."""
    block_m = min(_queries(M), 32 if dtype == torch.float32 else 64)
    block_in = min(max(triton.next_power_of_2(D), 16), 64)
    return {"BLOCK_OUT": min(32, triton.next_power_of_2(C)), "BLOCK_M": block_m, "BLOCK_IN": block_in}


def attention(*, R, W, H, T, dtype, apart=False):
    """Tiles of cached attention. Keys are split where rows and heads alone cannot fill the machine.

    apart: for the solver by windows. Larger tiles of queries would spill registers.
    """
    most = 64 if not apart else 16 if dtype == torch.float32 else 32
    block_w = 1 if W == 1 else min(max(triton.next_power_of_2(W), 16), most)
    block_t = 32 if dtype == torch.float32 and W > 1 else 64
    programs = R * H * triton.cdiv(W, block_w)
    if programs < 48:
        splits = min(MAX_SPLITS["attention"], triton.cdiv(PROGRAMS, programs), triton.cdiv(T, block_t))
    else:  # at least two tiles a part
        splits = max(min(RESIDENT // programs, T // (2 * block_t)), triton.cdiv(PROGRAMS, programs))
        splits = min(splits, triton.cdiv(T, block_t))
    return {
        "ONE": W == 1,
        # Of 64 keys and values of 64 numbers two tiles are under way in 16-bit storage and one in fp32: 32 KB each.
        "STAGES": 2 if dtype == torch.float32 else 3,
        "SPLITS": splits,
        "PARTS": triton.next_power_of_2(splits),
        "BLOCK_W": block_w,
        "BLOCK_T": block_t,
        "num_warps": 4,
        "num_stages": 2,
    }


def tail(C, dtype, shallow=False):
    """Tiles of the tail of a step. They are small, because D is 12 to 192 and nothing else runs meanwhile.

    shallow: half as many inputs a tile. Under guidance four products are under way at once, and by windows a program
    writes more; deeper tiles would spill registers on sm_80.
    """
    return {
        "BLOCK_OUT": 16,
        "BLOCK_M": 16,
        "BLOCK_IN": _divisor(C, 64 if dtype == torch.float32 or shallow else 128),
        "num_warps": 4,
        "num_stages": 3,
    }


def tail_tiles(C, D, dtype):
    """How many programs share the sum over D of one token."""
    return triton.cdiv(D, tail(C, dtype)["BLOCK_OUT"])


def scratch(*, R, W, C, hidden, H, T, E, dtype, tuned_rows=None, outputs=0, apart=False):
    """Sizes of what the kernels of a step share: {name: (shape, "fp32" | "int32" | "storage")}.

    tuned_rows: number of rows whose configurations are launched; R by default.
    outputs: of proj_out, where it is a launch of its own; 0 where the tail of the step computes it.
    apart: of `attention`.
    """
    R = max(R, 1)
    M, tuned_rows = R * W, max(tuned_rows or R, 1)
    layers = [(3 * C, C), (C, C), (hidden, C), (C, hidden), *([(outputs, C)] if outputs else [])]
    partials, tiles = 0, 1
    for outputs, inputs in layers:
        config = linear(M=tuned_rows * W, outputs=outputs, inputs=inputs, dtype=dtype, norm=False)
        if config["SPLITS"] > 1:
            partials = max(partials, config["SPLITS"] * M * outputs)
            tiles = max(tiles, triton.cdiv(outputs, config["BLOCK_OUT"]) * triton.cdiv(M, config["BLOCK_M"]))
    config = attention(R=tuned_rows, W=W, H=H, T=T, dtype=dtype, apart=apart)
    sums = 0
    if config["SPLITS"] > 1:
        partials = max(partials, config["SPLITS"] * M * H * E)
        sums = config["SPLITS"] * M * H * 2
        tiles = max(tiles, R * H * triton.cdiv(W, config["BLOCK_W"]))
    normalized = 1 if tuned_rows * W <= FEW else M * C
    return {
        "partials": (max(partials, 1), "fp32"),
        "sums": (max(sums, 1), "fp32"),
        "counters": (tiles, "int32"),
        "normalized": (normalized, "storage"),
    }
