"""The native engine and memory: groups keep within limits, bytes taken are the bytes stated, and nothing leaks."""

import json
import os
import sys

import pytest
import torch
from compare import same_bits
from engine_cases import given, run, run_python, small_case
from flows import random_flow, random_noise

from tarflow_fast import native
from tarflow_fast.engines import cpu as engine_module
from tarflow_fast.engines import cpu_native as plan_module
from tarflow_fast.engines.cpu import Engine
from tarflow_fast.engines.cpu_native import Plan, Sizes, Workspace
from tarflow_fast.engines.weights import inspect

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "native")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_a_limit_is_met_with_smaller_groups_and_the_same_bits():
    case = small_case(B=9)
    sizes = Sizes.of(inspect(case.block), case.block.transform, "fp32")
    one = Plan.bytes_of(sizes) + Workspace.bytes_of(sizes, 2)
    expected, seen = run(case)[0], []
    engine = Engine("fp32", memory_limit=one)
    assert same_bits(engine.invert(*given(case), on_token=lambda: seen.append(1))[0], expected)
    assert engine._workspace.rows == 2 and engine._plan.bytes + engine._workspace.bytes <= one
    assert len(seen) == 20, "progress must count a block's tokens once, whatever the number of groups"
    with pytest.raises(MemoryError, match=rf"one row needs {one:,} bytes .* over the limit of {one - 1:,}$"):
        run(case, memory_limit=one - 1)


def test_a_group_is_as_large_as_the_limit_allows():
    case = small_case(B=9)
    sizes = Sizes.of(inspect(case.block), case.block.transform, "fp32")
    for rows in range(1, 10):
        limit = Plan.bytes_of(sizes) + Workspace.bytes_of(sizes, 2 * rows)
        engine = Engine("fp32", memory_limit=limit)
        engine.invert(*given(case))
        assert engine._group == -(-9 // -(-9 // rows)), "as few groups as can be, of even size"
        engine = Engine("fp32", memory_limit=limit + 1)
        engine.invert(*given(case))
        assert engine._group == -(-9 // -(-9 // rows)), "as few groups as can be, of even size"


def test_a_large_batch_is_inverted_in_groups(monkeypatch):
    case = small_case(B=9)
    expected, engine = run(case)[0], Engine("fp32")
    assert engine_module.MOST_ROWS * 2 * 1024**2 * 24 < 0.2 * 200e9, (
        "a layer of C 1024 must take less than 200 ms at 200 GFLOP/s"
    )
    monkeypatch.setattr(engine_module, "MOST_ROWS", 8)
    assert same_bits(engine.invert(*given(case))[0], expected) and engine._group == 3


def test_a_block_on_its_own_gives_its_memory_back():
    model = random_flow(channels=64)
    block, z = model.blocks[0], random_noise(model)
    block.reverse(z)
    kept = len(plan_module._spares._kept)
    assert kept
    block.reverse(z)
    assert len(plan_module._spares._kept) == kept


def test_the_model_takes_limit_and_precision():
    model = random_flow(channels=64, num_classes=3)
    noise, y = random_noise(model, 5), torch.arange(5) % 3
    expected = model.reverse(noise, y, 1.0)
    assert same_bits(model.reverse(noise, y, 1.0, memory_limit=10**6), expected)
    assert not same_bits(model.reverse(noise, y, 1.0, precision="bf16"), expected)
    assert model.sample(2, seed=1, precision="int8").isfinite().all()
    with pytest.raises(MemoryError, match=r"over the limit of 1,000$"):
        model.reverse(noise, y, memory_limit=1000)
    with pytest.raises(ValueError, match="precision must be None or one of fp32, bf16, int8, got 'fp8'"):
        model.reverse(noise, y, precision="fp8")
    with pytest.raises(TypeError, match=r"memory_limit must be an int, got str"):
        model.reverse(noise, y, memory_limit="1 GB")


GROWTH = """
import json, torch
torch.set_num_threads(2)
from tarflow_fast.block import MetaBlock
from tarflow_fast.transforms import Guidance
from tarflow_fast.engines.cpu import Engine
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
block = MetaBlock(12, 768, 20, num_layers={layers}).eval()
Engine("fp32").invert(MetaBlock(4, 64, 4).bijection, torch.zeros(2, 4, 4), None, Guidance())
engine = Engine("{precision}")
z = torch.randn({B}, 20, 12)
before = resident()
engine.invert(block.bijection, z, None, Guidance())
print(json.dumps([engine._plan.bytes + engine._workspace.bytes, resident() - before]))
"""


@linux
@pytest.mark.parametrize("precision, layers, B", [("fp32", 1, 300), ("bf16", 4, 8), ("int8", 4, 100)])
def test_the_process_grows_by_the_bytes_stated(precision, layers, B):
    done = run_python(GROWTH.format(precision=precision, layers=layers, B=B))
    assert done.returncode == 0, done.stderr
    stated, grown = json.loads(done.stdout)
    assert stated > 20e6 and 0.9 * stated <= grown <= 1.1 * stated, (stated, grown)


@linux
def test_nothing_leaks():
    case = small_case(num_tokens=3)

    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(50):
        run(case)
    before = resident()
    for _ in range(1000):
        run(case)
    assert resident() - before < 1 << 20


TAKEN_BACK = """
import ctypes, json, torch
from tarflow_fast.block import MetaBlock
from tarflow_fast.transforms import Guidance
from tarflow_fast.engines.cpu import Engine
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def invert():
    engine = Engine("fp32")
    x = engine.invert(block.bijection, z, None, Guidance())[0]
    assert engine._plan.handle.value == places[0][0], "the plan put aside was not taken"
    return x
block = MetaBlock(12, 512, 8, num_layers=4).eval()
torch.nn.init.normal_(block.proj_out.weight, std=0.01)
z = torch.randn(64, 8, 12)
engine = Engine("fp32")
first = engine.invert(block.bijection, z, None, Guidance())[0]
places = [(thing.handle.value, thing.bytes) for thing in (engine._plan, engine._workspace)]
engine.close()  # its memory is put aside
before = resident()
for at, size in places:
    at = -(-at // 4096) * 4096
    assert ctypes.CDLL(None).madvise(ctypes.c_void_p(at), ctypes.c_size_t(size // 4096 * 4096), 21) == 0  # MADV_PAGEOUT
print(json.dumps([sum(size for _, size in places), before - resident(), torch.equal(invert(), first)]))
"""


@linux
def test_memory_kept_for_the_next_call_can_be_taken_back_meanwhile():
    done = run_python(TAKEN_BACK)
    assert done.returncode == 0, done.stderr
    kept, taken, same = json.loads(done.stdout)
    assert kept > 60e6 and taken > 0.8 * kept and same
