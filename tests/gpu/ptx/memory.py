"""Global memory: buffers with bounds, with what is defined in them, and with who touched them in this launch.

An address tells its buffer: buffer << 40 | 1 << 39 + offset. So an index that runs out of a buffer never reaches
another one, and the fault can name the buffer and the offset.
"""

import numpy as np
import torch

from ptx.faults import Misaligned, OutOfBounds, Race, Undefined
from ptx.races import WHO, Clocks, Tags
from ptx.shared import ITEM

SPAN, MIDDLE = np.uint64(40), np.int64(1) << 39
OFFSET = np.uint64((1 << 40) - 1)


def bytes_of(tensor):
    """The bytes of a tensor, from its first element to its last, as a numpy array that shares its memory."""
    if tensor.numel() == 0:
        return np.zeros(0, np.uint8)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = torch.as_strided(tensor.detach(), (span,), (1,))
    return flat.view(torch.uint8).numpy()


class Buffer:
    """One tensor.

    Args:
        defined: a byte of 1 or 0 for each of its bytes, or None where all are defined.
        written: whether the kernel may write it. If not, who reads it does not matter.
    """

    def __init__(self, name, data, defined=None, written=True):
        if data.ctypes.data % 16:
            raise ValueError(f"{name}: the tensor must begin at a multiple of 16 bytes")
        self.name, self.data, self.defined, self.written, self.tags = name, data, defined, written, None

    def view(self, width, which="data"):
        data = getattr(self, which)
        return data[: len(data) // width * width].view(ITEM[width])


class Memory:
    """The buffers of one launch.

    Args:
        programs: how many there are; threads: of each.
        grain: bytes of the shortest access of the kernel.
        atomics: whether the kernel has atomic operations, which put programs in order.
    """

    def __init__(self, programs, threads, grain, atomics):
        self.buffers, self.threads, self.grain = [], threads, grain
        self.clocks = Clocks(programs) if atomics else None

    def add(self, name, data, defined=None, written=True):
        """The address of a new buffer."""
        self.buffers.append(Buffer(name, data, defined, written))
        return (len(self.buffers) << 40) + int(MIDDLE)

    def _split(self, blame, lanes, address, width):
        """Yields (buffer, offsets, which accesses) for each buffer that is accessed."""
        numbers = (address >> SPAN).astype(np.int64)
        offsets = (address & OFFSET).astype(np.int64) - MIDDLE
        for number in np.unique(numbers):
            which = np.flatnonzero(numbers == number)
            if not 1 <= number <= len(self.buffers):
                blame(OutOfBounds, "global memory of no buffer", lanes, numbers == number, address)
            buffer, at = self.buffers[number - 1], offsets[which]
            size = len(buffer.data)
            if (at % width).any():
                text = f"{width} bytes of {buffer.name}"
                blame(Misaligned, text, lanes[which], at % width != 0, at)
            bad = (at < 0) | (at > size - width)
            if bad.any():
                blame(OutOfBounds, f"{width} bytes of {buffer.name}, which has {size} bytes", lanes[which], bad, at)
            yield buffer, at, which

    def load(self, group, lanes, address, width):
        """Items of `width` bytes, and which are undefined (or None)."""
        items, undefined = np.empty(len(address), ITEM[width]), None
        for buffer, at, which in self._split(group.blame, lanes, address, width):
            items[which] = buffer.view(width)[at // width]
            if buffer.defined is not None:
                known = buffer.view(width, "defined")[at // width].view(np.uint8).reshape(-1, width).all(1)
                if not known.all():
                    undefined = np.zeros(len(address), bool) if undefined is None else undefined
                    undefined[which] = ~known
            self._read(group, buffer, lanes[which], at, width)
        return items, undefined

    def store(self, group, lanes, address, width, items, bad):
        if bad is not None and bad.any():
            group.blame(Undefined, "stores an undefined value to global memory", lanes, bad, address & OFFSET)
        for buffer, at, which in self._split(group.blame, lanes, address, width):
            view, new = buffer.view(width), items[which]
            before = view[at // width].view(np.uint8) == new.view(np.uint8)
            self._write(group, buffer, lanes[which], at, width, before.reshape(-1, width).all(1))
            view[at // width] = new
            clash = (view[at // width].view(np.uint8) != new.view(np.uint8)).reshape(-1, width).any(1)
            if clash.any():
                text = f"two threads store different values to the same bytes of {buffer.name}"
                group.blame(Race, text, lanes[which], clash, at)
            if buffer.defined is not None:
                buffer.view(width, "defined")[at // width] = np.ones(width, np.uint8).view(ITEM[width])

    def atomic(self, group, lane, address, width, compute, releases, acquires):
        """One thread's read-modify-write; compute(old item) gives the new one. Gives the old item."""
        lanes, address = np.array([lane]), np.array([address], np.uint64)
        ((buffer, at, _),) = self._split(group.blame, lanes, address, width)
        program = int(group.programs[lane // self.threads])
        if buffer.defined is not None and not buffer.defined[at[0] : at[0] + width].all():
            group.blame(Undefined, f"an atomic operation on undefined bytes of {buffer.name}", lanes, lanes >= 0, at)
        epoch = group.shared.epoch
        grains, _, wrote, read = self._order(group, buffer, lanes, at, width)
        if wrote.any() or read.any():
            text = f"an atomic operation on bytes of {buffer.name} that another program used, and nothing orders them"
            group.blame(Race, text, lanes, wrote | read, at)
        self.clocks.atomic(int(address[0]), program, epoch, releases, acquires)
        view = buffer.view(width)
        old = view[at // width]
        view[at // width] = compute(old)
        buffer.tags.wrote[grains] = 0  # atomic operations never race with one another
        return old[0]

    # ---- the order of accesses --------------------------------------------------------------------------------------

    def _grains(self, at, width):
        return (at // self.grain)[:, None] + np.arange(max(width // self.grain, 1))

    def _tags(self, buffer):
        if buffer.tags is None:
            buffer.tags = Tags(len(buffer.data) // self.grain + 1)
        return buffer.tags

    def _unordered(self, group, entries, program, warp, of_warps):
        """Which entries, of writes by warps or of reads by programs, nothing puts before what `program` does now."""
        who, epoch = (entries & WHO) - 1, entries >> 20
        warps = self.threads // 32
        theirs = who // warps if of_warps else who
        same = theirs == program
        ordered = same
        if of_warps:
            ordered = same & ((who == warp) | (epoch < group.shared.epoch))
        if self.clocks is not None:
            several = (entries & WHO) == WHO
            known = self.clocks.known[program, np.where(several | (entries == 0), 0, theirs)] > epoch
            ordered = np.where(same, ordered, known & ~several)
        return (entries != 0) & ~ordered

    def _people(self, group, lanes, shape):
        """Program and warp (counted over all programs) of each grain of each access."""
        program = group.programs[lanes // self.threads]
        warp = program * (self.threads // 32) + lanes % self.threads // 32
        return (np.broadcast_to(x[:, None], shape) for x in (program, warp))

    def _read(self, group, buffer, lanes, at, width):
        if not buffer.written:
            return
        grains, tags = self._grains(at, width), self._tags(buffer)
        program, warp = self._people(group, lanes, grains.shape)
        race = self._unordered(group, tags.wrote[grains], program, warp, True).any(1)
        if race.any():
            text = f"reads bytes of {buffer.name} that another warp or program wrote, and nothing puts them in order"
            group.blame(Race, text, lanes, race, at)
        tags.note_read(grains, Tags.entry(program, group.shared.epoch), same_epoch=False)

    def _order(self, group, buffer, lanes, at, width):
        grains, tags = self._grains(at, width), self._tags(buffer)
        program, warp = self._people(group, lanes, grains.shape)
        wrote = self._unordered(group, tags.wrote[grains], program, warp, True)
        read = self._unordered(group, tags.read[grains], program, warp, False)
        return grains, warp, wrote.any(1), read.any(1)

    def _write(self, group, buffer, lanes, at, width, same):
        """same: which accesses leave the bytes what they are. Several threads may write one value."""
        grains, warp, wrote, read = self._order(group, buffer, lanes, at, width)
        race = read | (wrote & ~same)
        if race.any():
            text = f"writes bytes of {buffer.name} that another warp or program used, and nothing puts them in order"
            group.blame(Race, text, lanes, race, at)
        self._tags(buffer).note_write(grains, Tags.entry(warp, group.shared.epoch))
