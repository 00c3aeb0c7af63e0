"""The kernels of training and density compile for sm_80 and sm_90 without a GPU, in every configuration of tuning.py.

No registers may spill, shared memory must fit, tensor cores must be used where there are some, and loads have 16 bytes.

fp16 is compiled in fewer sizes. Compared over all 240 kernels below, it took the shared memory, stack, loads and stores
of bf16, because its elements have the same size.
"""

import importlib
import re

import pytest
import torch

pytest.importorskip("triton")
from step_compile import serialized
from test_triton_compile import SHARED_LIMIT, compile_kernel, fresh_cache, resources, widths  # noqa: F401

# ---- attention -------------------------------------------------------------------------------------------------------

STRIDES = ("stride_b", "stride_t", "stride_h")
ATTENTION_POINTERS = {  # {part: (pointers to the storage type, pointers to float32)}
    "forward": (("q_ptr", "k_ptr", "v_ptr", "out_ptr"), ("lse_ptr",)),
    "query": (("q_ptr", "k_ptr", "v_ptr", "out_ptr", "dout_ptr", "dqkv_ptr"), ("lse_ptr", "statistics_ptr")),
    "key": (("q_ptr", "k_ptr", "v_ptr", "dout_ptr", "dqkv_ptr"), ("statistics_ptr",)),
}


def attention_kernel(part):
    from tarflow_fast.kernels.triton import attention, attention_backward

    return getattr(attention if part == "forward" else attention_backward, part + "_kernel")


def compile_attention(part, arch, E, dtype, even):
    from tarflow_fast.kernels.triton import tuning

    stored, wide = ATTENTION_POINTERS[part]
    storage = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    tiles = tuning.attention(part, E, storage, arch)
    return compile_kernel(
        attention_kernel(part),
        arch,
        dict.fromkeys(stored, dtype) | dict.fromkeys(wide, "fp32"),
        ("T", "heads", "H", "together", *STRIDES),
        {"E": E, "EVEN": even, "BLOCK_OWN": tiles.own, "BLOCK_WALK": tiles.walk},
        tiles.num_warps,
        tiles.num_stages,
        floats=("scale", "logit_scale"),
        aligned=(*STRIDES, "T") if even else STRIDES,
    )


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize(
    "E, dtype", [*((E, dtype) for E in (16, 32, 64, 128) for dtype in ("bf16", "fp32")), (64, "fp16")]
)
@pytest.mark.parametrize("part", ATTENTION_POINTERS)
def test_attention(part, E, dtype, arch, tmp_path):
    """The kernel compiles both when tiles divide T evenly and when they do not."""
    for even in (False, True):
        compiled = compile_attention(part, arch, E, dtype, even)
        check_attention(compiled, arch, tmp_path)
        assert not serialized(compiled, tmp_path, arch)
        ptx = compiled.asm["ptx"]
        if dtype == "fp32":
            assert "mma" not in ptx, "TF32 must not replace float32"
        else:
            assert ("wgmma.mma_async" if arch == 90 else "mma.sync") in ptx


def check_attention(compiled, arch, folder):
    used = resources(compiled, folder)
    limit = SHARED_LIMIT[90] if arch == 90 else 99 * 1024  # desktop GPUs have 99 KiB and take the tiles of 80 too
    assert used["LOCAL"] == 0 and used["STACK"] == 0 and compiled.metadata.shared <= limit, used
    ptx = compiled.asm["ptx"]
    loads = widths(compiled) + [int(size, 16) for size in re.findall(r"cp\.async\.c[ag].*\], (0x\w+)", ptx)]
    # Only the few loads and the one store of row statistics are narrower: they have fewer numbers than threads.
    assert sum(width == 16 for width in loads) >= 2 / 3 * len(loads), sorted(loads)
    assert sum(width < 16 for width in widths(compiled, "st")) <= 1, widths(compiled, "st")


@pytest.mark.parametrize("part", ATTENTION_POINTERS)
def test_attention_of_one_token_and_head(part):
    """The kernel compiles with arguments that are 1. A launch turns these into constants."""
    stored, wide = ATTENTION_POINTERS[part]
    constants = {"E": 64, "EVEN": False, "BLOCK_OWN": 64, "BLOCK_WALK": 32} | dict.fromkeys(
        ("T", "heads", "H", "together"), 1
    )
    pointers = dict.fromkeys(stored, "bf16") | dict.fromkeys(wide, "fp32")
    compile_kernel(attention_kernel(part), 90, pointers, STRIDES, constants, floats=("scale", "logit_scale"))


def test_attention_tiles_fit_each_other():
    from tarflow_fast.kernels.triton import attention_tiles, tuning

    from tarflow_fast.ops import attention, layer_norm

    assert tuning.HEAD_SIZES == importlib.import_module(attention.__module__).HEAD_SIZES
    assert tuning.NORM_WIDTH == importlib.import_module(layer_norm.__module__).MAX_WIDTH
    for arch in SHARED_LIMIT:
        for dtype in (torch.float32, torch.bfloat16):
            for E in tuning.HEAD_SIZES:
                tiles = {part: tuning.attention(part, E, dtype, arch) for part in ATTENTION_POINTERS}
                for each in tiles.values():
                    assert each.own % each.walk == 0 and attention_tiles.PADDING.value % each.own == 0
                # key_kernel reads statistics past T, and query_kernel must have written those.
                assert tiles["query"].own % tiles["key"].walk == 0


