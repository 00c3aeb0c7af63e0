"""The compiled library: its SIMD layer, its choice of instruction set, and what it leaves unchanged in a process."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tarflow_fast import native
from tarflow_fast.ops import affine, explain

ISA = os.environ.get("TARFLOW_CPU_ISA")


def run_python(code, **environment):
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


@pytest.mark.every_isa
def test_the_instruction_set_asked_for_is_used():
    assert native.isa() == (ISA or native.isa()) and native.isa() in native.isas()
    assert native.library().tf_isa().decode() == native.isa()


# ---- SIMD layer ----------------------------------------------------------------------------------------------------


def native_exp(x):
    y = np.empty_like(x)
    native.library().tf_test_exp(x.ctypes.data, y.ctypes.data, x.size)
    return y


@pytest.mark.every_isa
def test_exp_is_within_one_ulp():
    """The largest error was measured once over all floats: 0.71 ulp, and 0.78 ulp for denormal results."""
    random = np.random.default_rng(0)
    everywhere = np.linspace(-104.5, 89.5, 700_003)
    near_zero = random.normal(size=300_000) * 10.0 ** random.uniform(-12, 0, 300_000)
    x = np.concatenate([everywhere, near_zero]).astype(np.float32)
    y, truth = native_exp(x), np.exp(x.astype(np.float64))
    overflow = truth >= 2.0**128 - 2.0**103  # from here on the nearest float is infinity
    assert np.isinf(y[overflow]).all() and overflow.any()
    x, y, truth = x[~overflow], y[~overflow], truth[~overflow]
    exponent = np.frexp(np.maximum(truth, 2.0**-126))[1] - 1
    error = np.abs(y - truth) / np.ldexp(1.0, exponent - 23)
    assert error.max() <= 1.0, (error.max(), x[error.argmax()])


@pytest.mark.every_isa
def test_exp_of_special_numbers():
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e38, -1e38, 88.72284, -104.0, 1e-45], np.float32)
    expected = np.array([1, 1, np.inf, 0, np.nan, np.nan, np.inf, 0, np.inf, 0, 1], np.float32)
    for n in range(1, x.size + 1):  # tails of every length
        np.testing.assert_array_equal(native_exp(x[:n].copy()), expected[:n])
    np.testing.assert_array_equal(native_exp(np.tile(x, 3)), np.tile(expected, 3))


@pytest.mark.every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_storage_rounds_as_torch_does(dtype):
    random = np.random.default_rng(0)
    any_bits = random.integers(0, 2**32, 300_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    middle = (random.normal(size=300_000) * 10.0 ** random.uniform(-9, 6, 300_000)).astype(np.float32)
    # These are all 16-bit numbers, and the points half way between two neighbours.
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    ties = (exact + exact.roll(1)) / 2
    x = torch.cat([torch.from_numpy(any_bits), torch.from_numpy(middle), exact, ties])[:-1]
    y, expected = torch.empty_like(x), x.to(dtype).float()
    native.library().tf_test_round(x.data_ptr(), y.data_ptr(), x.numel(), native.DTYPES[dtype])
    nan = expected.isnan()
    assert torch.equal(y.isnan(), nan)
    assert torch.equal(y[~nan].view(torch.int32), expected[~nan].view(torch.int32))


# ---- loading -------------------------------------------------------------------------------------------------------

QUIET = """
import ctypes, json, sys
import torch
def mxcsr():
    state = (ctypes.c_uint32 * 8)()
    ctypes.CDLL(None).fegetenv(state)
    return state[7] & ~0x3f  # without the sticky exception flags
