"""Every kernel of a sampling step compiles for sm_80 and sm_90 without a GPU.

`make gpu-proof` compiles every specialization that the published models launch at B = 1 to 128, guided and not. Without
it one specialization of each shape of tiles is compiled. No registers may spill, two programs must fit, tensor cores
and 16-byte loads must be used, no products may wait for one another, and copies must be under way while one is used.

fp16 is compiled for one model only. Compared over all 132 specializations and both architectures, it took the shared
memory, stack, loads and matrix instructions of bf16. Its elements have the same size, and its tiles are the same.
"""

import pytest
import torch

pytest.importorskip("triton")
from step_compile import (
    DTYPES,
    KERNELS,
    SHARED_LIMIT,
    build,
    chosen,
    copies,
    describe,
    every_launch,
    launches,
    pipeline,
    products,
    resources,
    same,
    serialized,
    wide_loads,
)


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_step(kernel, dtype, arch, tmp_path):
    found, faults = every_launch(dtype)[kernel], []
    if dtype == torch.float16:
        found = [pair for pair in found if pair[0] == "imagenet64"]
    assert found
    found = chosen(found)
    for model, launch in found:
        faults += [f"{model}: {describe(launch)} {fault}" for fault in check(launch, kernel, dtype, arch, tmp_path)]
    assert not faults, "\n".join(faults)


def check(launch, kernel, dtype, arch, folder):
    """Yields what is wrong with this launch."""
    jitted, _, given, options = launch
    compiled = build(jitted, given, options, arch)
    used, loads = resources(compiled, folder), wide_loads(compiled)
    if used["LOCAL"] or used["STACK"]:
        yield f"spills: {used}"
    if compiled.metadata.shared > SHARED_LIMIT[arch] // 2:
        yield f"takes {compiled.metadata.shared} bytes of shared memory: two programs must fit a multiprocessor"
    expected = set()
    if kernel != "normalize" and not given.get("ONE") and dtype != torch.float32:
        big = given.get("BLOCK_OUT", given.get("BLOCK_T")) >= 64
        expected = {"wgmma"} if big and arch == 90 else {"mma"}
    if products(compiled) != expected:
        yield f"multiplies by {products(compiled)}, not {expected}"
    if said := serialized(compiled, folder, arch):
        yield said
    if given.get("ONE"):
        # Two tiles of keys and values are under way, each a group of its own. In fp32 it is one.
        before, left = pipeline(compiled)
        if not before or left != (0 if dtype == torch.float32 else 2):
            yield f"has {before} copies before the first wait, which leaves {left} groups under way"
    wide = sum(size == 16 for size in loads)
    # The other loads are biases, positions and single numbers. A token of 12 numbers is no multiple of 16 bytes.
    if kernel == "tail":  # it has more of these than of others, but weights and h are copied, all by 16 bytes
        if set(copies(compiled)) != {16}:
            yield f"copies {sorted(copies(compiled))} bytes at a time"
    elif wide == 0 or (kernel != "embed" and wide < len(loads) / 2):
        yield f"loads {sorted(loads)} bytes at a time"


def test_nothing_that_is_launched_is_left_out():
    """Two launches that look alike may differ in what they compile to: fc2 and proj of one width in their inputs."""
    bf16 = every_launch(torch.bfloat16)
    keys = {same(launch) for pairs in bf16.values() for _, launch in pairs}
    for B in (1, 16):
        step = launches("imagenet64", B, False, torch.bfloat16)
        assert {same(launch) for launch in step} <= keys
        residual = {launch[2]["INPUTS"] for launch in step if launch[2].get("EPILOGUE") == "residual"}
        assert residual == {768, 3072}


def test_half_precisions_have_the_same_tiles():
    bf16, fp16 = (every_launch(dtype) for dtype in (torch.bfloat16, torch.float16))
    for kernel in KERNELS:
        lines = [[(model, describe(launch), launch[3]) for model, launch in found[kernel]] for found in (bf16, fp16)]
        assert lines[0] == lines[1]


def test_every_step_launches_every_kernel():
    """With few queries the next layer normalizes. With more, a kernel of its own does."""
    few, many = (
        {launch[0].__name__.removesuffix("_kernel") for launch in launches("afhq256", B, False, torch.bfloat16)}
        for B in (1, 128)
    )
    assert many == set(KERNELS) and few == many - {"normalize"}


def test_launches_are_those_of_the_tuning():
    """With one query, tiles are narrow, and sums over inputs are split until every multiprocessor has a program."""
    few = {describe(launch): launch[1] for launch in launches("afhq256", 1, False, torch.bfloat16)}
    assert few["linear residual out=16 in=256 M=16 splits=3"] == (48, 3)
    assert few["linear append norm out=16 in=256 M=16 splits=1"] == (144, 1)
    many = {describe(launch): launch[1] for launch in launches("afhq256", 128, True, torch.bfloat16)}
    assert many["attention W=1 T=64 splits=1"] == (2 * 128 * 12, 1)
    assert "normalize" in many and "linear append out=64 in=64 M=64 splits=1" in many
