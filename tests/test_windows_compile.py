"""The kernels of a pass over windows compile for sm_80 and sm_90 without a GPU, as the engine launches them.

Two differ from those of a sampling step (tests/test_step_compile.py): attention, which keeps values that are not finite
from earlier queries, and the tail, which writes to buffers of its own. Acceptance is in tests/test_triton_compile.py.
"""

import functools

import pytest
import torch

pytest.importorskip("triton")
from step_compile import DTYPES, MODELS, SHARED_LIMIT, Recorder, build, describe, products, resources, same

DIFFERENT = ("attention", "tail")
PASSES = {"imagenet64": (1, 16, False), "afhq256": (128, 16, True), "imagenet128": (4, 64, True)}  # B, W, guided


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@functools.cache
def launches(dtype):
    """{kernel: [launch]}, each specialization once: the published models with 1 to 128 rows, guided and not."""
    from tarflow_fast.kernels.triton import accept, affine_inverse, cached_attention, step_embed, step_linear

    from tarflow_fast.block import MetaBlock
    from tarflow_fast.engines.triton_windows import WindowWorkspace
    from tarflow_fast.engines.weights import inspect

    seen, found = [], {}
    with pytest.MonkeyPatch.context() as patch:
        for module in (accept, step_embed, step_linear, cached_attention, affine_inverse):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, Recorder(getattr(module, name), seen))
        for model, (B, W, guided) in PASSES.items():
            C, D, T = MODELS[model]
            with torch.device("meta"):
                block = MetaBlock(D, C, T, num_layers=1)
            WindowWorkspace(inspect(block), B, guided, dtype, W, 1e-3).step()
    for launch in seen:
        found.setdefault(launch[0].__name__.removesuffix("_kernel"), {}).setdefault(same(launch), launch)
    return {name: list(each.values()) for name, each in found.items()}


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("kernel", DIFFERENT)
def test_pass(kernel, dtype, arch, tmp_path):
    found, faults = launches(dtype)[kernel], []
    assert found and all(given["APART"] for _, _, given, _ in found)
    for jitted, grid, given, options in found:
        compiled = build(jitted, given, options, arch)
        used, name = resources(compiled, tmp_path), describe((jitted, grid, given, options))
        if used["LOCAL"] or used["STACK"]:
            faults.append(f"{name} spills: {used}")
        if compiled.metadata.shared > SHARED_LIMIT[arch] // 2:
            faults.append(f"{name} takes {compiled.metadata.shared} bytes of shared memory")
        if dtype != torch.float32 and not products(compiled):
            faults.append(f"{name} multiplies without tensor cores")
    assert not faults, "\n".join(faults)


def test_a_pass_ends_with_acceptance():
    names = [name for name in launches(torch.bfloat16) if name in (*DIFFERENT, "accept")]
    assert names == ["attention", "tail", "accept"]
