"""Packaging: the wheel built from the sdist works outside the checkout, and an install works without a compiler.

Nothing is downloaded, because the build backend runs with this interpreter's own setuptools.
"""

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import json, warnings
import torch
import tarflow_fast, tarflow_fast.kernels.triton
from tarflow_fast import info, native
from tarflow_fast.ops import affine
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        z, log_det = affine(torch.ones(1, 3, 2), torch.full((1, 3, 4), 0.5))
print(json.dumps({
    "file": tarflow_fast.__file__, "kernels": tarflow_fast.kernels.triton.__file__, "available": native.available(),
    "warnings": [str(w.message) for w in caught if w.category is RuntimeWarning],
    "isas": native.isas(), "info": info.format_info(), "report": native.build_report(), "log_det": log_det.item(),
}))
"""


def python(code, cwd, **environment):
    command = [sys.executable, "-c", code]
    # The CUDA library has a test of its own (tests/test_cuda_build.py). Building it here would only cost time.
    environment = os.environ | {"TARFLOW_FAST_CUDA": "0"} | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def backend(source, hook, out, **environment):
    """Calls a hook of the build backend, as pip does, and returns the path of the file that it made."""
    out.mkdir(exist_ok=True)
    code = f"import setuptools.build_meta as b; print(b.{hook}({str(out)!r}))"
    done = python(code, source, **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out / done.stdout.splitlines()[-1]


def use(wheel, folder):
    """Unpacks a wheel and runs USE in another folder, where only this copy of the package can be imported.

    PyTorch comes from this interpreter.
    """
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    done = python(USE, folder, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert Path(told["file"]).is_relative_to(site) and Path(told["kernels"]).is_relative_to(site)
    return told


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of the unpacked sdist. A file of the checkout that the sdist lacks is missing here too."""
    folder = tmp_path_factory.mktemp("sdist")
    ignore = shutil.ignore_patterns(
        ".*", "build", "dist", "*.so", "*.egg-info", "build_report.json", "__pycache__", "demo"
    )
    shutil.copytree(ROOT, folder / "checkout", ignore=ignore)
    with tarfile.open(backend(folder / "checkout", "build_sdist", folder / "out")) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.glob("tarflow_fast-*")
    return unpacked


def test_sdist_holds_every_source(source):
    for folder, pattern in (("csrc", "*.*"), ("kernels", "*.py"), ("tarflow_fast", "*.py"), ("tests", "*.py")):
        for path in (ROOT / folder).rglob(pattern):
            assert (source / path.relative_to(ROOT)).exists(), path
    assert {path.name for path in source.iterdir()} >= {
        "pyproject.toml",
        "setup.py",
        "Makefile",
        "LICENSE",
        "README.md",
    }


def test_wheel_of_the_sdist(source, tmp_path):
    wheel = backend(source, "build_wheel", tmp_path / "wheel", TARFLOW_FAST_REQUIRE_NATIVE="1")
    assert re.fullmatch(r"tarflow_fast-[\d.]+-py3-none-\w+\.whl", wheel.name), "one wheel must serve every Python"
    names = zipfile.ZipFile(wheel).namelist()
    assert {"tarflow_fast/_tarflow_cpu.so", "tarflow_fast/build_report.json"} <= set(names)
    assert not [name for name in names if name.startswith(("kernels/", "csrc/", "tests/", "bench/"))]

    told = use(wheel, tmp_path)
    assert told["available"] and told["isas"][0] == "baseline" and told["report"]["ok"] and not told["warnings"]
    assert told["log_det"] == pytest.approx(-2.0)

    # If two objects have the same inline function, it is a weak symbol in both, and the linker may keep the one that
    # needs AVX-512. So no object may have a weak symbol.
    objects = [str(path) for path in source.glob("build/temp*/*.o")]
    assert len(objects) >= 3 * len(told["isas"])
    symbols = subprocess.run(["nm", "-C", *objects], capture_output=True, text=True, check=True).stdout.splitlines()
    assert not [line for line in symbols if re.search(r" [WVu] ", line)]


def test_broken_compiler_leaves_a_working_package_that_says_so(source, tmp_path):
    shutil.copytree(source, tmp_path / "copy", ignore=shutil.ignore_patterns("build"))
    broken = {"CXX": "/nonexistent/c++", "TARFLOW_FAST_REQUIRE_NATIVE": "0"}
    backend(tmp_path / "copy", "build_editable", tmp_path / "editable", **broken)
    told = use(backend(tmp_path / "copy", "build_wheel", tmp_path / "wheel", **broken), tmp_path)
    assert not told["available"] and told["log_det"] == pytest.approx(-2.0)
    why = "the native CPU library is missing: its build failed: cannot run /nonexistent/c++ --version"
    assert len(told["warnings"]) == 1 and why in told["warnings"][0]
    assert why in told["info"] and "cannot run /nonexistent/c++" in told["report"]["error"]


def test_broken_compiler_is_fatal_where_the_library_is_required(source, tmp_path):
    shutil.copytree(source, tmp_path / "copy", ignore=shutil.ignore_patterns("build"))
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    done = python(code, tmp_path / "copy", CXX="/nonexistent/c++", TARFLOW_FAST_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "tarflow_fast: the native library was not built: cannot run /nonexistent/c++ --version" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_build_without_ninja(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("tarflow_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "find_ninja", lambda: None)
    sources = [tmp_path / name for name in ("one.cpp", "two.cpp")]
    for path in sources:
        path.write_text(f'extern "C" int {path.stem}() {{ return 2; }}\n')
    units = [(str(path), path.with_suffix(".o"), ["-fPIC"]) for path in sources]
    module.build([module.find_compiler()], units, module.LINK_FLAGS, tmp_path / "library.so", tmp_path)
    assert ctypes.CDLL(str(tmp_path / "library.so")).two() == 2
    sources[0].write_text("this is not C++\n")
    with pytest.raises(RuntimeError, match=r"one\.cpp"):
        module.build([module.find_compiler()], units, module.LINK_FLAGS, tmp_path / "library.so", tmp_path)
