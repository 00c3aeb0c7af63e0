"""Reads the operands of instructions. A register holds an element for each thread, or one where all have one value."""

import numpy as np

from ptx.faults import Undefined, Unsupported
from ptx.kinds import NUMPY, size_of, storage_of
from ptx.parse import Number, Symbol
from ptx.shared import BASE


def reader(operand, kind):
    """read(group) -> (array of the operand as `kind`, which threads' values are undefined or None)."""
    dtype = NUMPY[kind]
    if isinstance(operand, Number):
        value = _constant(operand, kind)
        return lambda group: (value, None)
    if isinstance(operand, Symbol):  # the address of a variable; the only one is shared memory
        value = np.array([BASE], dtype)
        return lambda group: (value, None)
    name = operand.name
    if name.startswith(("%tid", "%ntid", "%ctaid", "%nctaid", "%laneid")):
        return lambda group: (group.special(name).astype(dtype), None)

    def read(group):
        value = group.values.get(name)
        if value is None:
            return np.zeros(1, dtype), np.ones(1, bool)
        if value.itemsize != dtype.itemsize:  # cvt and st take the low bits of a wider register
            value = value.astype(storage_of(kind))
        return value.view(dtype), group.undefined.get(name)

    return read


def _constant(number, kind):
    if number.kind == "int":
        if kind in ("f32", "f64"):
            raise Unsupported("an integer constant as a float")
        bits = storage_of(kind)
        return np.array([number.value & (256 ** size_of(kind) - 1)]).astype(bits).view(NUMPY[kind])
    wide = np.array([number.value], np.uint32 if number.kind == "f32" else np.uint64)
    return wide.view(NUMPY[kind]) if wide.itemsize == size_of(kind) else wide.astype(storage_of(kind))


def either(first, second):
    """Which of two values are undefined, where each may be None."""
    if first is None or second is None:
        return second if first is None else first
    return first | second


def addresses(operand):
    kind = "u32" if isinstance(operand.base, Symbol) else None

    def prepare(kernel):
        wide = kind or {"b32": "u32", "b64": "u64"}[kernel.kind_of(operand.base.name)]
        read, offset = reader(operand.base, wide), NUMPY[wide].type(operand.offset & (256 ** size_of(wide) - 1))

        def run(group, mask):
            """(lanes, their addresses)."""
            value, bad = read(group)
            lanes = group.lanes(mask)
            address = group.each(value)[lanes] + offset
            if bad is not None and (bad := group.each(bad)[lanes]).any():
                group.blame(Undefined, "an undefined address", lanes, bad, address)
            return lanes, address

        return run

    return prepare
