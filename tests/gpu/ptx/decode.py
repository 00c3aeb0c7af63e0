"""Turns an instruction into the function run(group, mask) that executes it for the threads of a group.

mask says which threads take part, and is None where all do.
"""

import numpy as np

from ptx.access import asynchronous, atomic, load, store
from ptx.arithmetic import form
from ptx.faults import Unsupported
from ptx.kinds import size_of, storage_of
from ptx.operands import either, reader
from ptx.parse import Register, Vector
from ptx.together import matrix_load, matrix_product, reduction, shuffle


def decode(instruction, kernel):
    """The function run(group, mask). Instructions that change the flow of control are the machine's."""
    parts, operands = instruction.parts, instruction.operands
    root = parts[0]
    if root in FAMILIES:
        return FAMILIES[root](parts, operands, kernel)
    known = form(parts)
    if known is None or not isinstance(operands[0], Register):
        raise Unsupported(f"PTX line {instruction.line}: {instruction.text}")
    return pointwise(known, operands, kernel, root == "cvt")


def pointwise(known, operands, kernel, convert):
    readers = [reader(operand, kind) for operand, kind in zip(operands[1:], known.inputs, strict=True)]
    name, function = operands[0].name, known.function
    bits = storage_of(kernel.kind_of(name))
    widens = size_of(known.output) < bits.itemsize  # of cvt; the sign fills the rest
    if size_of(known.output) > bits.itemsize or (widens and not convert):
        raise Unsupported(f"a result of another width than its register: {operands[0]}")
    chosen = known.inputs[2:] == ("pred",) and known.output != "pred"  # selp

    def run(group, mask):
        inputs = [read(group) for read in readers]
        bad = None
        for _, its in inputs:
            bad = either(bad, its)
        value = function(*(x for x, _ in inputs))
        if bad is not None and chosen:
            parts = [np.zeros(1, bool) if its is None else its for _, its in inputs]
            bad = np.where(inputs[2][0], parts[0], parts[1]) | parts[2]
        elif bad is not None and known.output == "pred" and function in (np.bitwise_and, np.bitwise_or):
            # What one operand decides alone is defined.
            deciding = function is np.bitwise_or
            for x, its in inputs:
                sure = x == deciding
                bad = bad & ~(sure if its is None else sure & ~its)
        value = np.ascontiguousarray(value)
        group.put(name, value.astype(bits) if widens else value.view(bits), bad, mask)

    return run


def move(parts, operands, kernel):
    """mov, of registers and constants, and between a register and the parts of a vector."""
    target, source = operands
    if isinstance(target, Vector):
        pieces = [item.name for item in target.items]
        part = storage_of(next(kernel.kind_of(name) for name in pieces if name != "_"))  # "_" is dropped
        read = reader(source, parts[-1])

        def split(group, mask):
            value, bad = read(group)
            columns = np.ascontiguousarray(value).view(part).reshape(-1, len(pieces))
            for number, piece in [pair for pair in enumerate(pieces) if pair[1] != "_"]:
                group.put(piece, np.ascontiguousarray(columns[:, number]), bad, mask)

        return split
    bits = storage_of(kernel.kind_of(target.name))
    if isinstance(source, Vector):
        readers = [
            reader(item, kernel.kind_of(item.name) if isinstance(item, Register) else "b16") for item in source.items
        ]

        def join(group, mask):
            values = [read(group) for read in readers]
            bad = None
            for _, its in values:
                bad = either(bad, its)
            columns = np.broadcast_arrays(*(x for x, _ in values))
            group.put(target.name, np.stack(columns, -1).view(bits).reshape(-1), bad, mask)

        return join
    read = reader(source, parts[-1])

    def run(group, mask):
        value, bad = read(group)
        group.put(target.name, value.view(bits), bad, mask)

    return run


FAMILIES = {
    "mov": move, "ld": load, "st": store, "atom": atomic, "cp": asynchronous, "shfl": shuffle, "ldmatrix": matrix_load,
    "mma": matrix_product, "redux": reduction,
}  # fmt: skip
