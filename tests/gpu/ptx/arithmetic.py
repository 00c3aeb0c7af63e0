"""Instructions that compute each thread's result from its own registers.

form(parts) says how: a function of numpy arrays, the types of its inputs, and the type of its output.
"""

from typing import NamedTuple

import numpy as np

from ptx.faults import Unsupported
from ptx.kinds import NUMPY, add64, flush, fma32, from_bf16, from_halves, halves, size_of, to_bf16, to_f16, to_odd


class Form(NamedTuple):
    """What an instruction computes."""

    function: object
    inputs: tuple
    output: str


FLOATS, SIGNED, HALVES = ("f32", "f64"), ("s16", "s32", "s64"), ("f16", "bf16", "f16x2", "bf16x2")
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
SIMPLE = {"add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
UNARY = {
    "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "rcp": lambda x: 1 / x, "ex2": np.exp2, "lg2": np.log2,
    "tanh": np.tanh, "sin": np.sin, "cos": np.cos,
}  # fmt: skip
QUIET = {"rn", "approx", "full", "ftz", "uni"}  # parts of a name that change no value here, or that are looked at below


def form(parts):
    """The Form of an instruction's name, or None where it is of another family. A name half known raises."""
    root, *rest = parts
    if root == "cvt":
        return _convert(parts)
    if root == "setp":
        return _compare(parts)
    if (root == "mul" and "wide" in rest) or (root == "mad" and "wide" in rest):
        kind = rest[-1]
        wide = NUMPY[WIDER[kind]]
        product = lambda a, b: a.astype(wide) * b.astype(wide)  # noqa: E731
        if root == "mul":
            return Form(product, (kind, kind), WIDER[kind])
        return Form(lambda a, b, c: product(a, b) + c, (kind, kind, WIDER[kind]), WIDER[kind])
    kind = rest[-1] if rest else ""
    if kind not in NUMPY:
        return None
    family = _float if kind in FLOATS else _half if kind in HALVES else _integer
    known = family(root, kind) if family is not _integer else _integer(root, kind, rest)
    if known is None:
        return None
    strange = set(rest[:-1]) - QUIET - {"lo", "hi", "to", "sync"}
    if strange:
        raise Unsupported(f"{'.'.join(parts)}: {', '.join(sorted(strange))}")
    return _flushing(known) if "ftz" in rest else known


def _flushing(known):
    def function(*inputs):
        return flush(known.function(*(flush(x) for x in inputs)))

    return known._replace(function=function)


def _float(root, kind):
    two = (kind, kind)
    if root in ("add", "sub"):
        return Form(SIMPLE[root], two, kind)
    if root == "mul":
        return Form(np.multiply, two, kind)
    if root == "div":
        return Form(np.divide, two, kind)
    if root in ("min", "max"):  # the number where one operand is NaN
        return Form(np.fmin if root == "min" else np.fmax, two, kind)
    if root in ("fma", "mad") and kind == "f32":
        return Form(fma32, (kind,) * 3, kind)
    if root in ("neg", "abs"):
        return Form(np.negative if root == "neg" else np.abs, (kind,), kind)
    if root in UNARY:
        name = NUMPY[kind]
        return Form(lambda x: UNARY[root](x.astype(np.float64)).astype(name), (kind,), kind)
    return _select(root, kind)


def _half(root, kind):
    """fp16 and bf16, one or two in a register. A result is rounded once."""

    def form_of(count, function):
        def run(*registers):
            return from_halves(function(*(halves(x, kind) for x in registers)), kind)

        return Form(run, (kind,) * count, kind)

    if root in ("add", "sub"):
        sign = 1 if root == "add" else -1
        return form_of(2, lambda a, b: to_odd(*add64(a, sign * b)))
    if root == "mul":
        return form_of(2, np.multiply)
    if root == "fma":
        return form_of(3, lambda a, b, c: to_odd(*add64(a * b, c)))
    if root in ("min", "max"):
        return form_of(2, np.fmin if root == "min" else np.fmax)
    if root in ("neg", "abs"):
        return form_of(1, np.negative if root == "neg" else np.abs)
    return None


def _select(root, kind):
    return Form(lambda a, b, p: np.where(p, a, b), (kind, kind, "pred"), kind) if root == "selp" else None


def _integer(root, kind, rest):
    two, bits = (kind, kind), 8 * size_of(kind)
    if root in SIMPLE:
        return Form(SIMPLE[root], two, kind)
    if root == "not":
        return Form(np.invert, (kind,), kind)
    if root == "neg":
        return Form(np.negative, (kind,), kind)
    if root == "abs":
        return Form(np.abs, (kind,), kind)
    if root in ("min", "max"):
        return Form(np.minimum if root == "min" else np.maximum, two, kind)
    if root in ("mul", "mad") and kind in NUMPY:
        product = _high(kind) if "hi" in rest else np.multiply
        if root == "mul":
            return Form(product, two, kind)
        return Form(lambda a, b, c: product(a, b) + c, (kind,) * 3, kind)
    if root in ("mul24", "mad24"):
        low = lambda a: (a << 8) >> 8  # noqa: E731  # of a signed number it extends the sign
        if root == "mul24":
            return Form(lambda a, b: low(a) * low(b), two, kind)
        return Form(lambda a, b, c: low(a) * low(b) + c, (kind,) * 3, kind)
    if root in ("div", "rem"):
        return Form(_quotient if root == "div" else _remainder, two, kind)
    if root in ("shl", "shr"):
        return Form(_shift(root, kind, bits), (kind, "u32"), kind)
    if root == "bfe":
        return Form(_extract(kind, bits), (kind, "u32", "u32"), kind)
    if root == "bfi":
        return Form(_insert(kind, bits), (kind, kind, "u32", "u32"), kind)
    if root == "prmt":
        return Form(_permute, ("b32",) * 3, kind)
    if root == "lop3":
        return Form(_logic, ("b32",) * 4, kind)
    return _select(root, kind)


def _high(kind):
    if size_of(kind) == 8:
        raise Unsupported(f"mul.hi.{kind}")
    wide, shift = NUMPY[WIDER[kind]], 8 * size_of(kind)
    return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide.type(shift)).astype(a.dtype)


