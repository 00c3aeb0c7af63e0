"""Shared memory of a group of programs, with what is defined in it, copies under way, and races between warps."""

import numpy as np

from ptx.faults import Misaligned, OutOfBounds, Race
from ptx.races import Tags

BASE = 1024  # the address of the first byte; so an address that was never set is out of bounds
UNDEFINED, DEFINED, COMING = 0, 1, 2
ITEM = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}  # a type of so many bytes


class Shared:
    """Args: number of programs; threads of each; bytes of each; grain: bytes of the shortest access of the kernel."""

    def __init__(self, programs, threads, size, grain):
        self.threads, self.size, self.grain, self.epoch = threads, size, grain, 1
        self.stride = -(-max(size, 1) // 16) * 16
        self.data = np.zeros(programs * self.stride, np.uint8)
        self.state = np.zeros(programs * self.stride, np.uint8)
        self.tags = Tags(programs * self.stride // grain)
        self.copies = []  # [lanes, bytes' places, data, number of the group]
        self.committed = np.zeros(programs * threads, np.int64)

    def take(self, programs):
        """The part of these programs, an array of their indices, as Shared of its own."""
        part = Shared.__new__(Shared)
        vars(part).update(vars(self))
        stride, count = self.stride, len(self.committed) // self.threads

        def rows(x):
            return x.reshape(count, -1)[programs].reshape(-1)

        part.data, part.state, part.committed = rows(self.data), rows(self.state), rows(self.committed)
        part.tags = Tags(0)
        part.tags.wrote, part.tags.read = rows(self.tags.wrote), rows(self.tags.read)
        place = np.full(count, -1)
        place[programs] = np.arange(len(programs))
        part.copies = []
        for lanes, at, data, number in self.copies:
            its = place[lanes // self.threads]
            kept = its >= 0
            if kept.any():
                lanes, at, its = lanes[kept], at[kept], its[kept]
                moved = its * self.threads + lanes % self.threads
                part.copies.append([moved, its * stride + at % stride, data[kept], number[kept]])
        return part

    def _places(self, blame, lanes, address, width):
        """Places in `data` of the first byte of each access."""
        offset = address.astype(np.int64) - BASE
        if (offset % width).any():
            blame(Misaligned, f"{width} bytes of shared memory", lanes, offset % width != 0, offset)
        bad = (offset < 0) | (offset > self.size - width)
        if bad.any():
            blame(OutOfBounds, f"{width} bytes, of {self.size} bytes of shared memory", lanes, bad, offset)
        return lanes // self.threads * self.stride + offset

    def _grains(self, at, lanes, width):
        """Numbers of the grains of each access, and the entry of its warp, both (accesses, grains)."""
        grains = (at // self.grain)[:, None] + np.arange(max(width // self.grain, 1))
        mine = Tags.entry(lanes % self.threads // 32, self.epoch)
        return grains, np.broadcast_to(mine[:, None], grains.shape)

    def load(self, blame, lanes, address, width):
        """Items of `width` bytes, and which of them are undefined."""
        at = self._places(blame, lanes, address, width)
        state = self.state.view(ITEM[width])[at // width]
        state = state.view(np.uint8).reshape(-1, width)
        grains, mine = self._grains(at, lanes, width)
        wrote = self.tags.wrote[grains]
        race = ((wrote >> 20 == self.epoch) & (wrote != mine)).any(1)
        if race.any():
            text = "reads shared memory that another warp wrote since the last barrier"
            blame(Race, text, lanes, race, at % self.stride)
        if (state == COMING).any():
            text = "reads shared memory that cp.async was told to fill and that no wait_group has waited for"
            blame(Race, text, lanes, (state == COMING).any(1), at % self.stride)
        self.tags.note_read(grains, mine, same_epoch=True)
        return self.data.view(ITEM[width])[at // width], (state != DEFINED).any(1)

    def store(self, blame, lanes, address, width, items, bad):
        """bad: None, or which items are undefined."""
        at = self._places(blame, lanes, address, width)
        view = self.data.view(ITEM[width])
        before = view[at // width]
        self._claim(blame, lanes, at, width, before.view(np.uint8) == items.view(np.uint8))
        view[at // width] = items
        after = view[at // width].view(np.uint8) != items.view(np.uint8)
        if after.any():
            after = after.reshape(-1, width).any(1)
            blame(Race, "two threads store different values to the same shared memory", lanes, after, at % self.stride)
        state = self.state.view(ITEM[width])
        state[at // width] = np.full(width, DEFINED, np.uint8).view(ITEM[width])
        if bad is not None and bad.any():
            state[at[bad] // width] = np.zeros(1, ITEM[width])

    def _claim(self, blame, lanes, at, width, same):
        """Checks that nobody else uses these bytes, and notes the writer. same: which bytes stay what they are."""
        grains, mine = self._grains(at, lanes, width)
        wrote, read = self.tags.wrote[grains], self.tags.read[grains]
        race = ((read >> 20 == self.epoch) & (read != mine)).any(1)
        if race.any():
            text = "writes shared memory that another warp read since the last barrier"
            blame(Race, text, lanes, race, at % self.stride)
        race = ((wrote >> 20 == self.epoch) & (wrote != mine)).any(1)
        if race.any():
            race &= ~same.reshape(-1, width).all(1)  # several warps may write one value
        coming = self.state.view(ITEM[width])[at // width].view(np.uint8).reshape(-1, width) == COMING
        if race.any() or coming.any():
            text = "writes shared memory that another warp wrote since the last barrier, or that cp.async still fills"
            blame(Race, text, lanes, race | coming.any(1), at % self.stride)
        self.tags.note_write(grains, mine)

    def copy(self, blame, lanes, address, width, data):
        """cp.async of data (accesses, width) bytes. They arrive when their group is waited for."""
        at = self._places(blame, lanes, address, width)
        self._claim(blame, lanes, at, width, np.zeros((len(at), width), bool))
        self.state.view(ITEM[width])[at // width] = np.full(width, COMING, np.uint8).view(ITEM[width])
        self.copies.append([lanes, at, data, self.committed[lanes]])

    def commit(self, lanes):
        self.committed[lanes] += 1

    def wait(self, lanes, pending):
        """Until all groups of these threads but the last `pending` have arrived."""
        waiting = np.zeros(len(self.committed), bool)
        waiting[lanes] = True
        left = []
        for owners, at, data, number in self.copies:
            lands = waiting[owners] & (number < self.committed[owners] - pending)
            if lands.any():
                width, places = data.shape[1], at[lands]
                bytes_ = places[:, None] + np.arange(width)
                self.data[bytes_] = data[lands]
                self.state[bytes_] = DEFINED
                grains, mine = self._grains(places, owners[lands], width)
                self.tags.note_write(grains, mine)
            if not lands.all():
                left.append([owners[~lands], at[~lands], data[~lands], number[~lands]])
        self.copies = left
