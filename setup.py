"""Builds csrc/cpu into tarflow_fast/_tarflow_cpu.so. It needs C++17 only; every file is built once per instruction set.

If nvcc is found, csrc/cuda is built into tarflow_fast/_tarflow_cuda.so. These environment variables change the build:

CXX, CXXFLAGS, LDFLAGS, MAX_JOBS   have their usual meaning
TARFLOW_FAST_REQUIRE_NATIVE=1      makes the install fail if the build fails. Otherwise the failure is written to
                                   build_report.json, which `tarflow-fast info` shows, and PyTorch does the work.
TARFLOW_FAST_CUDA=0                leaves the CUDA library out
TARFLOW_FAST_CUDA=1                makes the install fail if the CUDA library cannot be built
NVCC                               names the CUDA compiler to use
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
LIBRARY, CUDA_LIBRARY, REPORT = "_tarflow_cpu.so", "_tarflow_cuda.so", "build_report.json"
COMMON = ["csrc/cpu/dispatch.cpp"]  # compiled once, for the plain machine; every other file once per instruction set
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cpu/**/*.cpp"))
CUDA_SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cuda/*.cu"))
HEADERS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.h") if "cuda" not in path.parts)

# Contraction is off: a * b + c rounds twice unless the code says fma, so that every compiler gives the same bits.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-fno-exceptions", "-fno-rtti", "-fstack-protector-strong", "-Wall", "-Wextra"]
LINK_FLAGS = ["-shared"] + (["-Wl,-z,relro,-z,now,-z,noexecstack,--as-needed"] if sys.platform == "linux" else [])

# Code for A100 (sm_80) and for H100 and H200 (sm_90), and PTX for later GPUs. The CUDA runtime is linked in statically;
# torch brings a runtime of its own, and both use the same context.
CUDA_FLAGS = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-cudart", "static"]
CUDA_FLAGS += ["--threads", "2"]
for code in ("arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"):
    CUDA_FLAGS += ["-gencode", code]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISAS = {  # name: (flags, an expression that the compiler must accept with them)
    "baseline": ([], "0"),
    "avx2": (AVX2, "(int)_mm256_cvtss_f32(_mm256_fmadd_ps(_mm256_set1_ps(1), _mm256_set1_ps(1), _mm256_set1_ps(1)))"),
    "avx512": (AVX512, "(int)_mm512_cvtss_f32(_mm512_scalef_ps(_mm512_set1_ps(1), _mm512_set1_ps(1)))"),
    "avx512bf16": (
        [*AVX512, "-mavx512vnni", "-mavx512bf16"],
        "(int)_mm512_cvtss_f32(_mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)_mm512_setzero_si512(), "
        "(__m512bh)_mm512_setzero_si512()))",
    ),
}


class BuildNative(build_ext):
    """Compiles the library itself and reports what it did. distutils would not do: it has no flags per file."""

    def get_ext_filename(self, fullname):
        # The name has no Python tag: ctypes loads the library, so one build serves every Python.
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)

    def run(self):
        self.require = os.environ.get("TARFLOW_FAST_REQUIRE_NATIVE") == "1"
        for extension in self.extensions:
            extension.optional = not self.require
        super().run()

    def build_extension(self, ext):
        report = {"ok": False, "error": None, "isas": {}}
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # if this build fails, the library of an earlier one must not stand in for it
        started = time.perf_counter()
        try:
            compile_library(library, Path(self.build_temp).resolve(), report)
            report["ok"] = True
        except (OSError, RuntimeError) as error:
            report["error"] = str(error)
            raise CompileError(f"tarflow_fast: the native library was not built: {error}") from error
        finally:
            report["cuda"] = build_cuda(library.with_name(CUDA_LIBRARY))
            report["seconds"] = round(time.perf_counter() - started, 1)
            (library.parent / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        if os.environ.get("TARFLOW_FAST_CUDA") == "1" and not report["cuda"]["ok"]:
            raise RuntimeError(f"tarflow_fast: the CUDA library was not built: {report['cuda']['error']}")

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        package = Path(self.get_finalized_command("build_py").get_package_dir("tarflow_fast"))
        built = Path(self.build_lib) / "tarflow_fast"
        shutil.copyfile(built / REPORT, package / REPORT)
        if not (built / LIBRARY).exists():
            (package / LIBRARY).unlink(missing_ok=True)
        (package / CUDA_LIBRARY).unlink(missing_ok=True)
        if (built / CUDA_LIBRARY).exists():
            shutil.copyfile(built / CUDA_LIBRARY, package / CUDA_LIBRARY)

    def get_outputs(self):
        return [path for path in [*super().get_outputs(), *self._beside()] if os.path.exists(path)]

    def _beside(self):
        folders = [os.path.dirname(self.get_ext_fullpath(ext.name)) for ext in self.extensions]
        return [os.path.join(folder, name) for folder in folders for name in (REPORT, CUDA_LIBRARY)]


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def compile_library(library, temp, report):
    """Compile the CPU library. What the compiler can do is found by trying it, and goes into the report."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [find_compiler()]
    report["compiler"] = shlex.join(compiler)
    report["compiler_version"] = run([*compiler, "--version"]).splitlines()[0]
    report["platform"] = platform.platform()
    flags = FLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
    link = LINK_FLAGS + shlex.split(os.environ.get("LDFLAGS", ""))

    error = probe(compiler, flags, "int f() { return 0; }")
    if error:
        raise RuntimeError(f"{shlex.join(compiler)} cannot compile C++17:\n{error}")
    report["openmp"] = not probe(
        compiler, [*flags, "-fopenmp"], "#include <omp.h>\nint f() { return omp_get_num_threads(); }"
    )
    if report["openmp"]:
        flags, link = [*flags, "-fopenmp"], [*link, "-fopenmp"]
    isas, report["isas_left_out"] = {}, {}
    for name, (extra, expression) in ISAS.items():
        if name == "baseline":
            isas[name] = extra
        elif platform.machine().lower() not in ("x86_64", "amd64"):
            report["isas_left_out"][name] = f"not an instruction set of {platform.machine()}"
        elif error := probe(compiler, [*flags, *extra], f"#include <immintrin.h>\nint f() {{ return {expression}; }}"):
            report["isas_left_out"][name] = error
        else:
            isas[name] = extra
    report["flags"], report["link_flags"], report["isas"] = shlex.join(flags), shlex.join(link), isas

    have = [f"-DTF_HAVE_{name}" for name in isas]
    units = []  # (source, object, flags)
    for source in SOURCES:
        stem = source.removeprefix("csrc/cpu/").removesuffix(".cpp").replace("/", "_")
        if source in COMMON:
            units.append((source, temp / f"{stem}.o", [*flags, *have]))
        else:
            units += [
                (source, temp / f"{stem}.{name}.o", [*flags, *extra, f"-DTF_ISA={name}"])
                for name, extra in isas.items()
            ]
    temp.mkdir(parents=True, exist_ok=True)
    build(compiler, units, link, library.resolve(), temp)


