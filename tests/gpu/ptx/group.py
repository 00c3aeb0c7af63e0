"""Programs that execute together: their registers, branches and barriers.

A group holds programs that are at the same places of the kernel. A branch that some of its programs take and others do
not splits it into two groups. A branch that divides the threads of one program leaves two parts of the group with a
mask each; the part that is further back in the kernel goes on first, and both are one again where they meet.
"""

import numpy as np

from ptx.faults import Diverged, Undefined


class Part:
    """Threads of a group that are at one place: block `at`; mask None for all; waits: at the barrier that ends it."""

    def __init__(self, at, mask, waits=False):
        self.at, self.mask, self.waits = at, mask, waits


class Group:
    """Programs that execute together. `programs` holds their numbers."""

    def __init__(self, launch, programs, shared):
        self.launch, self.programs, self.shared = launch, programs, shared
        self.threads = launch.program.kernel.threads
        self.size = len(programs) * self.threads
        self.values, self.undefined, self.parts = {}, {}, [Part(0, None)]
        self.all_lanes, self.instruction, self._special = np.arange(self.size), None, {}

    def take(self, which):
        """The programs at these indices, as a group of its own."""
        part = Group(self.launch, self.programs[which], self.shared.take(which))

        def rows(x):
            return x if len(x) == 1 else x.reshape(len(self.programs), -1)[which].reshape(-1)

        part.values = {name: rows(value) for name, value in self.values.items()}
        part.undefined = {name: rows(bad) for name, bad in self.undefined.items()}
        part.parts = []
        for its in self.parts:
            mask = None if its.mask is None else rows(its.mask)
            if mask is None or mask.any():
                part.parts.append(Part(its.at, None if mask is None or mask.all() else mask, its.waits))
        return part

    # ---- what instructions need -------------------------------------------------------------------------------------

    def special(self, name):
        """Values of a special register, uint32."""
        if name not in self._special:
            register, _, axis = name[1:].partition(".")
            grid, number = self.launch.grid, "xyz".find(axis)
            if register == "tid":
                value = np.tile(np.arange(self.threads), len(self.programs)) if axis == "x" else np.zeros(1)
            elif register == "ntid":
                value = np.array([self.threads if axis == "x" else 1])
            elif register == "nctaid":
                value = np.array([grid[number]])
            elif register == "ctaid":
                value = np.repeat(self.programs // int(np.prod(grid[:number])) % grid[number], self.threads)
            else:
                value = self.all_lanes % 32
            self._special[name] = value.astype(np.uint32)
        return self._special[name]

    def each(self, value):
        """An array with one element for each thread."""
        return value if len(value) == self.size else np.broadcast_to(value, self.size)

    def lanes(self, mask):
        return self.all_lanes if mask is None else np.flatnonzero(mask)

    def warps(self, mask):
        """The threads of an instruction that whole warps must execute together."""
        if mask is not None:
            by_warp = mask.reshape(-1, 32)
            partly = by_warp.any(1) & ~by_warp.all(1)
            if partly.any():
                bad = np.repeat(partly, 32)
                self.blame(Diverged, "only some threads of a warp come to", self.all_lanes, bad, self.all_lanes % 32)
        return self.lanes(mask)

    def put(self, name, value, bad, mask):
        """Sets a register of the threads of a mask. bad: which values are undefined, or None."""
        if mask is not None:
            old = self.values.get(name)
            before = self.undefined.get(name)
            if old is None:
                old, before = np.zeros(1, value.dtype), np.ones(1, bool)
            value = np.where(mask, value, old)
            if bad is not None or before is not None:
                none = np.zeros(1, bool)
                bad = np.where(mask, none if bad is None else bad, none if before is None else before)
        self.values[name] = value
        if bad is not None and bad.any():
            self.undefined[name] = bad
        else:
            self.undefined.pop(name, None)

    def scatter(self, name, values, bad, lanes, mask):
        """Sets a register of the threads `lanes`, those of the mask, to one value each."""
        if mask is not None:
            wide = np.zeros(self.size, values.dtype)
            wide[lanes] = values
            values = wide
            if bad is not None:
                wide = np.zeros(self.size, bool)
                wide[lanes] = bad
                bad = wide
        self.put(name, values, bad, mask)

    def blame(self, kind, what, lanes, bad, at):
        """Raises a fault of the first thread of `bad`. It and `at`, the offset at hand, are arrays over `lanes`."""
        first = int(np.flatnonzero(np.broadcast_to(bad, len(lanes)))[0])
        lane, i, grid = int(lanes[first]), self.instruction, self.launch.grid
        number = int(self.programs[lane // self.threads])
        program = (number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1]))
        raise kind(
            f"{self.launch.program.kernel.name}: {what}, at {int(np.broadcast_to(at, len(lanes))[first])}; PTX line "
            f"{i.line} ({i.source}): {i.text}; program {program}, thread {lane % self.threads}"
        )

    def truth(self, guard, mask):
        """The threads of a mask whose guard holds, as a mask. A guard that is undefined is a fault."""
        name, negated = guard
        value, bad = self.values.get(name), self.undefined.get(name)
        if value is None:
            bad, value = np.ones(1, bool), np.zeros(1, bool)
        if bad is not None:
            its = self.each(bad) if mask is None else self.each(bad) & mask
            if its.any():
                self.blame(Undefined, "an undefined predicate decides", self.all_lanes, its, self.all_lanes)
        value = ~value if negated else value
        return self.each(value) if mask is None else value & mask

    # ---- the flow of control ----------------------------------------------------------------------------------------

    def step(self):
        """Executes one block. Gives the groups that go on: this one, those it was split into, or none."""
        ready = [part for part in self.parts if not part.waits]
        if not ready:
            return self._pass_barrier()
        part = min(ready, key=lambda its: its.at)
        block = self.launch.program.blocks[part.at]
        for run, guard, instruction in block.body:
            self.instruction = instruction
            mask = part.mask
            if guard is not None:
                mask = self.truth(guard, mask)
                active = np.count_nonzero(mask)
                if active == 0:
                    continue
                mask = None if active == self.size else mask
            run(self, mask)
        self.launch.executed += len(block.body) * (len(self.programs))
        self.launch.calls += len(block.body)
        if block.end == "ret":
            self.parts.remove(part)
            return [self] if self.parts else []
        if block.end == "bar":
            part.waits, self.instruction = True, block.instruction
            return [self] if len(self.parts) > 1 else self._pass_barrier()
        if block.end == "bra" and block.guard is not None:
            self.instruction = block.instruction
            return self._branch(part, block)
        part.at = block.target if block.end == "bra" else part.at + 1
        self._meet()
        return [self]

    def _branch(self, part, block):
        taken = self.truth(block.guard, part.mask)
        there = np.ones(self.size, bool) if part.mask is None else part.mask
        by_program = taken.reshape(-1, self.threads)
        some, left = by_program.any(1), (there & ~taken).reshape(-1, self.threads).any(1)
        kinds = some * 2 + left
        groups = []
        index = self.parts.index(part)
        for kind in np.unique(kinds):
            which = np.flatnonzero(kinds == kind)
            group = self if len(which) == len(kinds) else self.take(which)
            its = group.parts[index]
            mine = taken if group is self else by_program[which].reshape(-1)
            if kind == 2:
                its.at = block.target
            elif kind == 1:
                its.at += 1
            else:
                others = ~mine if its.mask is None else its.mask & ~mine
                group.parts[index : index + 1] = [Part(block.target, mine), Part(its.at + 1, others)]
            group._meet()
            groups.append(group)
        return groups

    def _meet(self):
        """Parts at the same place become one."""
        if len(self.parts) < 2:
            return
        met = {}
        for part in self.parts:
            key = part.at, part.waits
            if key in met:
                mask = met[key].mask | part.mask
                met[key].mask = None if mask.all() else mask
            else:
                met[key] = part
        self.parts = list(met.values())

    def _pass_barrier(self):
        """All threads that have not left wait: at one barrier, or something is wrong."""
        self._meet()
        if len(self.parts) > 1:
            masks = [self.all_lanes >= 0 if part.mask is None else part.mask for part in self.parts]
            self.blame(Diverged, "threads of a program wait at different barriers", self.all_lanes, masks[0], masks[0])
        (part,) = self.parts
        part.waits, part.at = False, part.at + 1
        self.shared.epoch += 1
        if self.launch.memory.clocks is not None:
            self.launch.memory.clocks.barrier(self.programs)
        return [self]
