"""The types of PTX as numpy types, and the conversions between floats. A register holds the bits of its width."""

import numpy as np

# bf16 has no numpy type, so its registers stay bits.
NUMPY = {
    "pred": np.bool_,
    **{name: np.uint16 for name in ("b16", "u16", "bf16")},
    **{name: np.uint32 for name in ("b32", "u32", "bf16x2", "f16x2")},
    **{name: np.uint64 for name in ("b64", "u64")},
    **{"b8": np.uint8, "u8": np.uint8, "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64},
    **{"f16": np.float16, "f32": np.float32, "f64": np.float64},
}
NUMPY = {name: np.dtype(kind) for name, kind in NUMPY.items()}
STORAGE = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
NAN16 = np.uint16(0x7FFF)
TIE = np.uint64(1 << 28)  # the bits of a float64 past those of a float32, when it lies halfway between two of them
BELOW = np.uint64((1 << 29) - 1)


def size_of(kind):
    """Bytes of a type."""
    return NUMPY[kind].itemsize


def storage_of(kind):
    """The numpy type that a register of this type holds."""
    return NUMPY["pred"] if kind == "pred" else STORAGE[size_of(kind)]


def from_bf16(bits):
    """float32 of bf16 bits, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x):
    """The bits of float32 x rounded to bf16, to nearest and ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), NAN16, rounded.astype(np.uint16))


def to_f16(x):
    """The bits of x rounded to fp16, to nearest and ties to even."""
    return np.where(np.isnan(x), NAN16, x.astype(np.float16).view(np.uint16))


def flush(x):
    """x with subnormal numbers replaced by zeros of their sign (ftz)."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def to_odd(total, dropped):
    """float64 sums rounded to odd: an inexact one ends in a bit of 1, so that another rounding is the only one.

    dropped: what the sum lacks to the exact one.
    """
    even = (np.atleast_1d(total).view(np.uint64) & np.uint64(1)) == 0
    stepped = np.nextafter(total, np.where(dropped > 0, np.inf, -np.inf))
    return np.where(even & (dropped != 0) & np.isfinite(dropped), stepped, total)


def add64(a, b):
    """(float64 sum, what it lacks to the exact sum)."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def halves(registers, kind):
    """float64 numbers of 16-bit registers, or of the two halves of 32-bit ones in a new last dimension."""
    if kind.endswith("x2"):
        registers = np.ascontiguousarray(registers).view(np.uint16).reshape(*registers.shape, 2)
    bits = registers.view(np.uint16)
    return (from_bf16(bits) if kind.startswith("bf16") else bits.view(np.float16)).astype(np.float64)


def from_halves(x, kind):
    """The inverse of `halves`, rounded to nearest and ties to even."""
    if kind.startswith("bf16"):
        near = x.astype(np.float32)
        wide = near.astype(np.float64)
        away = np.where(x > wide, np.float32(np.inf), np.float32(-np.inf))
        even = (near.view(np.uint32) & np.uint32(1)) == 0
        bits = to_bf16(np.where((wide != x) & even & np.isfinite(near), np.nextafter(near, away), near))
    else:
        bits = to_f16(x)
    return np.ascontiguousarray(bits).view(np.uint32)[..., 0] if kind.endswith("x2") else bits


def fma32(a, b, c):
    """a b + c of float32, rounded once.

    The product is exact in float64. The sum is rounded to float64 and then to float32. These two roundings differ from
    one only where the first made a tie; there the first is undone by a step towards what it dropped.
    """
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    tie = (np.atleast_1d(total).view(np.uint64) & BELOW) == TIE
    if tie.any():
        _, dropped = add64(product, c)
        stepped = np.nextafter(total, np.where(dropped > 0, np.inf, -np.inf))
        total = np.where(tie & (dropped != 0), stepped, total)
    return total.astype(np.float32)
