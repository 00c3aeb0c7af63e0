"""Instructions that a warp executes together, on the threads of a group. The mathematics is in warps.py."""

import numpy as np

from ptx import warps
from ptx.faults import Undefined, Unsupported
from ptx.operands import addresses, reader


def shuffle(parts, operands, kernel):
    target, mode = operands[0].name, parts[2]
    readers = [reader(operand, "u32") for operand in operands[1:4]]

    def run(group, mask):
        lanes = group.warps(mask)
        (value, bad), (by, bad_by), (control, _) = ((read(group)) for read in readers)
        value, by, control = (group.each(x)[lanes].reshape(-1, 32) for x in (value, by, control))
        if bad_by is not None and group.each(bad_by)[lanes].any():
            group.blame(Undefined, "a shuffle from an undefined lane", lanes, group.each(bad_by)[lanes], by.reshape(-1))
        source = warps.sources(mode, by, control)
        bad = None if bad is None else warps.shuffle(group.each(bad)[lanes].reshape(-1, 32), source).reshape(-1)
        group.scatter(target, warps.shuffle(value, source).reshape(-1), bad, lanes, mask)

    return run


def reduction(parts, operands, kernel):
    """redux.sync.min|max.s32|u32: every lane gets the least or the largest number of its warp."""
    if parts[1] != "sync" or parts[2] not in ("min", "max") or parts[3] not in ("s32", "u32"):
        raise Unsupported(".".join(parts))
    target, read, least = operands[0].name, reader(operands[1], parts[3]), parts[2] == "min"

    def run(group, mask):
        lanes = group.warps(mask)
        value, bad = read(group)
        rows = group.each(value)[lanes].reshape(-1, 32)
        result = np.repeat(rows.min(1) if least else rows.max(1), 32)
        bad = None if bad is None else np.repeat(group.each(bad)[lanes].reshape(-1, 32).any(1), 32)
        group.scatter(target, result.view(np.uint32), bad, lanes, mask)

    return run


def matrix_load(parts, operands, kernel):
    """ldmatrix.sync.aligned.m8n8.x1|x2|x4[.trans].shared.b16: lane i gives the address of row i."""
    if parts[1:4] != ("sync", "aligned", "m8n8") or parts[-2:] != ("shared", "b16"):
        raise Unsupported(".".join(parts))
    count, transposed = int(parts[4][1:]), "trans" in parts
    targets, address = [item.name for item in operands[0].items], addresses(operands[1])(kernel)

    def run(group, mask):
        group.warps(mask)
        lanes, at = address(group, mask)
        given = (lanes % 32) < 8 * count
        rows, bad = group.shared.load(group.blame, lanes[given], at[given], 16)
        results = warps.matrices(rows.view(np.uint16).reshape(-1, count, 8, 8), transposed)
        undefined = None
        if bad.any():
            rows = np.repeat(bad[:, None], 8, 1).astype(np.uint16).reshape(-1, count, 8, 8)
            undefined = warps.matrices(rows, transposed).reshape(count, -1) != 0
        for number, name in enumerate(targets):
            its = None if undefined is None else undefined[number]
            group.scatter(name, results[number].reshape(-1), its, lanes, mask)

    return run


def matrix_product(parts, operands, kernel):
    """mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 and its kind."""
    shape, kind = parts[3], parts[7]
    if shape not in ("m16n8k16", "m16n8k8") or parts[6::3] != ("f32", "f32") or kind not in ("bf16", "f16"):
        raise Unsupported(".".join(parts))
    targets = [item.name for item in operands[0].items]
    readers = [
        [reader(item, which) for item in operand.items]
        for operand, which in zip(operands[1:], ("u32", "u32", "f32"), strict=True)
    ]

    def run(group, mask):
        lanes, bad = group.warps(mask), np.zeros((group.size // 32, 1), bool)
        inputs = []
        for registers in readers:
            rows = []
            for read in registers:
                value, its = read(group)
                rows.append(group.each(value))
                if its is not None:
                    bad = bad | group.each(its).reshape(-1, 32).any(1)[:, None]  # the whole product of the warp
            inputs.append(np.stack(rows).reshape(len(rows), -1, 32))
        results = warps.multiply(*inputs, kind).view(np.uint32).reshape(4, -1)
        bad = np.repeat(bad, 32, 1).reshape(-1) if bad.any() else None
        for name, result in zip(targets, results, strict=True):
            group.put(name, result, bad, mask)
        return lanes

    return run
