"""The CUDA library compiles, exports exactly what its header declares, and loads where there is no GPU."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tarflow_fast import native, native_cuda
from tarflow_fast.ops import affine

ROOT = Path(__file__).parents[1]
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")


def setup_module_of_the_project():
    spec = importlib.util.spec_from_file_location("tarflow_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    library = tmp_path_factory.mktemp("cuda") / "library.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TARFLOW_FAST_CUDA", raising=False)
        report = setup_module_of_the_project().build_cuda(library)
    assert report["ok"], report["error"]
    return library


@needs_nvcc
def test_every_declared_function_is_there_and_nothing_else(built):
    header = (ROOT / "csrc" / "tarflow_cuda.h").read_text()
    declared = set(re.findall(r"TF_CUDA_EXPORT [\w\s*]*?(tf_cuda_\w+)\(", header))
    symbols = subprocess.run(["nm", "-D", "--defined-only", built], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in symbols.splitlines() if " T " in line}
    assert declared == set(native_cuda._FUNCTIONS) == {name for name in exported if name.startswith("tf_")}
    assert f"#define TF_CUDA_ABI_VERSION {native_cuda.ABI_VERSION}\n" in header


@needs_nvcc
def test_it_loads_without_a_gpu(built, monkeypatch):
    monkeypatch.setattr(native_cuda, "LIBRARY", built)
    native_cuda._load.cache_clear()
    try:
        library = native_cuda.library()
        assert library.tf_cuda_abi_version() == native_cuda.ABI_VERSION
        assert library.tf_cuda_affine_scratch(3, 1000, 12) >= 3 * 8
        nowhere = [None] * 5 + [1, 1, 1, 0, 0]
        pair = native.DTYPES[torch.float16], native.DTYPES[torch.float64]
        assert library.tf_cuda_affine_forward(*nowhere, *pair, None) == 1  # 1 is TF_CUDA_BAD_DTYPE, before any launch
        assert library.tf_cuda_error(native_cuda.FAILED + 1) == b"invalid argument"
    finally:
        native_cuda._load.cache_clear()


@needs_nvcc
def test_code_for_each_gpu_and_no_spills(built):
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def told(option):
        return subprocess.run([tool, option, built], capture_output=True, text=True, check=True).stdout

    assert {"sm_80", "sm_90"} <= set(re.findall(r"sm_\d+", told("--list-elf"))) and "sm_90" in told("--list-ptx")
    used = [dict(re.findall(r"(\w+):(\d+)", line)) for line in told("-res-usage").splitlines() if "REG:" in line]
    assert len(used) >= 2 * 24, "2 directions, 6 pairs of types, packed and not, 2 machines: 48 kernels"
    assert not [kernel for kernel in used if int(kernel["STACK"]) or int(kernel["LOCAL"])]


def test_it_may_be_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("TARFLOW_FAST_CUDA", "0")
    report = setup_module_of_the_project().build_cuda(tmp_path / "library.so")
    assert not report["ok"] and report["error"] == "TARFLOW_FAST_CUDA=0 left it out"
    monkeypatch.setattr(native_cuda, "LIBRARY", tmp_path / "library.so")
    monkeypatch.setattr(native, "build_report", lambda: {"cuda": report})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    native_cuda._load.cache_clear()
    assert native_cuda.missing() == "the CUDA library was not built: TARFLOW_FAST_CUDA=0 left it out"
    native_cuda._load.cache_clear()


def test_a_library_of_another_version_is_refused(monkeypatch, tmp_path):
    compiler = shutil.which("c++") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C++ compiler")
    source, library = tmp_path / "old.c", tmp_path / "old.so"
    source.write_text("int tf_cuda_abi_version(void) { return 0; }\n")
    subprocess.run([compiler, "-x", "c", "-shared", "-fPIC", source, "-o", library], check=True)
    assert ctypes.CDLL(str(library)).tf_cuda_abi_version() == 0
    monkeypatch.setattr(native_cuda, "LIBRARY", library)
    native_cuda._load.cache_clear()
    with pytest.raises(native.NativeUnavailable, match=r"of another version \(ABI 0, expected 2\)"):
        native_cuda.library()
    native_cuda._load.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    assert native_cuda.missing() == "there is no GPU"
    with pytest.raises(RuntimeError, match=r"^affine: backend 'cuda' cannot run: it needs GPU tensors, got cpu$"):
        affine(torch.zeros(1, 2, 3), torch.zeros(1, 2, 6), backend="cuda")
