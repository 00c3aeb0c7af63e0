"""A kernel made ready to run: blocks of decoded instructions, and what is known of it without running it."""

from ptx.decode import decode
from ptx.faults import Unsupported
from ptx.kinds import size_of
from ptx.parse import Register


class Block:
    """Instructions that are executed one after another, and what ends them.

    body: [(function, guard, instruction)]; end: "bra" with `target` and `guard`, "ret", "bar", or None.
    """

    def __init__(self):
        self.body, self.end, self.guard, self.target, self.instruction = [], None, None, None, None


class Program:
    """A kernel made ready to run: its blocks, and what is known of it without running it."""

    def __init__(self, kernel):
        self.kernel, self.blocks = kernel, [Block()]
        targets = {i.operands[0].name for i in kernel.instructions if i.parts[0] == "bra"}
        starts = {kernel.labels[name]: name for name in targets}
        place = {}
        for index, instruction in enumerate(kernel.instructions):
            if index in starts:
                if self.blocks[-1].body or self.blocks[-1].end:
                    self.blocks.append(Block())
                place[index] = len(self.blocks) - 1
            self._add(instruction)
            if self.blocks[-1].end:
                self.blocks.append(Block())
        self.blocks[-1].end = self.blocks[-1].end or "ret"
        self.leave = len(self.blocks) - 1
        for block in self.blocks:
            if block.end == "bra":
                block.target = place[kernel.labels[block.target]] if block.target else self.leave
        self.global_grain = self._shortest(("st", "global"))
        self.shared_grain = self._shortest(("st", "shared"), ("ld", "shared"))
        self.atomics = any(i.parts[0] == "atom" for i in kernel.instructions)
        self.written = written_parameters(kernel)

    def _shortest(self, *names):
        """Bytes of the shortest item that these instructions access, at most 4."""
        return min((size_of(i.parts[-1]) for i in self.kernel.instructions if i.parts[:2] in names), default=4)

    def _add(self, instruction):
        block, parts = self.blocks[-1], instruction.parts
        if parts[0] in ("bra", "ret", "exit", "bar", "barrier"):
            block.end, block.guard, block.instruction = parts[0], instruction.guard, instruction
            if parts[0] == "bra":
                block.target = instruction.operands[0].name
            elif parts[0] in ("bar", "barrier"):
                if parts[1:] == ("warp", "sync"):
                    block.end = block.guard = None  # a warp is always in step
                    return
                plain = [getattr(operand, "value", None) for operand in instruction.operands] == [0]
                if instruction.guard or "sync" not in parts or not plain:
                    raise Unsupported(f"PTX line {instruction.line}: {instruction.text}")
                block.end = "bar"
            elif instruction.guard:
                block.end, block.target = "bra", None
            else:
                block.end = "ret"
        else:
            try:
                block.body.append((decode(instruction, self.kernel), instruction.guard, instruction))
            except (KeyError, ValueError, Unsupported) as error:
                raise Unsupported(f"PTX line {instruction.line}: {instruction.text}") from error


def written_parameters(kernel):
    """Numbers of the parameters that an address of a store or of an atomic operation may come from."""
    names = [name for name, _ in kernel.params]
    comes_from = {}
    grew = True
    while grew:
        grew = False
        for i in kernel.instructions:
            if i.parts[0] in ("st", "atom", "bra", "ret", "bar", "cp", "setp") or not isinstance(
                i.operands[0], Register
            ):
                continue
            if i.parts[0] == "ld":
                found = {names.index(i.operands[1].base.name)} if i.parts[1] == "param" else set()
            else:
                found = set().union(*(comes_from.get(o.name, ()) for o in i.operands[1:] if isinstance(o, Register)))
            known = comes_from.setdefault(i.operands[0].name, set())
            if not found <= known:
                known |= found
                grew = True
    stores = [i.operands[0] for i in kernel.instructions if i.parts[:2] == ("st", "global")]
    atomics = [i.operands[1] for i in kernel.instructions if i.parts[0] == "atom"]
    return set().union(*(comes_from.get(address.base.name, ()) for address in stores + atomics))
