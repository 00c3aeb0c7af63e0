"""How many bytes an inverse may take: what the machine has left, and what the control groups of the process allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

__all__ = ["available_memory", "rows_within"]

UNCHECKED = 1 << 26  # bytes below this are taken without a look at the machine's memory

# of a control group: its limit, what it uses, and which part of that the kernel would give back first
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
V2 = "memory.max", "memory.current", "inactive_file"


def available_memory(held: int = 0, root: Path = Path("/")) -> int | None:
    """Nine tenths of the bytes left to this process, and all of those it holds already; None where nothing tells.

    Left is the least of what the kernel calls available and, for the process's control group (version 1 or 2, as
    containers and batch systems set them) and each above it, limit - usage, where file cache that was not used of late
    does not count as usage.

    Args:
        held: bytes the caller has already, to be used again or given back before more is taken.
        root: where /proc and /sys lie.
    """
    left = [*_available(root), *_left_in_groups(root)]
    return min(left) * 9 // 10 + held if left else None


def rows_within(
    rows: int,
    needed: Callable[[int], int],
    limit: int | None,
    left: Callable[[], int | None],
    what: Callable[[], str],
) -> int:
    """How many of `rows` rows may be computed together: the policy of every engine.

    Args:
        rows: as many as there are, or as many as pay.
        needed: bytes that so many rows take; more rows never take less.
        limit: bytes asked for by the user; None: what `left` says, where a look is worth it.
        left: bytes the machine has left, or None where nothing tells.
        what: the parts of what one row needs, for the message.

    Raises:
        MemoryError: one row alone is over the limit.
    """
    if limit is None and needed(rows) > UNCHECKED:
        limit = left()
    if limit is None or needed(rows) <= limit:
        return rows
    if needed(1) > limit:
        raise MemoryError(f"block_inverse: one row needs {needed(1):,} bytes ({what()}), over the limit of {limit:,}")
    most, too_many = 1, rows
    while too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if needed(middle) <= limit else (most, middle)
    return most


def _available(root: Path) -> Iterator[int]:
    for name, value in _table(root / "proc/meminfo"):
        if name == "MemAvailable:":
            yield value * 1024


def _left_in_groups(root: Path) -> Iterator[int]:
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", V2
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", V1
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        # In a container the path may be the host's, which is not to be seen there: then the root is the group.
        for above in (group, *group.parents) if ".." not in group.parts else (PurePosixPath(),):
            yield from _left(base / above, *names)


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
    if most.isdigit() and used.isdigit():  # no limit is "max"
        cache = dict(_table(folder / "memory.stat")).get(reclaimable, 0)
        yield max(0, int(most) - max(0, int(used) - cache))


def _table(path: Path) -> Iterator[tuple[str, int]]:
    for line in _read(path).splitlines():
        words = line.split()
        if len(words) > 1 and words[1].isdigit():
            yield words[0], int(words[1])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