def _quotient(a, b):
    """Rounded towards zero. Division by zero gives all ones, as devices do."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return np.where(b == 0, ~a.dtype.type(0), a // safe)
    down = a // safe
    return np.where(b == 0, a.dtype.type(-1), down + ((down < 0) & (down * safe != a)).astype(a.dtype))


def _remainder(a, b):
    """Of the quotient above, so it has the sign of a."""
    return a - _quotient(a, b) * b


def _shift(root, kind, bits):
    """A shift by more than the width gives zero, or copies of the sign."""
    dtype = NUMPY[kind]
    fill = 0 if root == "shl" or kind not in SIGNED else None

    def function(a, by):
        within = np.minimum(by, bits - 1).astype(dtype)
        moved = a << within if root == "shl" else a >> within
        return moved if fill is None else np.where(by < bits, moved, dtype.type(0))

    return function


def _extract(kind, bits):
    """bfe: `length` bits from `start` on. A signed result repeats the highest bit of the field that a has."""
    signed = kind in SIGNED
    plain = _shift("shr", kind, bits)

    def function(a, start, length):
        start, length = start & np.uint32(255), length & np.uint32(255)
        length, start = np.broadcast_arrays(length, start)
        raised = _shift("shl", kind, bits)(
            plain(a, start), np.uint32(bits) - np.minimum(length, bits).astype(np.uint32)
        )
        field = plain(raised, np.uint32(bits) - np.minimum(length, bits).astype(np.uint32))
        if not signed:
            return field
        over = start + length > bits  # the sign is that of a
        return np.where(length == 0, a.dtype.type(0), np.where(over, plain(a, start), field))

    return function


def _insert(kind, bits):
    dtype = NUMPY[kind]

    def function(a, b, start, length):
        start, length = start & np.uint32(255), length & np.uint32(255)
        ones = _shift("shl", kind, bits)(~np.zeros_like(a), length)
        mask = _shift("shl", kind, bits)(~ones, start)
        return ((_shift("shl", kind, bits)(a, start) & mask) | (b & ~mask)).astype(dtype)

    return function


def _permute(a, b, selector):
    """prmt: each byte of the result is one of the eight bytes of (b, a), or eight copies of its sign."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    both, result = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32)), np.zeros_like(a)
    for byte in range(4):
        choice = selector >> np.uint32(4 * byte)
        value = ((both >> (np.uint64(8) * (choice & np.uint32(7)))) & np.uint64(255)).astype(np.uint32)
        sign = np.where(value & np.uint32(128), np.uint32(255), np.uint32(0))
        result |= np.where(choice & np.uint32(8), sign, value) << np.uint32(8 * byte)
    return result


