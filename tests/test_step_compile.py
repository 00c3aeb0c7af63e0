"""Every kernel of a sampling step compiles for sm_80 and sm_90 without a GPU, as the published models configure it.

Between them the cases hold every tile the tuning chooses: few queries, some, many, a window. All published models:
`python tests/step_compile.py`.
"""

import pytest
import torch

pytest.importorskip("triton")
from step_compile import SHARED_LIMIT, build, describe, launches, products, resources, wide_loads

CASES = {  # model, B, guided, dtype, W
    "one-image-bf16": ("afhq256", 1, False, torch.bfloat16, 1),
    "some-bf16": ("imagenet128", 16, True, torch.bfloat16, 1),
    "many-bf16": ("afhq256", 128, True, torch.bfloat16, 1),
    "window-fp16": ("imagenet64", 4, False, torch.float16, 16),
    "one-image-fp32": ("imagenet64", 1, True, torch.float32, 1),
    "many-fp32": ("imagenet128", 128, False, torch.float32, 1),
}


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("case", CASES)
def test_step(case, arch, tmp_path):
    dtype = CASES[case][3]
    found = launches(*CASES[case])
    assert {launch[0].__name__ for launch in found} >= {
        "embed_kernel",
        "linear_kernel",
        "attention_kernel",
        "tail_kernel",
    }
    for launch in found:
        kernel, _, given, options = launch
        compiled, told = build(kernel, given, options, arch), describe(launch)
        used, loads = resources(compiled, tmp_path), wide_loads(compiled)
        assert used["LOCAL"] == 0 and used["STACK"] == 0, f"{told} spills: {used}"
        assert compiled.metadata.shared <= SHARED_LIMIT[arch] // 2, f"{told}: two programs must fit a multiprocessor"
        multiplies = kernel.__name__ not in ("normalize_kernel",) and not given.get("ONE")
        if not multiplies or dtype == torch.float32:
            expected = set()
        else:
            big = given.get("BLOCK_N", given.get("BLOCK_T", given.get("BLOCK_D"))) >= 64
            expected = {"wgmma"} if big and arch == 90 else {"mma"}
        assert products(compiled) == expected, told
        assert max(loads) == 16 or kernel.__name__ == "embed_kernel", f"{told}: {loads}"
        if kernel.__name__ in ("linear_kernel", "attention_kernel"):
            # The rest are biases, positions and single numbers.
            assert sum(size == 16 for size in loads) >= len(loads) // 2, f"{told}: {loads}"


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_fp32_window_attention(arch, tmp_path):
    """The kernel with the most registers."""
    found = launches("afhq256", 128, False, torch.float32, 16)
    (kernel, _, given, options) = next(launch for launch in found if launch[0].__name__ == "attention_kernel")
    used = resources(build(kernel, given, options, arch), tmp_path)
    assert used["LOCAL"] == 0 and used["STACK"] == 0, used


def test_launches_are_those_of_the_tuning():
    """One query: narrow tiles, and the sum over K split until every multiprocessor has a program."""
    few = {describe(launch): launch[1] for launch in launches("afhq256", 1, False, torch.bfloat16)}
    assert few["linear residual N=16 M=16 K=256 splits=3"] == (48, 3)
    assert few["linear append norm N=16 M=16 K=256 splits=1"] == (144, 1)
    many = {describe(launch): launch[1] for launch in launches("afhq256", 128, True, torch.bfloat16)}
    assert many["attention W=1 T=64 splits=1"] == (2 * 128 * 12, 1)
    assert "normalize" in many and "linear append N=64 M=64 K=64 splits=1" in many