def maps():
    return {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
before = mxcsr()
import tarflow_fast.ops
from tarflow_fast import native
loaded_by_import = any("_tarflow_cpu" in name for name in maps())
native.library()
after_load = mxcsr()
x, ab = torch.randn(4, 4000, 12, requires_grad=True), torch.randn(4, 4000, 24, requires_grad=True)
z, log_det = tarflow_fast.ops.affine(x, ab, backend="cpu")
(z.sum() + log_det.sum()).backward()
tiny = torch.full((1,), 1e-40) * 1.0
print(json.dumps({
    "loaded_by_import": loaded_by_import, "mxcsr": [before, after_load, mxcsr()], "denormal": tiny.item() != 0,
    "openmp": sorted(name for name in maps() if "gomp" in name or "libomp" in name or "iomp" in name),
    "needs_openmp": native.library().tf_has_openmp(), "triton": "triton" in sys.modules,
}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.uname().machine != "x86_64", reason="x86-64 Linux only")
def test_the_process_is_left_as_it_was():
    done = run_python(QUIET)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert not seen["loaded_by_import"], "importing must not load the library"
    assert not seen["triton"], "importing and running on the CPU must not import triton"
    assert len(set(seen["mxcsr"])) == 1 and seen["denormal"]
    assert len(seen["openmp"]) == 1, "two OpenMP runtimes would fight for the cores"


def test_unknown_isa():
    done = run_python("from tarflow_fast import native; native.library()", TARFLOW_CPU_ISA="sse9")
    built = ", ".join(native.isas())
    assert done.stderr.strip().endswith(f"ValueError: TARFLOW_CPU_ISA: expected one of {built}, got 'sse9'")


def test_unknown_isa_does_not_fall_back_quietly():
    code = "import torch, tarflow_fast.ops as o; o.affine(torch.zeros(1, 2, 3), torch.zeros(1, 2, 6))"
    assert "ValueError: TARFLOW_CPU_ISA" in run_python(code, TARFLOW_CPU_ISA="sse9").stderr


def test_unsupported_isa_is_refused():
    class Loaded:
        def tf_select_isa(self, name):
            return native.ISA_UNSUPPORTED

        def tf_built_isas(self):
            return b"baseline,avx512"

    error = native._select_isa(Loaded(), "avx512")
    assert isinstance(error, RuntimeError)
    assert str(error) == "TARFLOW_CPU_ISA: this machine cannot run 'avx512' (built: baseline, avx512)"


def test_every_declared_function_exists_and_every_exported_one_is_declared():
    header = (native.LIBRARY.parent.parent / "csrc" / "tarflow.h").read_text()
    exported = {line.split("(")[0].split()[-1].lstrip("*") for line in header.splitlines() if "TF_EXPORT " in line}
    exported -= {"TF_EXPORT"}
    assert {name for name in exported if name.startswith("tf_")} == set(native._FUNCTIONS)
    for name in native._FUNCTIONS:
        assert getattr(native.library(), name)


# ---- without the library -------------------------------------------------------------------------------------------


@pytest.fixture
def no_library(monkeypatch, fresh_warnings):
    monkeypatch.setattr(native, "_load", lambda: native.NativeUnavailable("the native CPU library is missing: a test"))


def test_auto_falls_back_and_warns_once(no_library, recwarn):
    x, ab = torch.randn(1, 3, 2), torch.randn(1, 3, 4)
    message = (
        r"^tarflow_fast runs on 'torch' instead of 'cpu' \(cpu tensors\): the native CPU library is missing: a test$"
    )
    with pytest.warns(RuntimeWarning, match=message):
        z, _ = affine(x, ab)
    affine(x, ab)  # a second warning would fail this test
    assert torch.equal(z, affine(x, ab, backend="torch")[0])


def test_named_backend_does_not_fall_back(no_library, monkeypatch):
    message = "^affine: backend 'cpu' cannot run: the native CPU library is missing: a test$"
    x, ab = torch.randn(1, 3, 2), torch.randn(1, 3, 4)
    with pytest.raises(RuntimeError, match=message):
        affine(x, ab, backend="cpu")
    monkeypatch.setenv("TARFLOW_FAST_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match=message):
        affine(x, ab)
    rows = {row["backend"]: row for row in explain() if row["op"] == "affine"}
    assert rows["torch"]["available"] and not rows["cpu"]["available"]
    assert rows["cpu"]["reason"] == "the native CPU library is missing: a test"


def test_backend_environment(monkeypatch):
    x, ab = torch.randn(1, 3, 2), torch.randn(1, 3, 4)
    monkeypatch.setenv("TARFLOW_FAST_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"^TARFLOW_FAST_BACKEND must be one of auto, torch, cpu, triton, cuda, got"):
        affine(x, ab)
    affine(x, ab, backend="cpu")  # the argument beats the environment
    monkeypatch.setenv("TARFLOW_FAST_BACKEND", "torch")
    affine(x, ab)