def _logic(a, b, c, table):
    """lop3: bit i of the table is the result for (a, b, c) = the bits of i."""
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for entry in range(8):
        if int(table.flat[0]) >> entry & 1:
            picked = [x if entry >> place & 1 else ~x for x, place in ((a, 2), (b, 1), (c, 0))]
            result |= picked[0] & picked[1] & picked[2]
    return result


def _compare(parts):
    """setp.lt.f32, setp.ltu.f32 (true where one is NaN), setp.lt.and.f32 (combined with a third operand)."""
    _, name, *between, kind = parts
    if kind in HALVES:
        raise Unsupported(".".join(parts))
    between = [part for part in between if part != "ftz"]
    ftz = "ftz" in parts
    if kind in FLOATS and name in ("num", "nan"):
        base = (
            (lambda a, b: np.isnan(a) | np.isnan(b)) if name == "nan" else (lambda a, b: ~(np.isnan(a) | np.isnan(b)))
        )
    elif kind in FLOATS and name.endswith("u"):
        ordered = COMPARE[name[:-1]]
        base = lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)  # noqa: E731
    elif kind in FLOATS and name == "ne":
        base = lambda a, b: (a < b) | (a > b)  # noqa: E731
    else:
        base = COMPARE[name]
    compared = (lambda a, b: base(flush(a), flush(b))) if ftz else base
    if not between:
        return Form(compared, (kind, kind), "pred")
    combined = COMBINE[between[0]]
    return Form(lambda a, b, p: combined(compared(a, b), p), (kind, kind, "pred"), "pred")


def _convert(parts):
    *modes, to, source = parts[1:]
    modes = set(modes)
    if (to, source) in (("bf16x2", "f32"), ("f16x2", "f32")) and modes == {"rn"}:
        half = to_bf16 if to == "bf16x2" else to_f16
        return Form(lambda a, b: (half(a).astype(np.uint32) << np.uint32(16)) | half(b), (source, source), "b32")
    if to == "bf16" and source == "f32" and modes == {"rn"}:
        return Form(to_bf16, (source,), "b16")
    if to == "f16" and source == "f32" and modes == {"rn"}:
        return Form(to_f16, (source,), "b16")
    if source == "bf16" and to == "f32" and not modes:
        return Form(from_bf16, ("b16",), to)
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    source_float, to_float = source[0] == "f", to[0] == "f"
    dtype = NUMPY[to]
    if source_float and not to_float and modes & set(whole):
        limits = np.iinfo(dtype)
        rounding = whole[(modes & set(whole)).pop()]

        def function(x):
            rounded = rounding(x.astype(np.float64))
            inside = np.clip(rounded, float(limits.min), float(limits.max))
            exact = np.where(rounded >= float(limits.max), 0, inside).astype(dtype)
            top = np.where(rounded >= float(limits.max), limits.max, exact).astype(dtype)
            return np.where(np.isnan(x), dtype.type(0), top)

        return Form(function, (source,), to)
    if (to_float and modes <= {"rn", "ftz"}) or (not to_float and not source_float and not modes):
        return Form(lambda x: x.astype(dtype), (source,), to)
    raise Unsupported(".".join(parts))
