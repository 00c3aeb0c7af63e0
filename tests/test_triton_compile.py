"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, without spills, and with wide loads.

Shared memory must stay within the limit. float16 is compiled in two sizes. Compared over all 120 kernels below, it took
the shared memory, stack, loads and stores of bfloat16, because its elements have the same size.
"""

import re

import pytest
import torch
from cases import AFFINE_CASES

from tarflow_fast.ops.affine import DTYPES

triton = pytest.importorskip("triton")
from step_compile import SHARED_LIMIT, Recorder, build, resources  # noqa: E402

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def compile_kernel(kernel, arch, pointers, integers, constants, num_warps=4, num_stages=3, floats=(), aligned=()):
    """Compiles a kernel.

    Args:
        pointers: {argument: "fp32" | "bf16" | ...}. All pointers are 16-byte aligned, as torch allocates them.
        aligned: the integers that are multiples of 16.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = (
        {name: "*" + kind for name, kind in pointers.items()}
        | dict.fromkeys(integers, "i32")
        | dict.fromkeys(floats, "fp32")
    )
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *aligned)},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def widths(compiled, kind="ld"):
    """A list of the bytes of each global load (or store) instruction of the PTX."""
    found = re.findall(rf"{kind}\.global[\w.]*?(?:\.v(\d))?\.[bfu](\d+)", compiled.asm["ptx"])
    return [int(lanes or 1) * int(bits) // 8 for lanes, bits in found]


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize(
    "dtypes, D",
    [
        (pair, D)
        for pair in DTYPES
        for D in (12, 3, 48, 192, 5000)  # published flows 12, 48 and 192; unaligned rows 3; several tiles 5000
        if pair[0] != torch.float64 and (torch.float16 not in pair or D in (12, 3))
    ],
    ids=str,
)
def test_affine(dtypes, D, arch, tmp_path):
    import triton.language as tl
    from tarflow_fast.kernels.triton import affine as kernels

    x, ab = (NAMES[dtype] for dtype in dtypes)
    block_t, block_d = kernels.tile(D)
    forward = {"x_ptr": x, "ab_ptr": ab, "z_ptr": x, "sum_ptr": "fp32"}
    backward = dict.fromkeys(("dz_ptr", "x_ptr", "dx_ptr"), x) | dict.fromkeys(("ab_ptr", "dab_ptr"), ab)
    backward |= {"dlog_det_ptr": "fp32"}
    tile = {"D": D, "BLOCK_T": block_t, "BLOCK_D": block_d, "COMPUTE": tl.float32}
    for scale, flip in ((True, True), (True, False), (False, True)):
        constants = tile | {"SCALE": scale, "FLIP": flip}
        for kernel, pointers in ((kernels.forward_kernel, forward), (kernels.backward_kernel, backward)):
            compiled = compile_kernel(kernel, arch, pointers, ("T", "chunks"), constants, kernels.NUM_WARPS)
            used = resources(compiled, tmp_path)
            assert used["LOCAL"] == 0 and used["STACK"] == 0, f"spills: {used}"
            assert compiled.metadata.shared <= 8192 < SHARED_LIMIT[arch]
            if D * min(dtype.itemsize for dtype in dtypes) % 16 == 0:
                assert max(widths(compiled)) == 16 and max(widths(compiled, "st")) == 16
                assert sum(width == 16 for width in widths(compiled)) >= len(widths(compiled)) - 1


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_affine_log_det(arch, tmp_path):
    from tarflow_fast.kernels.triton import affine as kernels

    pointers = {"sum_ptr": "fp32", "log_det_ptr": "fp32"}
    compiled = compile_kernel(kernels.log_det_kernel, arch, pointers, ("count",), {"BLOCK": 256})
    assert resources(compiled, tmp_path)["LOCAL"] == 0


@pytest.mark.parametrize("D", sorted({case.D for case in AFFINE_CASES}))
def test_affine_tiles_are_powers_of_two(D):
    from tarflow_fast.kernels.triton import affine as kernels

    block_t, block_d = kernels.tile(D)
    assert block_t * block_d == kernels.TILE and block_t & (block_t - 1) == 0 and block_d & (block_d - 1) == 0


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("B, W, D", [(1, 16, 12), (16, 16, 192), (3, 1, 5), (16, 256, 48), (2, 8, 5000)])
def test_accept(B, W, D, arch, monkeypatch, tmp_path):
    """Acceptance by windows, as the engine launches it: guided and not, with a tolerance and without one."""
    from tarflow_fast.kernels.triton import accept as kernels

    seen, T = [], 1025
    monkeypatch.setattr(kernels, "accept_kernel", Recorder(kernels.accept_kernel, seen))

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    for parts, rows, tolerance in ((2, 2 * B, 1e-3), (1, B, 1e-3), (2, B, 0)):
        starts, state = empty(2, rows, dtype=torch.int32), empty(6, B, dtype=torch.int32)
        kernels.accept(
            v=empty(B, W, D), parameters=empty(B, W, parts * D), z=empty(B, T, D),
            x=empty(B, T, D), order=starts[0], state=state, starts=starts, residual=empty(B),
            history=state, left=state[0], tolerance=tolerance, last=T - 2,
        )  # fmt: skip
    for kernel, _, given, options in seen:
        compiled = build(kernel, given, options, arch)
        used = resources(compiled, tmp_path)
        assert used["LOCAL"] == 0 and used["STACK"] == 0, f"spills: {used}"
        assert compiled.metadata.shared <= 8192
        assert D % 16 or max(widths(compiled)) == 16
