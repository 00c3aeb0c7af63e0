"""Who touched which bytes, and what puts accesses of different warps and programs in order.

A program's barriers cut its time into epochs. Two warps of a program are ordered if they act in different epochs. Two
programs are ordered by atomic operations alone: a release makes known what happened in the epochs before it, and an
acquire learns of it for the epochs after it.
"""

import numpy as np

MANY = (1 << 20) - 1  # stands for "several" where one reader is noted
WHO = np.int64(MANY)


class Clocks:
    """known[a, b]: the epochs of program b below this number happened before what program a does now."""

    def __init__(self, programs):
        self.known = np.zeros((programs, programs), np.int32)
        self.learned = np.zeros((programs, programs), np.int32)  # by an acquire in this epoch; counts from the next on
        self.told = {}  # {address of an atomic: the clock that its releases left}

    def atomic(self, address, program, epoch, releases, acquires):
        """Program `program` carries out an atomic operation in its epoch `epoch`."""
        clock = self.told.get(address)
        if acquires and clock is not None:
            np.maximum(self.learned[program], clock, out=self.learned[program])
        if releases:
            mine = self.known[program].copy()
            mine[program] = epoch
            self.told[address] = mine if clock is None else np.maximum(clock, mine)

    def barrier(self, programs):
        self.known[programs] = np.maximum(self.known[programs], self.learned[programs])


class Tags:
    """For each grain of a memory: who wrote it last and who has read it, each with the epoch.

    An entry is epoch << 20 | who + 1, and 0 where nobody did. A grain has as many bytes as the shortest access.
    """

    def __init__(self, grains):
        self.wrote = np.zeros(grains, np.int64)
        self.read = np.zeros(grains, np.int64)

    @staticmethod
    def entry(who, epoch):
        return (np.int64(epoch) << 20) | (who + 1)

    def note_read(self, at, mine, same_epoch):
        """Notes readers `mine` (entries) of the grains `at`. A second reader turns an entry into "several".

        same_epoch: whether a reader of another epoch is forgotten.
        """
        before = self.read[at]
        other = (before != 0) & ((before ^ mine) & WHO != 0)
        if same_epoch:
            other &= before >> 20 == mine >> 20
        noted = np.where(other, mine | WHO, mine)
        self.read[at] = noted
        lost = self.read[at] != noted  # two readers in one instruction
        if lost.any():
            self.read[at[lost]] = mine[lost] | WHO

    def note_write(self, at, mine):
        """Notes writers. Gives where two of them meet in one instruction."""
        self.wrote[at] = mine
        return self.wrote[at] != mine
