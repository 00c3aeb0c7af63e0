"""What a kernel can do wrong. Each fault names the kernel, the lines of PTX and source, and a thread."""


class Fault(Exception):
    """A kernel did what no kernel may do."""


class OutOfBounds(Fault):
    """An access outside a buffer or outside the program's shared memory."""


class Misaligned(Fault):
    """An access whose address is no multiple of its size."""


class Undefined(Fault):
    """An undefined value decides something, or reaches global memory."""


class Race(Fault):
    """Two accesses of the same bytes, of which one writes, that nothing puts in order."""


class Diverged(Fault):
    """Threads that must meet do not."""


class Unsupported(Exception):
    """The emulator does not know this PTX. It is no fault of the kernel."""
