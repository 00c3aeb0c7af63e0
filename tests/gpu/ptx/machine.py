"""Executes a launch of a kernel: its memory, its groups of programs, and their order."""

import numpy as np

from ptx.group import Group
from ptx.memory import Memory
from ptx.shared import Shared

LANES = 1 << 13  # threads of a group at most: so many that numpy's calls cost little, so few that registers fit a cache


class Launch:
    """One launch of a Program.

    Args:
        grid: numbers of programs along x, y and z.
        shared: bytes of shared memory.
        order: a numpy Generator that draws the order of the programs and which of them act in turn, or None for their
            own order.
    """

    def __init__(self, program, grid, shared, order=None):
        self.program, self.grid, self.order = program, (*grid, 1, 1)[:3], order
        self.count, self.shared = int(np.prod(self.grid)), shared
        self.memory = Memory(self.count, program.kernel.threads, program.global_grain, program.atomics)
        self.parameters, self.executed, self.calls = [], 0, 0

    def run(self):
        threads, numbers = self.program.kernel.threads, np.arange(self.count)
        most = max(1, LANES // threads)
        if self.order is not None:
            numbers = self.order.permutation(numbers)
            cuts = np.unique(self.order.integers(0, self.count + 1, self.order.integers(0, 5)))
        else:
            cuts = []
        waiting = []
        for piece in np.split(numbers, cuts):
            for first in range(0, len(piece), most):
                waiting.append(piece[first : first + most])
        with np.errstate(all="ignore"):
            if self.order is None:
                for piece in waiting:
                    self._finish([self._group(piece)])
            else:
                self._finish([self._group(piece) for piece in waiting])

    def _group(self, programs):
        threads, grain = self.program.kernel.threads, self.program.shared_grain
        return Group(self, programs, Shared(len(programs), threads, self.shared, grain))

    def _finish(self, groups):
        while groups:
            chosen = len(groups) - 1 if self.order is None else self.order.integers(len(groups))
            groups[chosen : chosen + 1] = groups[chosen].step()
