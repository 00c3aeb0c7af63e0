"""What the kernels of causal attention share: the tiles they read and write, the order of work, and the launch.

A program owns a tile of BLOCK_OWN tokens of one head (queries forward and for dq, keys for dk and dv) and walks over
the other side BLOCK_WALK tokens at a time. A walk is a loop without mask over the tiles off the diagonal, and a loop
with mask over the tiles on it. Rows past T are read as zeros and are never written. A key past T is later than every
query, so the causal mask leaves it out.
"""

import math

import triton
import triton.language as tl
from tarflow_fast.kernels.triton import tuning
from tarflow_fast.kernels.triton.device import architecture

# lse, and the statistics of the backward pass, have room for whole tiles, so that no row of them is ever masked. Their
# length is T rounded up to a multiple of this.
PADDING: tl.constexpr = tl.constexpr(128)


@triton.jit
def owned_tile(T, heads, together, BLOCK_OWN: tl.constexpr, LAST_IS_HEAVY: tl.constexpr):
    """(tile, head) of this program.

    The programs work on `together` heads at a time, so that the keys and values of these stay in the cache. Of their
    tiles those with the most work come first, so that none of them is left for the end. Everything lies on one grid
    axis, because the other axes end at 65535.
    """
    tiles = tl.cdiv(T, BLOCK_OWN)
    item = tl.program_id(0)
    first = item // (together * tiles) * together
    count = tl.minimum(together, heads - first)
    place = item - first * tiles
    tile = place // count
    return tiles - 1 - tile if LAST_IS_HEAVY else tile, first + place % count


@triton.jit
def load_tile(pointer, stride, at, T, BLOCK: tl.constexpr, E: tl.constexpr, WHOLE: tl.constexpr):
    """Tokens at .. at + BLOCK of a head, (BLOCK, E). pointer: to the first of them. WHOLE: all of them are before T."""
    token, e = tl.arange(0, BLOCK)[:, None], tl.arange(0, E)[None, :]
    if WHOLE:
        return tl.load(pointer + token * stride + e)
    return tl.load(pointer + token * stride + e, mask=at + token < T, other=0.0)


@triton.jit
def store_tile(pointer, stride, value, at, T, WHOLE: tl.constexpr):
    """The inverse of `load_tile`, in the pointer's type."""
    token, e = tl.arange(0, value.shape[0])[:, None], tl.arange(0, value.shape[1])[None, :]
    value = value.to(pointer.dtype.element_ty)
    if WHOLE:
        tl.store(pointer + token * stride + e, value)
    else:
        tl.store(pointer + token * stride + e, value, mask=at + token < T)


def launch(part, query, temperature):
    """The grid of the kernel `part` ("forward", "query" or "key"), and the arguments that all three have in common."""
    B, T, H, E = query.shape
    tiles = tuning.attention(part, E, query.dtype, architecture(query.device))
    stride_b, stride_t, stride_h, _ = query.stride()
    arguments = {
        "T": T,
        "heads": B * H,
        "H": H,
        "together": tuning.attention_heads_together(T, E, query.dtype),
        "stride_b": stride_b,
        "stride_t": stride_t,
        "stride_h": stride_h,
        "scale": E**-0.5 / temperature * math.log2(math.e),  # the kernels exponentiate to the base 2
        "E": E,
        "EVEN": T % tiles.own == 0 and T % tiles.walk == 0,
        "BLOCK_OWN": tiles.own,
        "BLOCK_WALK": tiles.walk,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    return (triton.cdiv(T, tiles.own) * B * H,), arguments
