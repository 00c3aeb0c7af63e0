"""The memory that a call adds to the process at its peak."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def status(name: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return 1024 * int(line.split()[1])


def added_memory(run: Callable[[], object]) -> float | None:
    """The peak of resident memory during `run` less the resident memory before it, in bytes; None where it is unknown.

    Before the call the allocator gives its free pages back to Linux, which then forgets the peak so far. Otherwise the
    call would find the memory of the calls before it. Linux counts pages late, so some 100 kB may be missing.
    """
    if not sys.platform.startswith("linux"):
        run()
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        CLEAR.write_text("5")
    except OSError:
        run()
        return None
    before = status("VmRSS")
    run()
    return float(max(status("VmHWM") - before, 0))