# ---- layer_norm, bias_gelu, bias_residual ----------------------------------------------------------------------------


def rows_kernels(op, stored, stream, N, full):
    """Yields (kernel, pointers, integers, constants, num_warps) for the kernels of an op: forward, then backward."""
    import triton.language as tl
    from tarflow_fast.kernels.triton import tuning

    kernels = importlib.import_module("tarflow_fast.kernels.triton." + op)
    rows = tuning.layer_norm(N) if op == "layer_norm" else tuning.bias(N)
    tile = {"ROWS": rows.rows, "COLUMNS": rows.columns, "COMPUTE": tl.float32}
    statistics = {"mean_ptr": "fp32", "rstd_ptr": "fp32"}
    forward, backward = {
        "layer_norm": (
            (
                {"x_ptr": stream, "weight_ptr": "fp32", "bias_ptr": "fp32", "out_ptr": stored} | statistics,
                {"EPS": 1e-5},
            ),
            (
                {"dout_ptr": stored, "x_ptr": stream, "weight_ptr": "fp32", "dx_ptr": stream, "partial_ptr": "fp32"}
                | statistics,
                {"WEIGHTS": full},
            ),
        ),
        "bias_gelu": (
            ({"x_ptr": stored, "bias_ptr": "fp32", "out_ptr": stored}, {}),
            (
                {"dout_ptr": stored, "x_ptr": stored, "bias_ptr": "fp32", "dx_ptr": stored, "partial_ptr": "fp32"},
                {"BIAS": full},
            ),
        ),
        "bias_residual": (
            ({"x_ptr": stored, "bias_ptr": "fp32", "residual_ptr": stream, "out_ptr": stream}, {}),
            ({"dout_ptr": stream, "dx_ptr": stored, "partial_ptr": "fp32"}, {"INPUT": True, "BIAS": full}),
        ),
    }[op]
    width = {"C" if op == "layer_norm" else "N": N}
    yield kernels.forward_kernel, forward[0], ("rows",), forward[1] | width | tile, rows.num_warps
    yield kernels.backward_kernel, backward[0], ("rows", "steps"), backward[1] | width | tile, rows.num_warps


STORAGE = [("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")]  # (rows, stream)
WIDTHS = {  # those of the published flows, 61 (a multiple of nothing), and the widest; tiles change between
    "layer_norm": (61, 768, 1024, 2048, 4096, 8192),
    "bias_gelu": (61, 3072, 4096),
    "bias_residual": (61, 768, 1024),
}


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("stored, stream", STORAGE)
@pytest.mark.parametrize("op", WIDTHS)
def test_row_ops(op, stored, stream, arch, tmp_path):
    for N in WIDTHS[op][:2] if stored == "fp16" else WIDTHS[op]:
        forward, backward = rows_kernels(op, stored, stream, N, True)
        _, frozen = rows_kernels(op, stored, stream, N, False)
        for number, description in enumerate((forward, backward, frozen)):
            compiled = compile_kernel(description[0], arch, *description[1:])
            used = resources(compiled, tmp_path)
            assert used["LOCAL"] == 0 and used["STACK"] == 0, f"{number} of {N} spills: {used}"
            assert compiled.metadata.shared <= 48 * 1024
            if N != 61:
                loads, stores = widths(compiled), widths(compiled, "st")
                # The other loads are mean and rstd, which have one number per row.
                assert loads.count(4) <= 2 and loads.count(16) + loads.count(4) == len(loads), (number, N, loads)
                assert 16 in stores, (number, N, stores)


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize("parts", [1, 2])
def test_column_sums(parts, arch, tmp_path):
    from tarflow_fast.kernels.triton import columns, tuning

    rows, width, num_warps = tuning.COLUMN_SUMS
    pointers = {"partial_ptr": "fp32", "first_ptr": "bf16", "second_ptr": "bf16"}
    constants = {"PARTS": parts, "ROWS": rows, "COLUMNS": width}
    compiled = compile_kernel(columns.sum_kernel, arch, pointers, ("count", "N"), constants, num_warps, aligned=("N",))
    assert resources(compiled, tmp_path)["LOCAL"] == 0 and 16 in widths(compiled)


@pytest.mark.parametrize("op", ["layer_norm", "bias_gelu", "bias_residual"])
def test_row_ops_of_one_row(op):
    for kernel, pointers, integers, constants, num_warps in rows_kernels(op, "bf16", "fp32", 1, True):
        compile_kernel(kernel, 90, pointers, (), constants | dict.fromkeys(integers, 1), num_warps)


def test_column_sums_of_one_number():
    from tarflow_fast.kernels.triton import columns

    pointers = {"partial_ptr": "fp32", "first_ptr": "fp32", "second_ptr": "fp32"}
    constants = {"PARTS": 2, "ROWS": 32, "COLUMNS": 64, "count": 1, "N": 1}
    compile_kernel(columns.sum_kernel, 90, pointers, (), constants)