def build_cuda(library):
    """Compile the CUDA library, or report why that failed. The library is optional, so nothing here raises."""
    report = {"ok": False, "error": None}
    library.unlink(missing_ok=True)
    started = time.perf_counter()
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    try:
        if os.environ.get("TARFLOW_FAST_CUDA") == "0":
            raise RuntimeError("TARFLOW_FAST_CUDA=0 left it out")
        if not nvcc:
            raise RuntimeError("nvcc was not found")
        report["nvcc"] = run([nvcc, "--version"]).strip().splitlines()[-1]
        report["flags"] = shlex.join(CUDA_FLAGS)
        run([nvcc, *CUDA_FLAGS, *CUDA_SOURCES, "-o", str(library.resolve())])
        report["ok"] = True
    except (OSError, RuntimeError) as error:
        report["error"] = str(error)
    report["seconds"] = round(time.perf_counter() - started, 1)
    return report


def find_compiler():
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    raise RuntimeError("no C++ compiler found (tried c++, g++, clang++; CXX chooses another)")


def run(command):
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"cannot run {shlex.join(command)}: {error}") from None
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{(done.stderr or done.stdout).strip()[-4000:]}")
    return done.stdout


def probe(compiler, flags, code):
    """None if a shared library of `code` can be built with `flags`; otherwise what the compiler said."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(code + "\n")
        try:
            run([*compiler, *flags, "-shared", str(source), "-o", str(Path(folder, "probe.so"))])
        except RuntimeError as error:
            return str(error)
    return None


def build(compiler, units, link, library, temp):
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    objects = [str(output) for _, output, _ in units]
    ninja = find_ninja()
    if ninja:
        cxx = shlex.join(compiler)
        lines = [
            "rule cxx",
            f"  command = {cxx} -MD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        lines += ["rule link", f"  command = {cxx} $in -o $out $flags"]
        for source, output, flags in units:
            lines += [f"build {escape(output)}: cxx {escape(ROOT / source)}", f"  flags = {shlex.join(flags)}"]
        lines += [f"build {escape(library)}: link {' '.join(map(escape, objects))}", f"  flags = {shlex.join(link)}"]
        (temp / "build.ninja").write_text("\n".join(lines) + "\n")
        run([ninja, "-C", str(temp), "-j", str(jobs)])
    else:
        commands = [[*compiler, *flags, "-c", source, "-o", str(output)] for source, output, flags in units]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, commands))
        run([*compiler, *objects, "-o", str(library), *link])


def find_ninja():
    try:
        import ninja

        return str(Path(ninja.BIN_DIR, "ninja"))
    except ImportError:
        return shutil.which("ninja")


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("tarflow_fast._tarflow_cpu", SOURCES, depends=HEADERS, optional=True)],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
    )
