"""Instructions on memory: ld, st, atom and cp.async."""

import numpy as np

from ptx.faults import Undefined, Unsupported
from ptx.kinds import NUMPY, size_of, storage_of
from ptx.operands import addresses, either, reader
from ptx.parse import Vector
from ptx.shared import ITEM

CACHE = {"cg", "ca", "cs", "lu", "cv", "wb", "wt", "relaxed", "weak", "L1::evict_last", "L1::evict_first",
         "L1::evict_normal", "L1::no_allocate", "L2::128B", "L2::cache_hint", "nc"}  # fmt: skip
ATOMIC = {
    "add": lambda old, x: old + x, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "exch": lambda old, x: x,
}  # fmt: skip


def parameter(parts, operands, kernel):
    """ld.param. A register may be wider than what it takes, whose sign then fills the rest."""
    target, (base, offset) = operands[0].name, operands[1]
    number = [name for name, _ in kernel.params].index(base.name)
    if offset:
        raise Unsupported("a part of a parameter")
    bits, kind = storage_of(kernel.kind_of(target)), NUMPY[parts[-1]]

    def run(group, mask):
        value = group.launch.parameters[number].view(kind)
        group.put(target, value.view(bits) if kind.itemsize == bits.itemsize else value.astype(bits), None, mask)

    return run


def _access(parts, known):
    """(space, number of items, type of an item) of a load or store."""
    space, *modes, kind = parts[1:]
    lanes = [int(mode[1:]) for mode in modes if mode in ("v2", "v4")]
    strange = {mode for mode in modes if mode not in ("v2", "v4")} - known
    if strange or space not in ("global", "shared"):
        raise Unsupported(".".join(parts))
    return space, lanes[0] if lanes else 1, kind


def load(parts, operands, kernel):
    if parts[1] == "param":
        return parameter(parts, operands, kernel)
    space, count, kind = _access(parts, CACHE)
    targets = [item.name for item in operands[0].items] if isinstance(operands[0], Vector) else [operands[0].name]
    width, part = count * size_of(kind), storage_of(kind)
    address = addresses(operands[1])(kernel)
    if any(storage_of(kernel.kind_of(name)) != part for name in targets):
        raise Unsupported("a load into registers of another width")

    def run(group, mask):
        lanes, at = address(group, mask)
        if space == "shared":
            items, bad = group.shared.load(group.blame, lanes, at, width)
        else:
            items, bad = group.launch.memory.load(group, lanes, at, width)
        columns = np.ascontiguousarray(items.view(part).reshape(-1, count).T)
        bad = bad if bad is not None and bad.any() else None
        for name, column in zip(targets, columns, strict=True):
            group.scatter(name, column, bad, lanes, mask)

    return run


def store(parts, operands, kernel):
    space, count, kind = _access(parts, CACHE)
    sources = operands[1].items if isinstance(operands[1], Vector) else [operands[1]]
    width, part = count * size_of(kind), storage_of(kind)
    readers, address = [reader(source, kind) for source in sources], addresses(operands[0])(kernel)

    def run(group, mask):
        lanes, at = address(group, mask)
        bad, columns = None, np.empty((len(lanes), count), part)
        for number, read in enumerate(readers):
            value, its = read(group)
            columns[:, number] = group.each(value.view(part))[lanes]
            bad = either(bad, None if its is None else group.each(its)[lanes])
        items = columns.reshape(-1).view(ITEM[width])
        if space == "shared":
            group.shared.store(group.blame, lanes, at, width, items, bad)
        else:
            group.launch.memory.store(group, lanes, at, width, items, bad)

    return run


def atomic(parts, operands, kernel):
    """atom.global.gpu.acq_rel.add.u32 and its kind. Threads act one after another, in the order of their programs."""
    *modes, name, kind = parts[1:]
    order = {"relaxed": (False, False), "acquire": (False, True), "release": (True, False), "acq_rel": (True, True)}
    releases, acquires = order[next((mode for mode in modes if mode in order), "relaxed")]
    if set(modes) - set(order) - {"global", "gpu", "cta", "sys"} or name not in ATOMIC or "global" not in modes:
        raise Unsupported(".".join(parts))
    if "cta" in modes:
        releases = acquires = False
    read, address = reader(operands[2], kind), addresses(operands[1])(kernel)

    def run(group, mask):
        lanes, at = address(group, mask)
        value, bad = read(group)
        if bad is not None and group.each(bad)[lanes].any():
            group.blame(Undefined, "an atomic operation with an undefined value", lanes, group.each(bad)[lanes], at)
        given, old = group.each(value)[lanes], np.empty(len(lanes), NUMPY[kind])
        for i, lane in enumerate(lanes):

            def compute(before, x=given[i]):
                return ATOMIC[name](before.view(NUMPY[kind]), x).view(before.dtype)

            item = group.launch.memory.atomic(group, lane, at[i], size_of(kind), compute, releases, acquires)
            old[i] = item.view(NUMPY[kind])
        group.scatter(operands[0].name, old.view(storage_of(kind)), None, lanes, mask)

    return run


def asynchronous(parts, operands, kernel):
    """cp.async with its size and the bytes of the source, commit_group and wait_group."""
    if parts[2] in ("commit_group", "wait_group", "wait_all"):
        if parts[2] == "commit_group":
            return lambda group, mask: group.shared.commit(group.lanes(mask))
        pending = operands[0].value if operands else 0
        if parts[2] == "wait_all":
            raise Unsupported("cp.async.wait_all")
        return lambda group, mask: group.shared.wait(group.lanes(mask), pending)
    if parts[2] not in ("ca", "cg") or parts[3:5] != ("shared", "global"):
        raise Unsupported(".".join(parts))
    to, source = (addresses(operand)(kernel) for operand in operands[:2])
    width = operands[2].value
    sizes = reader(operands[3], "u32") if len(operands) > 3 else lambda group: (np.array([width], np.uint32), None)

    def run(group, mask):
        lanes, at = to(group, mask)
        size, bad = sizes(group)
        if bad is not None and group.each(bad)[lanes].any():
            group.blame(Undefined, "cp.async of an undefined number of bytes", lanes, group.each(bad)[lanes], at)
        size = group.each(size)[lanes]
        data = np.zeros((len(lanes), width), np.uint8)
        if ((size != 0) & (size != width)).any():
            raise Unsupported("cp.async of a part of its bytes")
        whole = np.flatnonzero(size == width)
        if len(whole):
            some = np.zeros(group.size, bool)
            some[lanes[whole]] = True
            _, place = source(group, some)
            items, undefined = group.launch.memory.load(group, lanes[whole], place, width)
            if undefined is not None:
                group.blame(Undefined, "cp.async of undefined global memory", lanes[whole], undefined, place)
            data[whole] = items.view(np.uint8).reshape(-1, width)
        group.shared.copy(group.blame, lanes, at, width, data)

    return run
