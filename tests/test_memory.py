"""The bytes left to a process: limits of the machine and of control groups (v1 and v2), in and out of a container."""

import pytest
import torch
from engine_cases import BlockCase, given, random_block

from tarflow_fast import native
from tarflow_fast.engines import cpu as engine
from tarflow_fast.engines import memory
from tarflow_fast.engines.memory import available_memory
from tarflow_fast.transforms import Guidance

GIB = 2**30
MEMINFO = "MemTotal:       32000000 kB\nMemAvailable:   10485760 kB\n"  # 10 GiB are available
V2 = "0::/user.slice/job\n"
V1 = "5:cpu,cpuacct:/job\n4:memory:/batch/job\n0::/\n"


def machine(root, cgroup, **files):
    """A root folder with these files. Their names are paths below sys/fs/cgroup, with "__" in place of "/"."""
    files = {"sys/fs/cgroup/" + name.replace("__", "/"): str(text) for name, text in files.items()}
    for name, text in ({"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder, limit, usage, stat="", names=("memory.max", "memory.current")):
    return {f"{folder}__{names[0]}": limit, f"{folder}__{names[1]}": usage, f"{folder}__memory.stat": stat}


def group_v1(folder, limit, usage, stat=""):
    return group(f"memory__{folder}", limit, usage, stat, ("memory.limit_in_bytes", "memory.usage_in_bytes"))


CASES = {
    "no group": (V2, {}, 10 * GIB),
    "no limit": (V2, group("user.slice__job", "max", 3 * GIB), 10 * GIB),
    "a limit": (V2, group("user.slice__job", 4 * GIB, 3 * GIB), GIB),
    "a wide limit": (V2, group("user.slice__job", 40 * GIB, 3 * GIB), 10 * GIB),
    "a limit above": (V2, group("user.slice__job", "max", GIB) | group("user.slice", 8 * GIB, 5 * GIB), 3 * GIB),
    "file cache": (V2, group("user.slice__job", 4 * GIB, 3 * GIB, f"anon 7\ninactive_file {2 * GIB}\n"), 3 * GIB),
    "a blank line": (V2, group("user.slice__job", 4 * GIB, 3 * GIB, f"anon 7\n\ninactive_file {GIB}\n"), 2 * GIB),
    "past the limit": (V2, group("user.slice__job", 4 * GIB, 5 * GIB), 0),
    "in a container": ("0::/\n", {"memory.max": 2 * GIB, "memory.current": GIB}, GIB),
    "the host's path": ("0::/docker/abc\n", {"memory.max": 2 * GIB, "memory.current": GIB}, GIB),
    "another's path": ("0::/../abc\n", {"memory.max": 2 * GIB, "memory.current": GIB}, GIB),
    "version 1": (V1, group_v1("batch__job", 6 * GIB, 4 * GIB), 2 * GIB),
    "version 1, none": (V1, group_v1("batch__job", 9223372036854771712, 4 * GIB), 10 * GIB),
    "version 1, above": (V1, group_v1("batch", 6 * GIB, 5 * GIB), GIB),
    "version 1, cache": (V1, group_v1("batch__job", 6 * GIB, 4 * GIB, f"total_inactive_file {GIB}\n"), 3 * GIB),
}


@pytest.mark.parametrize("name", CASES)
def test_the_least_that_is_left(tmp_path, name):
    cgroup, files, left = CASES[name]
    root = machine(tmp_path, cgroup, **files)
    assert available_memory(root=root) == left * 9 // 10
    assert available_memory(held=12345, root=root) == left * 9 // 10 + 12345


def test_where_nothing_tells(tmp_path):
    assert available_memory(root=tmp_path) is None
    assert available_memory(held=5, root=tmp_path) is None


@pytest.mark.skipif(not native.available(), reason=native.reason() or "native")
def test_memory_held_from_the_block_before_counts_as_left(monkeypatch):
    """If no memory is left except what the first block took, the second block is still not inverted row by row."""
    generator = torch.Generator().manual_seed(0)
    block = random_block(generator, token_size=6, channels=128, num_tokens=21, num_layers=2)
    case = BlockCase(block, torch.randn(9, 21, 6, generator=generator), None, Guidance())
    inversion, groups = engine.Engine("fp32"), []
    run = inversion._run
    monkeypatch.setattr(inversion, "_run", lambda job, *rest: (groups.append(job.batch), run(job, *rest)))
    monkeypatch.setattr(memory, "UNCHECKED", 0)
    for left in (10**9, 0):
        monkeypatch.setattr(engine, "available_memory", lambda held, left=left: left + held)
        inversion.invert(*given(case))
    assert groups == [9, 9]
